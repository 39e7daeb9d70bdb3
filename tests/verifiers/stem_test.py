"""Science answers: letters, numbers with units, the fall-back to mathematics."""

import time

import pytest

from prolong_jax.verifiers import Status, stem

OPTIONS = ["N", "J", "W", "V"]


def choose(text: str, gold: str = "B") -> float:
    verdict = stem.verify(text, {"answer": gold, "options": OPTIONS})
    assert verdict.status == Status.OK, verdict
    return verdict.score


def score(answer: str, gold: str, **settings) -> float:
    verdict = stem.verify(f"</think>\\boxed{{{answer}}}", {"answer": gold, **settings})
    assert verdict.status == Status.OK, verdict
    return verdict.score


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{B}",
        r"\boxed{A} no, \boxed{B}",
        r"\boxed{\text{B}}",
        r"\boxed{\mathrm{(B)}}",
        r"\boxed{(B).}",
        "Because.\nAnswer: B",
        "The final answer is (B).\n",
        "<think>A</think>answer is B",
    ],
)
def test_one_letter_is_a_choice(text):
    assert choose(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{A}",
        r"\boxed{B or C}",
        r"\boxed{ABCD}",
        r"\boxed{B, C}",
        r"\boxed{b}",
        r"\boxed{}",
        r"\boxed{C} Answer: B",
        "Answer: B or C",
        "Answer: B\nI am not sure",
        "B",
        "A B C D",
        "<think>Answer: B",
        "",
    ],
)
def test_anything_but_one_letter_is_wrong(text):
    assert choose(text) == 0.0


@pytest.mark.parametrize("gold", ["E", "b", "N", "AB"])
def test_a_gold_letter_without_an_option_is_our_error(gold):
    assert stem.verify(r"\boxed{B}", {"answer": gold, "options": OPTIONS}).status == Status.ERROR


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("84 m", "84 m"),
        ("0.084 km", "84 m"),
        (r"0.084\,\text{km}", "84 m"),
        ("84.5 m", "84 m"),
        (r"1.6 \times 10^{-19} \text{ C}", "1.6e-19 C"),
        (r"1.6e-19", r"1.6 \times 10^{-19}"),
        ("10^{5}", "100000"),
        ("-10^5", "-100000"),
        ("1,234 J", "1.234 kJ"),
        (r"9.8\ \mathrm{m/s^2}", "9.8 m/s^2"),
        (r"9.8 \frac{\text{m}}{\text{s}^{2}}", "9.8 m/s^2"),
        ("9.8 m s^-2", "9.8 m/s^2"),
        ("12 N", "12 kg*m/s^2"),
        (r"5\ \Omega", "5 ohm"),
        (r"25^\circ\text{C}", "298.15 K"),
        (r"3\ \mu\text{m}", "0.003 mm"),
        ("50%", "0.5"),
        (r"\frac{1}{2} m", "50 cm"),
        ("F = 12 N", "12 N"),
        ("12", "12"),
        ("12 N", "12"),
        ("0", "0"),
        ("5 apples", "5 apples"),
        (r"\sqrt{4}", "2"),
        ("x^2+2x+1", "(x+1)^2"),
    ],
)
def test_equal_quantities_score_one(answer, gold):
    assert score(answer, gold) == 1.0


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("84", "84 m"),
        ("84 km", "84 m"),
        ("84 s", "84 m"),
        ("84 blubs", "84 m"),
        ("86 m", "84 m"),
        ("-84 m", "84 m"),
        ("84 m or 85 m", "84 m"),
        (r"3.2 \times 10^{-19} C", "1.6e-19 C"),
        ("5 pears", "5 apples"),
        ("50", "0.5"),
        ("0.001", "0"),
        ("nan", "84"),
        ("inf m", "84 m"),
        ("", "84 m"),
        ("1/0", "84"),
        ("84 m**9**9**9**9", "84 m"),
        ("84 __import__", "84 m"),
    ],
)
def test_other_quantities_score_zero(answer, gold):
    assert score(answer, gold) == 0.0


def test_the_tolerance_is_relative_and_can_be_set():
    assert score("101", "100") == 1.0
    assert score("101", "100", rel_tol=0.001) == 0.0
    assert score("1.2", "1", rel_tol=0.3) == 1.0
    assert score("1.01e-19", "1e-19") == 1.0
    assert score("1.02e-19", "1e-19") == 0.0
    assert stem.verify(r"\boxed{1}", {"answer": "1", "rel_tol": 2}).status == Status.ERROR
    assert stem.verify(r"\boxed{1}", {"answer": "1", "rel_tol": None}).score == 1.0


def test_a_reference_without_an_answer_is_our_error():
    assert stem.verify(r"\boxed{1}", {}).status == Status.ERROR


@pytest.mark.parametrize(
    "answer", ["84 " + "a" * 50_000, "84 " + "a" * 60 + "!", "84 " + "m^2" * 60, "9" * 100_000]
)
def test_long_answers_take_no_time(answer):
    start = time.monotonic()
    score(answer, "84 m")
    assert time.monotonic() - start < 2.0
