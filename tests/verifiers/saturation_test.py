"""Two workers under more hostile answers than they can bear, and with one of them killed."""

import os
import signal
import time

from prolong_jax.verifiers import Status
from prolong_jax.verifiers.pool import Pool
from tests.verifiers.pool_test import workers

# These pass every guard and hang in sympy, each in another part of it.
HANGING = [
    (r"(x+y+z)^{999}", "x^2+y"),
    (r"\Gamma(10^9)", r"\frac{1}{2}"),
    (r"2^{\binom{100}{50}}", r"\frac{1}{2}"),
    ("*".join(f"({letter}+1)" for letter in "abcdefghjklmnopqrstuvwxyz"), "x^2+y"),
]
REFUSED = [
    ("10**10**10", "42"),
    ("9^{9^{9^9}}", r"\frac{1}{2}"),
    ("(10^9)!", r"\frac{1}{2}"),
    ("(" * 3000 + "1" + ")" * 3000, r"\frac{1}{2}"),
    ("\\boxed{" * 100_000, "42"),
    ("1" + "0" * 100_000, "42"),
    (r"\int_0^1 e^{x^{x}} dx", r"\frac{1}{2}"),
    ("1e999999999", "42"),
    (r"1.6 \times 10^{-19}", r"3.2 \times 10^{-19}"),
    ("42 or 43", "42"),
    ("\x00\ud800", r"\frac{1}{2}"),
    ("((9^{99})^{99})^{99}", "x^2+y"),
    ("9!!!!", "42"),
]
HOSTILE = HANGING + REFUSED * 2 + REFUSED[:2]


def correct(i: int) -> tuple[str, str]:
    """An answer that is equal to its gold in another form; every other one needs sympy."""
    return (rf"\frac{{{i}}}{{4}}", str(i / 4)) if i % 2 else (str(i), f"{i}.0")


def item(answer: str, gold: str):
    return "math", f"</think>\\boxed{{{answer}}}", {"answer": gold}


def test_hostile_answers_do_not_harm_the_correct_ones():
    assert len(HOSTILE) == 32
    with Pool(2, time_limit_s=4.0) as pool:
        pool.check(["math"])
        start = time.monotonic()
        for i in range(32):  # a hostile one in front of two correct ones
            pool.submit(("hostile", i), *item(*HOSTILE[i]))
            pool.submit(("correct", 2 * i), *item(*correct(2 * i)))
            pool.submit(("correct", 2 * i + 1), *item(*correct(2 * i + 1)))
        done = list(pool.as_completed())
        wall_s = time.monotonic() - start
        timeouts = pool.take_metrics()["verify/math/timeouts"]
    verdicts = dict(done)
    print(f"32 hostile and 64 correct answers on 2 workers: {wall_s:.1f} s, {timeouts} timeouts")
    assert len(done) == len(verdicts) == 96
    wrong = {i: verdicts["correct", i] for i in range(64) if verdicts["correct", i].score != 1.0}
    assert not wrong
    hostile = [verdicts["hostile", i] for i in range(32)]
    assert [verdict.score for verdict in hostile] == [0.0] * 32
    hung = len(HANGING)
    assert [verdict.status for verdict in hostile[:hung]] == [Status.TIMEOUT] * hung
    assert {verdict.status for verdict in hostile[hung:]} == {Status.OK}
    assert timeouts == hung


def test_a_killed_worker_costs_no_item():
    others = set(workers())
    with Pool(2, time_limit_s=60.0) as pool:
        pool.check(["math"])
        victim = min(set(workers()) - others)
        for i in range(300):
            pool.submit(i, *item(*correct(i)))
        completed = pool.as_completed()
        done = [next(completed) for _ in range(30)]
        os.kill(victim, signal.SIGKILL)
        done += completed
    assert len(done) == 300 and {i for i, _ in done} == set(range(300))  # none lost, none twice
    assert all(verdict.score == 1.0 for _, verdict in done)
