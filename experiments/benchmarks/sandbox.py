"""Runs per second in the sandbox: python experiments/benchmarks/sandbox.py [--write]

Asked of tier A on two cores: at least 200 trivial runs a second, and 150 with the imports that are
usual in contests. Two worker processes, median of three; --write makes the figures the baseline.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

from prolong_jax.verifiers import sandbox

WORKERS, REPEATS, RUNS = 2, 3, 150
TRIVIAL = "def f(x): return 2 * x"
IMPORTS = (
    "import sys, math, re, random, string, json, functools, itertools, collections, heapq, bisect, "
    f"datetime, decimal, fractions\nfrom typing import List\n{TRIVIAL}"
)
LIMITS = {"A_trivial_per_s": 200.0, "A_imports_per_s": 150.0}


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


def machine() -> str:
    """The CPU model and the number of cores, as a file name."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = f"{model[1] if model else 'unknown cpu'} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="make the figures the baseline")
    write = parser.parse_args().write
    path = Path(__file__).parent / "baselines" / f"sandbox-{machine()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    print(
        f"{machine()}, {WORKERS} workers, median of {REPEATS}; best tier {sandbox.choose_tier(True)}"
    )
    figures, missed = {}, False
    for tier in sandbox.TIERS:
        for name, code in (("trivial", TRIVIAL), ("imports", IMPORTS)):
            key = f"{tier}_{name}_per_s"
            figures[key] = round(measure(tier, code), 1)
            line = f"{key:18} {figures[key]:8.1f}"
            if key in LIMITS:
                missed |= figures[key] < LIMITS[key]
                line += f"   at least {LIMITS[key]:g}"
            print(line + (f"   baseline {known[key]:.1f}" if key in known else ""), flush=True)
    if write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(missed)


if __name__ == "__main__":
    main()
