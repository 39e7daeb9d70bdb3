"""Mathematical answers: extraction, equality, guards; and agreement with labelled answers."""

import json
import os
import random
import time
from pathlib import Path

import pytest

from prolong_jax.verifiers import Status, Verdict, math
from prolong_jax.verifiers.pool import Pool

SAMPLED = [pytest.param(60, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def score(answer: str, gold: str) -> float:
    verdict = math.verify(f"<think>\\boxed{{9}}</think>So \\boxed{{{answer}}}.", {"answer": gold})
    assert verdict.status == Status.OK, verdict
    return verdict.score


def score_in_pool(requests) -> list[Verdict]:
    with Pool(2, time_limit_s=60.0) as pool:
        return pool.score_all(requests)


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("PROLONG_TEST_DATA")
    if not folder:
        pytest.skip("PROLONG_TEST_DATA is not set")
    return Path(folder)


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
        ("42.0", "42"),
        ("007", "7"),
        ("1,234", "1234"),
        ("1 000 000", "1000000"),
        (r"1\,000\,000", "1000000"),
        ("32{,}348", r"\$32,\!348"),
        (r"11,\! 111", "11111"),
        ("1e-9", "0.000000001"),
        ("2e3", "2000"),
        ("1.5e8", "150000000"),
        (r"1.6 \times 10^{-19}", "1.6e-19"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{2}{4}", r"\frac{1}{2}"),
        (r"\frac 34", "0.75"),
        ("2/3", r"\frac{2}{3}"),
        (r"137 \frac{1}{2}", "137.5"),
        (r"\frac{5}{3}", r"1\frac{2}{3}"),
        ("0.333333", r"\frac{1}{3}"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("10^{10^{10}}", "10^{10^{10}}"),
        ("2^{2024}", "4^{1012}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\binom{10}{3}", "120"),
        ("10!", "3628800"),
        (r"\int x dx", r"\int x\, dx"),
        (r"\dfrac{11}{5} - \dfrac{2}{5}i", r"\frac{11-2i}{5}"),
        ("12i-1", "-1+12i"),
        ("50%", "0.5"),
        ("50", r"50\%"),
        (r"50 \text{ percent}", r"50\%"),
        ("30°", r"30^\circ"),
        ("30", r"30^{\circ}"),
        (r"30 \text{ degrees}", r"30^\circ"),
        ("36", r"\$36"),
        (r"\$36.00", "36"),
        ("5", "x=5"),
        ("x = 5", "5"),
        ("y=2x+1", "2x+1"),
        ("-5x+7y=11z+4", "5x - 7y + 11z + 4 = 0"),
        ("(1,2)", r"\left(1, 2\right)"),
        (r"(-\infty,-4)\cup(-4,2]", r"(-\infty, -4) \cup (-4, 2]"),
        ("[-2,7]", r"x \in [-2,7]"),
        (r"-2 \le x \le 7", "[-2,7]"),
        ("x>2", r"(2,\infty)"),
        (r"(2,\infty)", "x>2"),
        ("3,2,1", r"\{1,2,3\}"),
        (r"x=1 \text{ or } x=-2", "1,-2"),
        (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}"),
        ("(2,15),(-4,27)", "(-4, 27);(2, 15)"),
        ("(x,y)=(3,4)", "(3,4)"),
        (r"\langle 1,2\rangle", r"\langle 1, 2 \rangle"),
        (
            r"\begin{bmatrix} 1/2 \\ 3 \end{bmatrix}",
            r"\begin{pmatrix} \frac{1}{2} \\ 3 \end{pmatrix}",
        ),
        ("Evelyn", r"\text{Evelyn}"),
        (r"\textbf{Friday}", r"\text{Friday}"),
        (r"\text{no solution}", r"\text{no solution}"),
        ("C", r"\text{(C)}"),
        (r"\text{(C)}", "C"),
        ("52_{8}", "52_8"),
        ("52", "52_8"),
        (r"5225 \text{ in}^3", r"5225 \text{ cubic inches}"),
        (r"4 \text{ ft}", r"4\mbox{ feet}"),
        ("20", r"20\text{ days}"),
        (r"240 \text{ ways}", r"240\text{ different ways.}"),
        (r"20 \text{ units}", r"20 \text{ cm}"),
        ("**5**", "5"),
        (r"$\frac{1}{2}$", "0.5"),
        (r"\(\frac{1}{2}\)", r"\frac{1}{2}"),
        ("2", r"\boxed{2}"),
        ("2+3=5", "5"),
        (r"\frac{22}{7}=3.14", "3.14"),
        (r"\approx 42", "42"),
        ("1000 dollars", r"\$1000"),
        (r"\$1000", "1000 dollars"),
        (r"\frac13", r"0.\overline{3}"),
        (r"-0.1\overline{6}", r"-\frac16"),
        (r"0.\overline{3}", r"0.\overline{33}"),
        ("2pi", r"2\pi"),
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
        ("junk", "42"),
        ("\ud800", "42"),
        ("not 41", "42"),
        ("42 or 43", "42"),
        (r"\text{either } 41 \text{ or } 42", "42"),
        ("1 or 2", "1"),
        ("?", "5"),
        ("nan", "5"),
        (r"\infty", "5"),
        (r"\frac{0}{0}", "5"),
        ("x=x", "5"),
        ("0=0", "5x-7y=0"),
        (r"\frac{1}{3}", "0.3"),
        ("0.33", r"\frac{1}{3}"),
        ("1.67", r"\frac{5}{3}"),
        (r"\frac{12}{3}", r"1\frac{2}{3}"),
        ("3.14", r"\pi"),
        ("4.99999", "5"),
        ("100000.9", "100000"),
        ("42000000001", "42000000002"),
        ("1,000", "1"),
        ("1.000", "1000"),
        ("1,5", "1.5"),
        (r"1.6\times 10^{-19}", r"3.2\times 10^{-19}"),
        ("1.6e-19", "3.2e-19"),
        (r"1.6\cdot 10^{-19} C", r"3.2\cdot 10^{-19} C"),
        ("0.00000012", "0.00000034"),
        ("1e-9", "0"),
        ("(0.00000001, 1)", "(0.00000003, 1)"),
        (r"\{0.00000001, 1\}", r"\{0.00000003, 1\}"),
        ("10^{-8}x", "10^{-9}x"),
        (r"5\%", r"50\%"),
        ("0.05", r"50\%"),
        ("500", r"50\%"),
        (r"31^\circ", r"30^\circ"),
        (r"\$37", r"\$36"),
        ("x=6", "5"),
        ("y=5", "x=5"),
        (r"x \neq 5", "5"),
        ("y=2x", "y=2x+1"),
        ("(2,1)", "(1,2)"),
        ("[1,2)", "(1,2]"),
        ("(1,2)", "[1,2]"),
        ("(1,2,3)", "(1,2)"),
        ("x<2", "x>2"),
        (r"x \ge 2", r"(2,\infty)"),
        (r"\{1,2\}", r"\{1,2,3\}"),
        ("1", "1,2"),
        ("1,2", "1"),
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}",
        ),
        ("John", r"\text{Evelyn}"),
        ("yes", "no"),
        (r"\text{B}", r"\text{(C)}"),
        ("A, B, C, D", "C"),
        ("ABCD", "C"),
        ("52_8", "52_9"),
        ("53_8", "52_8"),
        (r"5 \text{ km}", r"5 \text{ m}"),
        ("5 km", "5 m"),
        (r"5 \text{ hours}", r"5 \text{ minutes}"),
        (r"5 \text{ cm}^2", r"5 \text{ cm}^3"),
        (r"\int_0^1 x dx", r"\frac{1}{2}"),
        (r"\sum_{k=1}^{9} k", "45"),
        (r"\boxed{4}, \boxed{5}", "5"),
        ("5x", "5"),
        (r"5 \pm 1", "5"),
        (r"\neq 42", "42"),
        (r"\not= 42", "42"),
        ("≠ 42", "42"),
        ("< 42", "42"),
        ("> 42", "42"),
        (r"\le 42", "42"),
        (r"\geqslant 42", "42"),
        ("6=5", "5"),
        ("6=5=5", "5"),
        ("999 dollars", r"\$1000"),
        (r"0.\overline{4}", r"\frac13"),
        (r"0.3", r"0.\overline{3}"),
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
        "(" * 100 + "1" + ")" * 100,
        "1+" * 100_000 + "1",
        "\\boxed{" * 10_000 + "1" + "}" * 10_000,
    ],
)
def test_hostile_answers_are_refused_before_parsing(answer):
    start = time.process_time()
    verdict = math.verify(f"\\boxed{{{answer}}}", {"answer": r"\frac{1}{2}"})
    assert time.process_time() - start < 0.05
    assert verdict.score == 0.0 and verdict.status == Status.OK and "refused" in verdict.detail


@pytest.mark.parametrize(
    "text", [r"\boxed{1}" * 100_000, r"\boxed{" * 100_000, r"\boxed" + " " * 500_000, "{" * 500_000]
)
def test_extraction_is_linear(text):
    start = time.process_time()
    math.last_boxed(text)
    assert time.process_time() - start < 1.0


def test_responses_with_many_boxes_are_quick():
    for text in (
        r"\boxed{1}" * 100_000,
        r"\boxed{" * 100_000,
        r"\boxed{1}" + r"\boxed{2" * 100_000,
    ):
        start = time.process_time()
        last = math.verify(text, {"answer": "1"})
        assert last.score == float("{1}" in text)
        assert time.process_time() - start < 0.5


def test_odd_text_never_raises():
    """Random strings of fragments: in a worker, an exception would be an ERROR."""
    pieces = r"\frac \sqrt \text \left( \right) \{ \} { } ( ) [ ] ^ _ ! = < , ; & \\ | $ \% + - * / . : 0 7 12"
    pieces += (
        r" 3.5 x y e i \pi \infty \pm \cup \in \sin \log \binom \begin{pmatrix} \end{pmatrix} km \circ"
        " é \x00"
    )
    chooser = random.Random(0)
    texts = [
        "".join(chooser.choices(pieces.split(" "), k=chooser.randint(1, 14))) for _ in range(100)
    ]
    golds = [r"\frac{1}{2}", "x^2+1", r"\{1,2\}", "5 m"]
    requests = [
        (name, f"\\boxed{{{text}}}", {"answer": gold})
        for text, gold in zip(texts, golds * 25, strict=True)
        for name in ("math", "stem")
    ]
    verdicts = score_in_pool(requests)
    assert not [pair for pair in zip(requests, verdicts, strict=True) if pair[1].status == "error"]
    assert sum(verdict.status == Status.TIMEOUT for verdict in verdicts) <= 4


@pytest.mark.parametrize(
    "text, value",
    [
        (r"2\pi", 6.283185307179586),
        ("x", None),
        ("x=5", None),
        ("1, 2", None),
        ("", None),
        ("> 5", None),
        (r"\sqrt{-1}", None),
        (r"\infty", None),
        ("1/0", None),
        (r"\sum_{k=1}^{9} k", None),
        ("9^{9^{9}}", None),
        ("9^{9999}", None),
        ("99999!", None),
        (r"\text{five}", None),
    ],
)
def test_values_of_expressions(text, value):
    assert math.value(text) == value


def test_legitimate_powers_and_factorials_are_parsed():
    for answer in ("2^{2024}", "10!", "(n-1)!", "e^{-x^2}", "(x^2+1)^3", "2^{2^{n}}", "x^{10}+1"):
        assert math.refusal(answer) == "", answer


@pytest.mark.parametrize("reference", [{}, {"answer": None}, {"answer": " "}, {"answer": []}])
def test_a_reference_without_an_answer_is_our_error(reference):
    assert math.verify(r"\boxed{1}", reference).status == Status.ERROR


def test_an_unparsable_gold_is_our_error():
    verdict = math.verify(r"\boxed{1}", {"answer": "9^{9^{9^{9}}}"})
    assert verdict.status == Status.ERROR and "cannot be parsed" in verdict.detail


def test_labelled_model_solutions_of_gsm8k(data):
    """Every solution gets the verdict that the data set's authors gave it."""
    rows = (data / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines()
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


def math_golds(data: Path, every: int) -> list[str]:
    rows = []
    for split in ("train", "test"):
        rows += json.loads((data / "math" / f"{split}_math_math.json").read_text())
    golds = [row["answer"] for row in rows if row["answer"]]
    assert len(golds) == 7970 and len(rows) == 7974
    return golds[::every]


@pytest.mark.parametrize("every", SAMPLED)
def test_gold_answers_of_math_equal_themselves(data, every):
    """In another spelling, so that they are parsed; there are no exceptions."""
    golds = math_golds(data, every)
    items = [("math", f"\\boxed{{\\displaystyle {gold}}}", {"answer": gold}) for gold in golds]
    verdicts = score_in_pool(items)
    assert [gold for gold, told in zip(golds, verdicts, strict=True) if told.score != 1.0] == []


@pytest.mark.parametrize("every", SAMPLED)
def test_gold_answers_of_math_differ_from_others(data, every):
    """The only pair among 7,928 is 27 beside 27 degrees."""
    golds = math_golds(data, every)
    shuffled = golds.copy()
    random.Random(0).shuffle(shuffled)
    pairs = [pair for pair in zip(shuffled, golds, strict=True) if pair[0] != pair[1]]
    items = [("math", f"\\boxed{{{told}}}", {"answer": gold}) for told, gold in pairs]
    verdicts = score_in_pool(items)
    equal = [pair for pair, told in zip(pairs, verdicts, strict=True) if told.score != 0.0]
    assert len(pairs) > 0.95 * len(golds)
    assert len(equal) < 0.002 * len(pairs), equal
    assert {verdict.status for verdict in verdicts} == {Status.OK}


@pytest.mark.parametrize("name", ["aime24", "aime25"])
def test_gold_answers_of_aime(data, name):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(data / "skywork" / f"{name}.parquet").to_pylist()
    golds = [row["reward_model"]["ground_truth"] for row in rows]
    assert len(golds) == 30
    for gold in golds:
        number = int(gold.removesuffix(r"^\circ"))
        assert score(str(number), gold) == score(rf"x = {number}.0", gold) == 1.0
        assert score(str(number + 1), gold) == score(f"{number}0", gold) == 0.0


@pytest.mark.slow  # one of them takes computer algebra five seconds
def test_rewards_of_recorded_rollouts(data):
    """Real responses of a large model, with the reward that their data set's library gave."""
    lines = (data / "nemo_gym" / "math_with_judge__example_rollouts.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        messages = [item for item in row["response"]["output"] if item["type"] == "message"]
        text = messages[-1]["content"][-1]["text"]
        verdict = math.verify(text, {"answer": row["expected_answer"]})
        assert (verdict.status, verdict.score) == (Status.OK, row["library_reward"]), text
    assert len(lines) == 5
