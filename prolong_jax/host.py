"""Host state of a run: with the TrainState, all that a checkpoint holds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from prolong_jax import processes, roofline
from prolong_jax.checkpoint import Checkpointer
from prolong_jax.config import LossSettings, UpdateSettings
from prolong_jax.data.mixture import Position
from prolong_jax.groups import group_from_dict
from prolong_jax.metrics import Progress, Writer
from prolong_jax.objectives import adapted_entropy_coef, adapted_entropy_shift
from prolong_jax.processes import Timer
from prolong_jax.reset_rules import Evaluation, History
from prolong_jax.rollout import Cursor
from prolong_jax.stages import Progress as StageProgress
from prolong_jax.types import TrainState

PHASES = ("sample", "verify", "score", "update", "evaluate", "save")


@dataclass
class Host:
    progress: StageProgress = field(default_factory=StageProgress)
    history: History = field(default_factory=History)
    cursor: Cursor = field(default_factory=Cursor)
    base: dict[str, Any] = field(default_factory=dict)  # validation before step 1
    resets: list[dict[str, Any]] = field(default_factory=list)
    skipped_in_a_row: int = 0
    entropy: float = 0.0  # nats per token, in the last step
    entropy_shift: float = 0.0  # see adapted_entropy_shift
    samples: int = 0
    generated_tokens: int = 0
    wall_s: float = 0.0
    rl_wall_s: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Host":
        """The inverse of `to_dict` after a JSON round trip."""
        progress, history, cursor = (values[k] for k in ("progress", "history", "cursor"))
        best = progress["best"] and Evaluation(**progress["best"])
        known = {name: tuple(numbers) for name, numbers in history.items()}
        known["evaluations"] = tuple(Evaluation(**e) for e in history["evaluations"])
        surplus = [group_from_dict(g) for g in cursor["surplus"]]
        return cls(
            **values
            | {
                "progress": StageProgress(**progress | {"best": best}),
                "history": History(**known),
                "cursor": Cursor(Position(**cursor["position"]), surplus),
            }
        )

    def summary(self, timer: Timer, final: dict[str, Any]) -> dict[str, Any]:
        """What summary.json says of a finished run; `timer` is that of the final evaluation."""
        seconds = time.monotonic() - timer.begin
        self.add_phases(timer.take()[0])
        return {
            "steps": self.progress.step,
            "wall_s": self.wall_s + seconds,
            "rl_wall_s": self.rl_wall_s + seconds,
            "samples": self.samples,
            "generated_tokens": self.generated_tokens,
            "resets": self.resets,
            "validation": {"base": self.base, "final": final},
            "phases_s": {name: self.phases_s.get(name, 0.0) for name in PHASES},
        }

    def refuse_lost_run(self, settings: UpdateSettings, saved: int | None) -> None:
        """Raises RuntimeError after too many skipped updates in a row."""
        if self.skipped_in_a_row >= settings.max_skipped:
            raise RuntimeError(
                f"the last {self.skipped_in_a_row} updates, up to step {self.progress.step}, had a "
                f"non-finite gradient and were skipped; the last good checkpoint is of step {saved}; "
                "look at the last rows of metrics.jsonl."
            )

    def save(self, state: TrainState, checkpointer: Checkpointer) -> None:
        """Raises RuntimeError where this save cannot begin, or the one before it failed."""
        step, best = self.progress.step, self.progress.best
        try:
            checkpointer.save(step, state, self.to_dict(), None if best is None else best.step)
        except OSError as error:
            raise RuntimeError(
                f"saving failed at step {step} ({error}); the newest whole checkpoint is of step "
                f"{checkpointer.latest_step}; make room and start the same command again."
            ) from error
        processes.give_back_memory()  # what steps of other sizes have left

    def count_skipped(self, updates: Sequence[Mapping[str, Any]]) -> None:
        for metrics in updates:
            skipped = metrics["update/skipped_nonfinite"] > 0
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def entropy_coef(self, loss: LossSettings) -> float:
        """The coefficient of the entropy in the next update."""
        if loss.entropy_target == 0:
            return loss.entropy_coef
        coef, target = loss.entropy_coef, loss.entropy_target
        return adapted_entropy_coef(self.entropy_shift, self.entropy, coef=coef, target=target)

    def adapt_entropy(self, loss: LossSettings, entropy: float | None) -> None:
        """Takes note of a step's entropy; None where nothing was trained on."""
        if entropy is None:
            return
        self.entropy = entropy
        if loss.entropy_target == 0:
            return
        self.entropy_shift = adapted_entropy_shift(
            self.entropy_shift,
            entropy,
            coef=loss.entropy_coef,
            target=loss.entropy_target,
            step=loss.entropy_step,
        )

    def add_phases(self, phases: dict[str, float]) -> None:
        for phase, seconds in phases.items():
            self.phases_s[phase] = self.phases_s.get(phase, 0.0) + seconds


def combined(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of a step's updates: their mean, or the extreme of extremes."""
    row = {}
    for name in (updates or [{}])[0]:
        values = [metrics[name] for metrics in updates]
        of = max if name.endswith("_max") else min if name.endswith("_min") else np.mean
        row[name] = float(of(values))
    if updates:
        row["update/first_ratio_deviation"] = float(updates[0]["update/ratio_deviation"])
    return row


def report_row(
    row: dict[str, Any], host: Host, timer: Timer, writer: Writer, view: Progress
) -> None:
    """Adds times to a metrics row, writes and shows it."""
    row |= processes.usage(timer)
    seconds, (phases, timeline) = time.monotonic() - timer.begin, timer.take()
    host.wall_s += seconds
    host.rl_wall_s += seconds
    host.add_phases(phases)
    row |= {f"time/{phase}_s": spent for phase, spent in phases.items()}
    row |= {"step": host.progress.step, "time_s": host.wall_s, "time/step_s": seconds}
    row["time/idle_s"] = max(0.0, seconds - sum(phases.values()))
    row["timeline"] = [[name, round(start, 3), round(end, 3)] for name, start, end in timeline]
    row |= processes.take_compilations()
    if "tokens/generated" in row:
        row["tokens/per_s"] = row["tokens/generated"] / seconds
    row |= roofline.utilisation(row, jax.devices()[0].device_kind, jax.device_count())
    writer.step(row)
    view.show(row)
