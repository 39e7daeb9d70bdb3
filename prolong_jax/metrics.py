"""Where the numbers of a run go: files, W&B and TensorBoard when asked, and the terminal.

A metrics row is a flat mapping with "step" (0: the evaluation of the base model); all names that it
may have stand in experiments/METRICS.md.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prolong_jax.config import DOMAINS

TABLE_ROWS = 100  # samples of one W&B table; each is a file of its own
VALIDATION_SETS = (*DOMAINS, "all", "easy_middle", "hard")


def read_rows(
    path: str | Path, keep: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> list[dict[str, Any]]:
    """What `keep` makes of each row of a JSON lines file; a half-written last line is left out.

    Raises:
      ValueError: a line before the last one is no JSON.
    """
    rows, broken = [], ""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if broken:
                message = f"{path}: expected JSON lines, got {broken[:60]!r}; remove that line."
                raise ValueError(message)
            try:
                rows.append(keep(json.loads(line)))
            except json.JSONDecodeError:
                broken = line
    return rows


def _forget_after(path: Path, step: int) -> None:
    """Drops the rows after `step`, and a half-written line; the file is whole at any moment."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _json_line(row: Mapping[str, Any]) -> str:
    """A row as strict JSON: numpy numbers are plain ones, NaN and infinities are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(row), allow_nan=False) + "\n"


class Writer:
    """Appends to metrics.jsonl and samples.jsonl; a row is with the system before the next step.

    Args:
      workdir: an existing directory.
      wandb: "off", "offline" (writes under `workdir`/wandb) or "online".
      config: nested settings, for W&B; "metrics.tensorboard" asks for events of TensorBoard.
      resume_step: rows after this step are dropped; None: the run starts anew, so all are.

    Raises:
      ValueError: a file in the workdir is no JSON lines, or W&B or TensorBoard cannot start.
    """

    def __init__(
        self, workdir: Path, *, wandb: str, config: Mapping[str, Any], resume_step: int | None
    ):
        paths = [workdir / "metrics.jsonl", workdir / "samples.jsonl"]
        for path in paths:
            _forget_after(path, -1 if resume_step is None else resume_step)
        self._tensorboard, self._table = None, []
        if config.get("metrics", {}).get("tensorboard"):
            self._tensorboard = _start_tensorboard(workdir / "tensorboard", resume_step)
        self._wandb: Any = None if wandb == "off" else _start_wandb(workdir, wandb, config)
        self._metrics, self._samples = (open(path, "a", encoding="utf-8") for path in paths)

    def step(self, row: Mapping[str, Any]) -> None:
        """Writes one metrics row."""
        self._metrics.write(_json_line(row))
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in row.items() if value is not None})
        if self._tensorboard is not None:
            for key, value in row.items():
                is_number = isinstance(value, int | float | np.generic) and key != "step"
                if is_number and math.isfinite(value):
                    self._tensorboard.add_scalar(key, value, row["step"])
            if row.get("reset"):
                self._tensorboard.add_text("reset", _plain(row["reset"]), row["step"])
            self._tensorboard.flush()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes responses with their verdicts; the rows have "step", and all the same keys."""
        self._samples.writelines(_json_line(row) for row in rows)
        self._samples.flush()
        if self._tensorboard is not None:
            for number, row in enumerate(rows):
                text = "\n\n".join(f"{key}:\n\n{_plain(value)}" for key, value in row.items())
                self._tensorboard.add_text(f"samples/{number}", text, row["step"])
        if self._wandb is not None:
            self._table += rows
            self._log_table(TABLE_ROWS)

    def _log_table(self, least: int) -> None:
        """Sends the samples to W&B as a table once there are enough of them."""
        import wandb

        if len(self._table) >= least:
            columns = list(self._table[0])
            data = [[_encodable(row.get(key)) for key in columns] for row in self._table]
            self._wandb.log(
                {"step": self._table[-1]["step"], "samples": wandb.Table(columns, data)}
            )
            self._table = []

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._log_table(1)
            self._wandb.finish()


class _NoWriter(Writer):
    """Writes nothing."""

    def __init__(self):
        pass

    def step(self, row: Mapping[str, Any]) -> None:
        pass

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def close(self) -> None:
        pass


def open_writer(workdir: Path, *, active: bool, **settings: Any) -> Writer:
    """A Writer in the process that writes, and in the others one that writes nothing."""
    return Writer(workdir, **settings) if active else _NoWriter()


def _encodable(value: Any) -> Any:
    """The same, with "?" for each half of a surrogate pair in a text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _plain(value: Any) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join("    " + line for line in _encodable(str(value)).splitlines())


def _start_tensorboard(directory: Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "config: 'metrics.tensorboard' needs the package tensorboardX, which is not installed; "
            "run pip install 'prolong-jax[tensorboard]', or set it to False."
        ) from error
    for path in directory.glob("events.out.tfevents.*") if resume_step is None else ():
        path.unlink()
    # TensorBoard drops the numbers of the steps after the checkpoint; their texts stand there twice.
    # The suffix tells apart two files of one second.
    after = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(directory), purge_step=after, filename_suffix=f".{after or 0}")


def _start_wandb(workdir: Path, mode: str, config: Mapping[str, Any]) -> Any:
    import wandb  # only when asked: it starts a process

    identity = workdir / "wandb_id"
    try:
        run = wandb.init(
            project="prolong_jax",
            name=workdir.resolve().name,
            id=identity.read_text().strip() if identity.exists() else None,
            resume="allow" if mode == "online" else None,
            dir=str(workdir),
            mode="online" if mode == "online" else "offline",
            config=dict(config),
            settings=wandb.Settings(console="off"),  # the progress view owns the terminal
        )
    except wandb.Error as error:
        hint = "log in with `wandb login`, or use offline or off"
        raise ValueError(f"config: 'metrics.wandb' is {mode!r}, but {error}; {hint}.") from error
    identity.write_text(f"{run.id}\n")
    run.define_metric("*", step_metric="step")  # W&B's own step cannot go back after a restart
    return run


class Progress:
    """Live view of a run on a terminal; elsewhere one plain line per step and per evaluation."""

    def __init__(self, total_steps: int, console: Console | None = None):
        self._total = total_steps
        self._console = Console() if console is None else console
        self._live = Live(console=self._console, auto_refresh=False)
        self._step_s: deque[float] = deque(maxlen=20)
        self._last = {"last reset": "none yet", "validation": "none yet"}

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def print(self, renderable: RenderableType) -> None:
        """Prints above the live view."""
        self._console.print(renderable, highlight=False, soft_wrap=isinstance(renderable, Text))

    def show(self, row: Mapping[str, Any]) -> None:
        """Shows one metrics row."""
        if row.get("reset"):
            self._last["last reset"] = f"{row['reset']}, after step {row['step'] - 1}"
        if row["step"] > 0:
            self._step_s.append(row.get("time/step_s", 0.0))
        line = _validation_line(row)
        if line:
            self._last["validation"] = line.removeprefix("validation ")
        if self._console.is_terminal:
            self._live.update(self._view(row), refresh=True)
        elif row["step"] > 0:
            self.print(Text(_step_line(row, self._total)))
        if line:
            self.print(Text(line))

    def _view(self, row: Mapping[str, Any]) -> RenderableType:
        left_s = sum(self._step_s) / max(1, len(self._step_s)) * (self._total - row["step"])
        (hours, minutes), seconds = divmod(int(left_s) // 60, 60), int(left_s) % 60
        left = f"{hours} h {minutes} min left" if hours else f"{minutes} min {seconds} s left"
        number = "" if row.get("stage_index") is None else f"{row['stage_index'] + 1}: "
        bar = Table.grid(padding=(0, 2))
        done = Text(f"{row['step']}/{self._total}")
        drawn = ProgressBar(total=self._total, completed=row["step"], width=24)
        bar.add_row(done, drawn, left if self._step_s else "")
        facts = {
            "stage": number + str(row.get("stage", "base model")),
            "reward": _reward(row),
            "policy": _numbers(row, POLICY),
            "groups": _numbers(row, GROUPS),
            "speed": _numbers(row, SPEED),
        }
        shown = Table.grid(padding=(0, 2))
        shown.add_row("step", bar)
        for label, text in (facts | self._last).items():
            shown.add_row(label, Text(text))
        return shown


POLICY = (("entropy ", "update/entropy", ".2f", ""), ("kl ", "update/kl_ref", ".4f", ""))
POLICY += (("len ", "response/len_mean", ".0f", ""),)
GROUPS = (("kept ", "groups/kept", ".0f", ""), ("dead ", "groups/equal", ".0f", ""))
SPEED = (("", "tokens/per_s", ",.0f", " tokens/s"), ("", "time/step_s", ".1f", " s/step"))


def _numbers(row: Mapping[str, Any], wanted: Iterable[tuple[str, str, str, str]]) -> str:
    """What the row has of some metrics: (words before, key, format, words after)."""
    known = [entry for entry in wanted if row.get(entry[1]) is not None]
    return "  ".join(f"{a}{row[key]:{form}}{b}" for a, key, form, b in known)


def _reward(row: Mapping[str, Any]) -> str:
    rewards = [(d, row.get(f"reward/{d}")) for d in DOMAINS]
    each = " ".join(f"{d} {r:.2f}".replace(" 0.", " .") for d, r in rewards if r is not None)
    return _numbers(row, [("", "reward/mean", ".2f", f" ({each})")])


def _step_line(row: Mapping[str, Any], total: int) -> str:
    parts = [f"step {row['step']:>{len(str(total))}}/{total}"]
    if row.get("stage_index") is not None:
        parts.append(f"stage {row['stage_index'] + 1}")
    reward = _reward(row)
    parts += [f"reward {reward}"] if reward else []
    parts.append(_numbers(row, POLICY + GROUPS + SPEED))
    parts += [f"[reset: {row['reset']}]"] if row.get("reset") else []
    parts += ["[no update]"] if row.get("groups/kept") == 0 else []
    return "  ".join(part for part in parts if part)


def _validation_line(row: Mapping[str, Any]) -> str:
    """The scores of an evaluation; "" where there was none."""
    parts = []
    for name in ("all", "easy_middle", "hard", *DOMAINS):
        average, low, high = (row.get(f"validation/{name}/{part}") for part in ("avg", "lo", "hi"))
        if average is not None:
            interval = f" [{low:.2f}, {high:.2f}]" if name == "all" and low is not None else ""
            parts.append(f"{name} {average:.3f}{interval}")
    return f"validation @ {row['step']}: " + "  ".join(parts) if parts else ""


def final_table(summary: Mapping[str, Any]) -> Table:
    """Scores base -> final per validation set: avg@k with its 95% interval, and pass@k."""
    tables = [summary["validation"][policy] for policy in ("base", "final")]
    k = max((scores["k"] for table in tables for scores in table.values()), default=0)
    shown = Table(box=box.SIMPLE, title=f"validation: avg@{k} [95% interval] and pass@{k}")
    for heading in ("", "base avg", "pass", "final avg", "pass", "gain"):
        shown.add_column(heading, no_wrap=True, justify="right")
    for name in VALIDATION_SETS:
        scores = [table[name] for table in tables if name in table]
        cells = []
        for s in scores:
            low, high = s["ci95"]
            cells += [f"{s['avg_at_k']:.3f} [{low:.2f}, {high:.2f}]", f"{s['pass_at_k']:.2f}"]
        if len(scores) == 2:
            gain = scores[1]["avg_at_k"] - scores[0]["avg_at_k"]
            shown.add_row(name, *cells, f"{gain:+.3f}", style="bold" if name == "all" else None)
    return shown
