"""Everything that the next step depends on, in one atomic save.

A save is made between two steps, so nothing is in flight: surplus groups are saved, and the samples
of the next step are drawn anew with the same keys, prompts and weights.

The order of a resume:
1. unfinished saves, which have another name, are removed;
2. the newest checkpoint is compared with its checksums; a damaged one is put aside, in `damaged/`
   beside the others, and the one before it is next;
3. params, reference and optimizer state are restored onto the run's own mesh;
4. the host state follows: controller progress and its history, position in the data, surplus
   groups, counters and events;
5. metrics.jsonl and samples.jsonl are cut back to the restored step (metrics.py);
6. the run goes on with the next step. Its random numbers need no state: keys are folded from
   (seed, step, prompt, sample).
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as policies

from prolong_jax.config import CheckpointSettings
from prolong_jax.mesh import fetch
from prolong_jax.processes import exchange, is_first, write_json
from prolong_jax.types import PyTree, TrainState

LOOK_EVERY_S = 0.1  # for the end of a save


@dataclass
class _Keep(policies.PreservationPolicy):
    """Which checkpoints stay when a newer one is complete."""

    settings: CheckpointSettings
    best: dict[int, int | None] = field(default_factory=dict)  # at each step, the best one so far

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps, every = [c.step for c in checkpoints], self.settings.keep_every
        last = sorted(steps)[-self.settings.keep :]
        # A run that goes on from any of the last may reset its reference to what was best then.
        kept = {*last, *(self.best.get(step) for step in last)}
        return [s in kept or (every > 0 and s % every == 0) for s in steps]


class Checkpointer:
    """Saves and restores (device state, host state) pairs below a directory.

    With `read_only` the directory may be that of a run that is going on.
    """

    def __init__(
        self, directory: str | Path, settings: CheckpointSettings, *, read_only: bool = False
    ):
        self._directory, self._keep = Path(directory).absolute(), _Keep(settings)
        self._checker: threading.Thread | None = None
        self._ended = threading.Event()  # the save that the checker waits for
        self._told: dict[str, float] = {}  # of the last complete save
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def take_metrics(self) -> dict[str, float]:
        """Size and duration of a save that was complete since the last call, if there was one."""
        told, self._told = self._told, {}
        return told

    @property
    def steps(self) -> list[int]:
        """Of the complete checkpoints. Waits for the last save; raises OSError where it failed."""
        self._finish()
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, host: dict[str, Any], best: int | None = None
    ) -> None:
        """Saves in the background; `host` must survive a JSON round trip. Keeps the best step too.

        Raises:
          OSError: this save cannot begin, or the one before it failed.
        """
        self._finish()
        self._keep.best[step], begin = best, time.monotonic()
        if is_first():
            self._sums(step).unlink(missing_ok=True)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
                ),
                force=True,
            )
        except ValueError as error:  # how tensorstore says that it cannot write
            raise OSError(_cause(error)) from error
        if is_first():
            self._ended.clear()
            self._checker = threading.Thread(target=self._check_in, args=(step, begin))
            self._checker.start()

    def _check_in(self, step: int, begin: float) -> None:
        """Waits until a save is complete, then writes its checksums and says what it took."""
        path = self._directory / str(step)
        while not path.is_dir():
            if self._ended.wait(LOOK_EVERY_S) and not path.is_dir():
                return  # it failed
        seconds, sums = time.monotonic() - begin, checksums(path)
        self._sums(step).parent.mkdir(exist_ok=True)
        write_json(self._sums(step), sums)
        size = sum(size for size, _ in sums.values()) / 1e6
        self._told = {"checkpoint/mb": size, "time/checkpoint_s": seconds}
        print(f"saved step {step}: {size:,.1f} MB in {seconds:.1f} s")

    def _sums(self, step: int) -> Path:
        return self._directory.with_name("checksums") / f"{step}.json"

    def _finish(self) -> None:
        """Waits for the last save. Raises OSError where it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise OSError(_cause(error)) from error
        finally:
            self._ended.set()
            if self._checker is not None:
                self._checker.join()
                all_sums = self._sums(0).parent.glob("*.json")
                for gone in (s for s in all_sums if not (self._directory / s.stem).exists()):
                    gone.unlink()

    def resume(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint, with the shapes and shardings of `like`; None: there is none.

        Raises:
          ValueError: there are checkpoints, but none is whole, or the newest is of another model.
        """
        damaged = []
        for step in reversed(self.steps):
            fault = exchange(self._fault(step) if is_first() else "")[0]
            restored, error = (None, "") if fault else self._restored(step, like)
            if error and self._sums(step).exists():
                raise ValueError(
                    f"--workdir: the checkpoint of step {step} does not fit this model ({error}); "
                    "give the settings of that run."
                )
            if restored is not None:
                best = restored[1].get("progress", {}).get("best")
                self._keep.best[step] = best and best["step"]
                if damaged:
                    print(
                        f"damaged checkpoints are put aside: {', '.join(damaged)}; the run goes on "
                        f"from step {step} and loses nothing but time"
                    )
                return restored
            damaged.append(f"step {step} ({fault or error})")
            self._put_aside(step)
        if damaged:
            raise ValueError(
                f"--workdir: no checkpoint is whole: {', '.join(damaged)}; restore one from a copy, "
                "or give another workdir to begin anew."
            )
        return None

    def _put_aside(self, step: int) -> None:
        exchange(None)  # nobody reads it any more
        if is_first():
            aside = self._directory.with_name("damaged")
            aside.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(aside / f"{step}-{time.time():.0f}")
            self._sums(step).unlink(missing_ok=True)
        exchange(None)
        self._manager.reload()

    def _fault(self, step: int) -> str:
        """What is wrong with a checkpoint; "" where nothing is, or it has no checksums yet."""
        if not self._sums(step).exists():
            return ""
        try:
            expected = json.loads(self._sums(step).read_text())
        except ValueError:
            return "its checksums cannot be read"
        found = checksums(self._directory / str(step))
        for name, (size, digest) in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != [size, digest]:
                now = (
                    f"has {found[name][0]} bytes of {size}" if found[name][0] != size else "changed"
                )
                return f"{name} {now}"
        return ""

    def _restored(
        self, step: int, like: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """A checkpoint, or why it cannot be read."""
        state, host = ocp.args.StandardRestore(_shapes(like)), ocp.args.JsonRestore()
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=state, host=host))
        except Exception as error:  # damaged arrays show as a plain Exception
            return None, _first_line(error)
        return (restored["state"], restored["host"]), ""

    def restore_params(self, like: PyTree, step: int | None = None) -> PyTree:
        """The weights alone of a checkpoint (the newest), with the shapes and shardings of `like`.

        Raises:
          ValueError: there is no such checkpoint, or it is damaged or of another model.
        """
        steps, step = self.steps, self.latest_step if step is None else step
        if step not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"--step: no checkpoint of step {step}; found: {found}.")
        item = {"params": _shapes(like)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        try:
            # Not through the manager: it knows the item by the handler that saves it.
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(self._directory / str(step) / "state", args)
        except Exception as error:
            raise ValueError(
                f"--workdir: the checkpoint of step {step} cannot be restored "
                f"({_first_line(error)}); choose another one by --step."
            ) from error
        return restored["params"]

    def close(self) -> None:
        """Waits until the last save is complete. Raises OSError where it failed."""
        try:
            self._finish()
        finally:
            self._manager.close()


def _shapes(like: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _cause(error: BaseException) -> str:
    """The end of a chain of reasons, such as "No space left on device"."""
    return _first_line(error).rsplit(": ", 1)[-1]


def checksums(directory: Path) -> dict[str, list]:
    """[bytes, SHA-256] of every file below a directory, by its path there."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path.relative_to(directory))] = [os.path.getsize(path), digest]
    return found


def params_sha256(mesh: Mesh, params: PyTree) -> str:
    """Hash of the weights in the order of their names."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(fetch(mesh, leaf)).tobytes())
    return digest.hexdigest()
