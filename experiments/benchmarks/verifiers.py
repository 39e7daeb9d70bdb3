"""Throughput of the verifier pool: python -m experiments.benchmarks.verifiers [--write]

Asked of two cores: at least 800 mathematical verifications a second on GSM8K answers, and less than
1 ms of wall time per trivial item. Prints each figure (the median of three runs) beside the limit
and the baseline of this kind of machine in baselines/; --write makes the figures the baseline. The
answers are those of GSM8K's labelled model solutions in the folder PROLONG_TEST_DATA, else made up.
"""

import json
import os
import random
import statistics
import time
from pathlib import Path

from experiments.benchmarks.common import machine, report, wants_to_write
from prolong_jax.verifiers.pool import Pool, Request

WORKERS = 2
RUNS = 3
LIMITS = {
    "gsm8k_per_s": ("at least", 800.0),
    "overhead_ms": ("at most", 1.0),
}


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


def main() -> None:
    write = wants_to_write(__doc__)
    print(f"{machine()}, {WORKERS} workers, median of {RUNS}")
    raise SystemExit(0 if report("verifiers", measure(), LIMITS, write) else 1)


if __name__ == "__main__":
    main()
