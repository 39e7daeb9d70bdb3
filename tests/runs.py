"""Small runs of the tiny model in processes of their own, with trouble planted, and their ends.

    python -m tests.runs [--kill=PHASE:STEP:DELAY] [--term=PHASE:STEP:DELAY] [--nan=STEP,...] -- ARGS

starts the training with ARGS, and sends itself SIGKILL or SIGTERM a while after a phase of a step
began: start (of the step), sample, verify, score, update, evaluate, save or reset; or makes the
gradient of a step NaN.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from prolong_jax import train
from prolong_jax.host import Host
from prolong_jax.metrics import read_rows
from prolong_jax.processes import Timer

TINY = "experiments/configs/tiny.py"
SMALL = {
    "total_steps": 12,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_sampling_rounds": 2,
    "rollout.cache_lens": 1,
    "update.num_minibatches": 2,
    "update.micro_batch_rows": 8,
    "update.row_len": 256,
    "validation.every": 3,
    "validation.prompts_per_level": 1,
    "validation.samples": 2,
    "validation.final_samples": 2,
    "checkpoint.every": 2,
    "stages": [
        {"name": "one", "steps": 4},
        {
            "name": "two",
            "reset_at_start": True,
            "reset": {"every": 3, "reference": "best", "optimizer": False},
        },
    ],
}
VARYING = ("time", "tokens/per_s", "verify/", "memory", "checkpoint/")


# --- in the process of the run -------------------------------------------------------------------


class Trouble:
    """Sends a signal to this process, `delay` seconds after a phase of a step began."""

    def __init__(self, number: int, where: str):
        phase, step, delay = where.split(":")
        self.number, self.where = number, (phase, int(step))
        self.delay, self.done = float(delay), False

    def at(self, phase: str, step: int) -> None:
        if (phase, step) == self.where and not self.done:
            self.done = True
            threading.Timer(self.delay, os.kill, (os.getpid(), self.number)).start()


def plant(troubles: list[Trouble], nan_steps: list[int]) -> None:
    """Tells the troubles where the run is, and spoils gradients."""
    now, timer, step, save, reset = 0, Timer.__call__, train.train_step, Host.save, train.reset
    programs = train.programs

    def tell(phase):
        for trouble in troubles:
            trouble.at(phase, now)

    def watched_timer(self, phase):
        tell(phase)
        return timer(self, phase)

    def watched_step(setup, state, host, *rest):
        nonlocal now
        now = host.progress.step + 1
        tell("start")
        return step(setup, state, host, *rest)

    def watched_save(self, state, checkpointer):
        tell("save")
        save(self, state, checkpointer)

    def watched_reset(*args):
        result = reset(*args)
        if result[1]["reset"]:
            tell("reset")
        return result

    def spoilt_programs(*args):
        score, update = programs(*args)

        def spoilt(state, batch, *rest):
            if now in nan_steps:
                batch = dataclasses.replace(batch, advantage=batch.advantage * float("nan"))
            return update(state, batch, *rest)

        return score, spoilt

    Timer.__call__ = watched_timer
    train.train_step, Host.save, train.reset = watched_step, watched_save, watched_reset
    train.programs = spoilt_programs if nan_steps else programs


def main() -> int:
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--kill")
    parser.add_argument("--term")
    parser.add_argument("--nan", default="")
    args = parser.parse_args(own)
    numbers = {signal.SIGKILL: args.kill, signal.SIGTERM: args.term}
    plant(
        [Trouble(number, where) for number, where in numbers.items() if where],
        [int(step) for step in args.nan.split(",") if step],
    )
    return train.main(rest)


# --- from outside --------------------------------------------------------------------------------


def arguments(workdir: Path, **changes: Any) -> list[str]:
    """The command line of a small run; `__` in a name stands for a dot."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    given = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={TINY}", f"--workdir={workdir}", *given]


def command(argv: list[str], **trouble: str) -> list[str]:
    planted = [f"--{name}={where}" for name, where in trouble.items()]
    return [sys.executable, "-m", "tests.runs", *planted, "--", *argv]


def start(argv: list[str], **trouble: str) -> tuple[int, str]:
    """Runs to the end or to the planted one. Returns the exit code and what was printed."""
    done = subprocess.run(command(argv, **trouble), capture_output=True, text=True, timeout=3600)
    return done.returncode, done.stdout + done.stderr


def result(workdir: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how often it was interrupted."""
    summary = json.loads((workdir / "summary.json").read_text())
    step = summary["steps"]
    saved = workdir.absolute() / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(saved / "state")
    (host,) = (saved / "host").glob("metadata")
    clocks = ("wall_s", "rl_wall_s", "phases_s")
    rows = read_rows(workdir / "metrics.jsonl")
    return {
        "state": jax.tree.map(np.asarray, state),
        "host": {k: v for k, v in json.loads(host.read_text()).items() if k not in clocks},
        "summary": {k: v for k, v in summary.items() if k not in clocks},
        "metrics": [{k: v for k, v in r.items() if not k.startswith(VARYING)} for r in rows],
        "samples": read_rows(workdir / "samples.jsonl"),
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The parts in which two results differ; arrays are compared bit for bit."""
    parts = [name for name in ours if name != "state" and ours[name] != theirs[name]]
    mine, yours = (jax.tree_util.tree_leaves_with_path(r["state"]) for r in (ours, theirs))
    for (path, a), (_, b) in zip(mine, yours, strict=True):
        name = getattr(path[0], "key", str(path[0]))
        if a.tobytes() != b.tobytes() and name not in parts:
            parts.append(name)
    return parts


if __name__ == "__main__":
    sys.exit(main())
