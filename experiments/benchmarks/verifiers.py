"""Throughput of the verifier pool: python experiments/benchmarks/verifiers.py [--write]

Asked of two cores: at least 800 mathematical verifications a second on GSM8K answers, and less than
1 ms of wall time per trivial item. Prints each figure (the median of three runs) beside the limit
and the baseline of this kind of machine in baselines/; --write makes the figures the baseline. The
answers are those of GSM8K's labelled model solutions in the folder PROLONG_TEST_DATA, else made up.
"""

import argparse
import json
import os
import random
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from prolong_jax.verifiers.pool import Pool, Request

WORKERS = 2
RUNS = 3
BASELINES = Path(__file__).parent / "baselines"
LIMITS = {  # name: (at least or at most, the number)
    "gsm8k_per_s": ("at least", 800.0),
    "overhead_ms": ("at most", 1.0),
}


def machine() -> str:
    """The CPU model and the number of cores, as a file name."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    name = f"{model[1] if model else 'unknown cpu'} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def math_request(answer: str, gold: str) -> Request:
    return "math", f"<think>So it is {answer}.</think>\\boxed{{{answer}}}", {"answer": gold}


def gsm8k_requests() -> list[Request]:
    """Answers of models with their golds, a bit less than half of them equal."""
    folder = os.environ.get("PROLONG_TEST_DATA")
    if not folder:
        chooser = random.Random(0)
        golds = [chooser.randint(1, 2000) for _ in range(5276)]
        return [math_request(f"{gold + chooser.choice([0, 1, 3]):,}", str(gold)) for gold in golds]
    path = Path(folder) / "gsm8k" / "example_model_solutions.jsonl"
    requests = []
    for row in map(json.loads, path.read_text().splitlines()):
        gold = row["ground_truth"].rpartition("A: ")[2]
        solutions = [told["solution"] for told in row.values() if isinstance(told, dict)]
        requests += [math_request(text.rpartition("\nA: ")[2], gold) for text in solutions]
    return requests


def symbolic_requests() -> list[Request]:
    """Pairs that only computer algebra can compare, half of them equal."""
    return [
        math_request(
            rf"\frac{{{i}+\sqrt{{2}}}}{{{i + 1}}}", rf"1-\frac{{{1 + i % 2}-\sqrt{{2}}}}{{{i + 1}}}"
        )
        for i in range(1, 401)
    ]


def seconds(pool: Pool, requests: list[Request], expected_ones: int | None = None) -> float:
    """The median wall time of scoring the requests."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        verdicts = pool.score_all(requests)
        times.append(time.perf_counter() - start)
        ones = sum(verdict.score for verdict in verdicts)
        if {verdict.status for verdict in verdicts} != {"ok"} or ones != (expected_ones or ones):
            raise ValueError(f"{ones:g} of {len(verdicts)} score 1, expected {expected_ones}.")
    return statistics.median(times)


def measure() -> dict[str, float]:
    gsm8k, symbolic = gsm8k_requests(), symbolic_requests()
    trivial = [math_request("7", "7")] * 5000
    with Pool(WORKERS, time_limit_s=60.0) as pool:
        pool.check(["math"])
        pool.score_all(gsm8k[:200] + symbolic[:50])
        return {
            "gsm8k_per_s": len(gsm8k) / seconds(pool, gsm8k),
            "symbolic_per_s": len(symbolic) / seconds(pool, symbolic, len(symbolic) // 2),
            "overhead_ms": 1000 * seconds(pool, trivial, len(trivial)) / len(trivial),
        }


def report(figures: Mapping[str, float], baseline: Mapping[str, float]) -> bool:
    """Prints a line per figure; says whether all keep their limits."""
    kept = True
    for name, figure in figures.items():
        line = f"{name:16} {figure:10.3f}"
        if name in LIMITS:
            kind, limit = LIMITS[name]
            good = figure >= limit if kind == "at least" else figure <= limit
            kept = kept and good
            line += f"   {kind} {limit:g}: {'kept' if good else 'MISSED'}"
        if name in baseline:
            line += f"   baseline {baseline[name]:.3f}, x{figure / baseline[name]:.2f}"
        print(line)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the figures the baseline")
    write = parser.parse_args().write
    path = BASELINES / f"{machine()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    print(f"{machine()}, {WORKERS} workers, median of {RUNS}")
    figures = measure()
    kept = report(figures, known.get("verifiers", {}))
    if write:
        rounded = {name: float(f"{figure:.4g}") for name, figure in figures.items()}
        path.write_text(json.dumps(known | {"verifiers": rounded}, indent=2) + "\n")
    raise SystemExit(0 if kept else 1)


if __name__ == "__main__":
    main()
