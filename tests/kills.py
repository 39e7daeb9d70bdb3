"""Kills a run at random moments of every phase, and compares its end with that of an uninterrupted run.

    python -m tests.kills [--kills=10] [--terms=5] [--seed=0]

Params, reference, optimizer state, host state, metrics, samples and summary must be equal, bit for
bit but for times. The exit code is 1 where anything differs.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

from tests import runs

PHASES = ("sample", "verify", "score", "update", "save", "evaluate", "reset")
LAST = runs.SMALL["total_steps"]
STEPS = {  # at which a phase is met
    "save": [2, 3, 4, 6, 8, 9, 10, LAST],
    "evaluate": [0, 3, 6, 9, LAST],
    "reset": [5 - 1, 7, 10],  # the step before which the reset is; `reset` is told of it early
}
LENGTH_S = {"sample": 1.0, "verify": 0.1, "score": 0.3, "update": 1.0, "save": 0.5, "evaluate": 2.0}


def moments(count: int, rng: random.Random) -> list[str]:
    """PHASE:STEP:DELAY in order of the steps; every phase is there when there are enough."""
    phases = list(PHASES[:count]) + rng.choices(PHASES, k=max(0, count - len(PHASES)))
    return _sorted([(rng.choice(_steps(phase)), phase) for phase in phases], rng)


def moments_apart(count: int, rng: random.Random) -> list[str]:
    """The same at steps that are two apart, the last one left out; at most five find room.

    A signal stops the run after its step, so that another moment of that step would never come.
    Phases that few steps have choose first.
    """
    found: list[tuple[int, str]] = []
    for phase in sorted(PHASES, key=lambda phase: len(_steps(phase))):
        taken = [LAST, *(step for step, _ in found)]
        free = [s for s in _steps(phase) if min(abs(s - other) for other in taken) >= 2]
        if free and len(found) < count:
            found.append((rng.choice(free), phase))
    return _sorted(found, rng)


def _steps(phase: str) -> list[int]:
    return STEPS.get(phase, list(range(1, LAST + 1)))


def _sorted(found: list[tuple[int, str]], rng: random.Random) -> list[str]:
    return [
        f"{phase}:{step}:{rng.uniform(0, LENGTH_S.get(phase, 0.2)):.3f}"
        for step, phase in sorted(found)
    ]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--terms", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{scratch}/compiled"
        whole = Path(scratch) / "whole"
        code, printed = runs.start(runs.arguments(whole))
        assert code == 0, printed
        expected = runs.result(whole)
        for kind, count in (("kill", args.kills), ("term", args.terms)):
            workdir = Path(scratch) / kind
            planned = moments(count, rng) if kind == "kill" else moments_apart(count, rng)
            met = 0
            for where in planned:
                code, printed = runs.start(runs.arguments(workdir), **{kind: where})
                goes_on = [line for line in printed.splitlines() if "continuing" in line]
                print(f"{kind} {where:24} exit {code:3}  {' '.join(goes_on)[:60]}", flush=True)
                met += code == {"kill": -9, "term": 75}[kind]
            code, printed = runs.start(runs.arguments(workdir))
            parts = ["exit", code] if code else runs.differences(runs.result(workdir), expected)
            failed |= bool(parts) or met < 0.7 * len(planned)
            print(
                f"{kind}: {met} of {len(planned)} met the run; differences: {parts or 'none'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
