"""Runs per second in the sandbox: python -m experiments.benchmarks.sandbox [--write]

Asked of tier A on two cores: at least 200 trivial runs a second, and 150 with the imports that are
usual in contests. Two worker processes, median of three; --write makes the figures the baseline.
"""

import multiprocessing
import statistics
import time
from multiprocessing.synchronize import Barrier

from experiments.benchmarks.common import machine, report, wants_to_write
from prolong_jax.verifiers import sandbox

WORKERS, REPEATS, RUNS = 2, 3, 150
TRIVIAL = "def f(x): return 2 * x"
IMPORTS = (
    "import sys, math, re, random, string, json, functools, itertools, collections, heapq, bisect, "
    f"datetime, decimal, fractions\nfrom typing import List\n{TRIVIAL}"
)
LIMITS = {"A_trivial_per_s": ("at least", 200.0), "A_imports_per_s": ("at least", 150.0)}


def work(tier: str, code: str, ready: Barrier) -> None:
    """One worker: warms up, then all measurements, each between two barriers."""
    sandbox.use_tier(tier)
    sandbox.run_program(code, [[1]], "f", 60.0)
    for _ in range(REPEATS):
        ready.wait()
        for number in range(RUNS):
            if sandbox.run_program(code, [[number]], "f", 60.0).values != {0: 2 * number}:
                raise ValueError(f"tier {tier} does not run {code!r}")
        ready.wait()


def measure(tier: str, code: str) -> float:
    """Runs per second of all workers together."""
    context = multiprocessing.get_context("spawn")
    ready, rates = context.Barrier(WORKERS + 1), []
    workers = [context.Process(target=work, args=(tier, code, ready)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for _ in range(REPEATS):
        ready.wait(120)
        start = time.perf_counter()
        ready.wait(120)
        rates.append(WORKERS * RUNS / (time.perf_counter() - start))
    for worker in workers:
        worker.join()
    return statistics.median(rates)


def main() -> None:
    write = wants_to_write(__doc__)
    best = sandbox.choose_tier(allow_rlimits_only=True)
    print(f"{machine()}, {WORKERS} workers, median of {REPEATS}; best tier {best}", flush=True)
    programs = {"trivial": TRIVIAL, "imports": IMPORTS}
    figures = {
        f"{tier}_{name}_per_s": measure(tier, code)
        for tier in sandbox.TIERS
        for name, code in programs.items()
    }
    raise SystemExit(0 if report("sandbox", figures, LIMITS, write) else 1)


if __name__ == "__main__":
    main()
