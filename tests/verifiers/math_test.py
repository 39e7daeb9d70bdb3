"""Mathematical answers: extraction, equality, guards; and agreement with labelled answers."""

import json
import os
import time
from pathlib import Path

import pytest

from prolong_jax.verifiers import Status, math


def score(answer: str, gold: str) -> float:
    verdict = math.verify(f"<think>\\boxed{{9}}</think>So \\boxed{{{answer}}}.", {"answer": gold})
    assert verdict.status == Status.OK, verdict
    return verdict.score


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"{ \boxed{3}", "3"),
        (r"\boxed{1, \boxed{2}}", r"1, \boxed{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}", None),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_the_last_complete_box_counts(text, content):
    assert math.last_boxed(text) == content


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("42", "42"),
        ("1,234", "1234"),
        ("42.0", "42"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{2}{4}", r"\frac{1}{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("10^{10^{10}}", "10^{10^{10}}"),
        (r"1.6 \times 10^{-19}", r"1.6\times 10^{-19}"),
        ("2^{2024}", "4^{1012}"),
        ("(1,2)", "(1, 2)"),
    ],
)
def test_equal_answers_score_one(answer, gold):
    assert score(answer, gold) == 1.0


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("43", "42"),
        ("420", "42"),
        ("", "42"),
        ("41, 42", "42"),
        (r"\frac{1}{3}", "0.3"),
        (r"1.6\times 10^{-19}", r"3.2\times 10^{-19}"),
        ("0.00000012", "0.00000034"),
        ("42000000001", "42000000002"),
        ("junk", "42"),
        ("\ud800", "42"),
    ],
)
def test_other_answers_score_zero(answer, gold):
    assert score(answer, gold) == 0.0


def test_only_the_text_after_thinking_counts():
    assert math.verify(r"<think>\boxed{42}</think>I do not know", {"answer": "42"}).score == 0.0
    assert math.verify(r"<think>\boxed{42}", {"answer": "42"}).score == 0.0
    assert math.verify(r"<think></think>\boxed{42}", {"answer": "42"}).score == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "10**10**10",
        "9^{9^{9^9}}",
        "9^{999999999}",
        "9^{999*999*999}",
        "((9^{99})^{99})^{99}",
        "x^{9^{9^9}}",
        "(10^9)!",
        "99999!",
        "9!!",
        "2^{100!}",
        "1e999999999",
        "(" * 3000 + "1" + ")" * 3000,
        "(" * 400 + "1" + ")" * 400,
        "1+" * 100_000 + "1",
        "\\boxed{" * 10_000 + "1" + "}" * 10_000,
    ],
)
def test_hostile_answers_are_refused_before_parsing(answer):
    start = time.monotonic()
    verdict = math.verify(f"\\boxed{{{answer}}}", {"answer": r"\frac{1}{2}"})
    assert verdict.score == 0.0 and verdict.status == Status.OK and "refused" in verdict.detail
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    "text", [r"\boxed{1}" * 100_000, r"\boxed{" * 100_000, r"\boxed" + " " * 500_000, "{" * 500_000]
)
def test_extraction_is_linear(text):
    start = time.monotonic()
    math.last_boxed(text)
    assert time.monotonic() - start < 2.0


def test_legitimate_powers_and_factorials_are_parsed():
    for answer in ("2^{2024}", "10!", "(n-1)!", "e^{-x^2}", "(x^2+1)^3", "2^{2^{n}}", "x^{10}+1"):
        assert math.refusal(answer) == "", answer


@pytest.mark.parametrize("reference", [{}, {"answer": None}, {"answer": " "}, {"answer": []}])
def test_a_reference_without_an_answer_is_our_error(reference):
    assert math.verify(r"\boxed{1}", reference).status == Status.ERROR


def test_an_unparsable_gold_is_our_error():
    verdict = math.verify(r"\boxed{1}", {"answer": "9^{9^{9^{9}}}"})
    assert verdict.status == Status.ERROR and "cannot be parsed" in verdict.detail


def test_labelled_model_solutions_of_gsm8k():
    """Every solution gets the verdict that the data set's authors gave it."""
    folder = os.environ.get("PROLONG_TEST_DATA")
    if not folder:
        pytest.skip("PROLONG_TEST_DATA is not set")
    rows = (Path(folder) / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines()
    checked = 0
    for row in map(json.loads, rows):
        gold = row["ground_truth"].rpartition("A: ")[2]
        for model in (key for key in row if isinstance(row[key], dict)):
            told = row[model]["solution"].rpartition("\nA: ")[2]
            response = f"</think>\\boxed{{{told}}}"
            verdict = math.verify(response, {"answer": gold})
            assert (verdict.score == 1.0) == row[model]["is_correct"], (row[model], gold)
            checked += 1
    assert checked == 4 * len(rows) > 2000
