"""Logic puzzles: extraction, scores of real tasks, junk, and what is our error."""

import copy
import json
import time

import pytest

from prolong_jax.verifiers import Status, Verdict, logic, sandbox, warm_up
from tests.verifiers import logic_table

SUM = {"question": "State the final answer to: 1 + 1 =", "answer": "2", "metadata": {}}
COUNTDOWN = {
    "question": "Use 2, 3 to make 6",
    "answer": "2*3",
    "metadata": {"numbers": [2, 3], "target": 6, "expression": "2*3"},
}


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>1</answer>", "1"),
        ("<answer>1</answer> no <answer>\n2\n</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>a<answer>b</answer>", "a<answer>b"),
        ("<answer></answer>", ""),
        ("</answer>3<answer>", None),
        ("3", None),
    ],
)
def test_the_last_complete_block_counts(text, answer):
    assert logic.last_answer(text) == answer


def test_extraction_is_linear():
    start = time.process_time()
    assert logic.last_answer("<answer>" * 200_000) is None
    assert logic.last_answer("<answer>1</answer>" * 100_000) == "1"
    assert time.process_time() - start < 1.0


def test_scores_are_those_of_the_task():
    reference = {"task": "chain_sum", "entry": SUM}
    assert logic.verify("<think>1</think><answer>2</answer>", reference).score == 1.0
    assert logic.verify("</think><answer>3</answer>", reference).score == 0.0
    assert logic.verify("<think><answer>2</answer>", reference).score == 0.0
    assert logic.verify("</think>2", reference).score == 0.0
    partial = logic.verify("<answer>the answer is 2</answer>", reference)
    assert 0.0 <= partial.score < 1.0 and partial.status == Status.OK


def test_the_warm_up_loads_the_scorers():
    sandbox.close()
    warm_up("logic")
    assert list(sandbox._zygotes) == ["prolong_jax.verifiers.logic"]


def test_an_answer_is_scored_once_and_a_fault_is_not_remembered(monkeypatch):
    reference = {"task": "chain_sum", "entry": {**SUM, "question": "once"}}
    outcomes = [sandbox.Outcome(timed_out=True), sandbox.Outcome(0.25)]
    monkeypatch.setattr(sandbox, "call", lambda *_: outcomes.pop(0))
    assert logic.verify("<answer>2</answer>", reference).score == 1.0, "equal to the reference"
    assert logic.verify("<answer>3</answer>", reference).status == Status.TIMEOUT
    assert [logic.verify("<answer>3</answer>", reference).score for _ in range(3)] == [0.25] * 3
    assert not outcomes


@pytest.mark.parametrize(
    "task", ["spell_backward", "number_filtering", "count_bits", "chain_sum", "countdown", "maze"]
)
def test_oracle_scores_one_and_junk_does_not(task):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=2, seed=1)[0]
    reference = {"task": task, "entry": entry}
    oracle = logic.verify(f"<answer>{entry['answer']}</answer>", reference)
    assert oracle.score == 1.0 and oracle.status == Status.OK
    assert logic._scored(task, entry["answer"], entry) == Verdict(1.0)
    for junk in ("", "\x00", "[[[", "None", "\ud800", "nan", "-1e999", "x" * 10_000):
        verdict = logic.verify(f"<answer>{junk}</answer>", reference)
        assert verdict.score <= 0.2 and verdict.status == Status.OK, (junk, verdict)


POLYNOMIAL = {"answer": "x**2 + 3*x + 2", "metadata": {"source_dataset": "?"}}
INTEGRAL = {"answer": "x**3 + C", "metadata": {"variable": "x", "integrand": "3*x**2"}}


@pytest.mark.parametrize(
    "task, entry, right, wrong",
    [
        ("polynomial_multiplication", POLYNOMIAL, "2 + x**2 + 3*x", "(x + 1)*(x + 2)"),
        ("simple_integration", INTEGRAL, "C + x**3 + 1.5", "x**2 + C"),
        ("intermediate_integration", INTEGRAL, "x*x*x + sqrt(4) + sin(C)**2", "log(x) + C"),
    ],
)
def test_formulas_are_read_but_no_programs(task, entry, right, wrong, tmp_path):
    entry = {"question": "?", **entry}
    assert logic.score_answer(task, right, entry) == 1.0
    forged = [
        "expand((x + 1)*(x + 2))",
        "integrate(3*x**2, x)",
        "Integral(3*x**2)",
        "type('X', (), {'__eq__': lambda a, b: True})()",
        f"__import__('os').system('touch {tmp_path / 'ran'}')",
        f"[open(r'{tmp_path / 'ran'}', 'w')]",
        "S('x**3')",
        "N (x**3)",
        "x**3 if x else x",
        "x.__class__",
        "x**3 # ()\n+ C!",
    ]
    for answer in ["", wrong, *forged]:
        assert logic.score_answer(task, answer, entry) == 0.0, answer
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "answer, score",
    [
        ("2*3", 1.0),
        ("3 * 2", 1.0),
        ("-(-3) * 2", 1.0),
        ("6", 0.0),
        ("2 * 3 * 1", 0.0),
        ("3 + 3", 0.0),
        ("6 # 2, 3", 0.0),
        ("2*3 or 6", None),
        ("2**3 - 2", None),
        ("f(2) * 3", None),
        ("True * 2 * 3", None),
        ("2.0 * 3", None),
        ("3 / (2 - 2)", None),
        ("9**9**9**9", None),
        ("", None),
        ("(" * 3000, None),
        ("1+" * 20_000 + "1", None),
    ],
)
def test_countdown_takes_arithmetic_over_the_given_numbers_only(answer, score):
    if score is None:
        with pytest.raises((ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError)):
            logic.score_answer("countdown", answer, COUNTDOWN)
        score = 0.0
    assert logic.score_answer("countdown", "2*3", COUNTDOWN) == 1.0
    verdict = logic.verify(f"<answer>{answer}</answer>", {"task": "countdown", "entry": COUNTDOWN})
    assert verdict.score == score and verdict.status == Status.OK


@pytest.mark.parametrize(
    "task, gold, scores",
    [
        ("game_of_life_halting", "True", {"True": 1, "False": 0, "maybe": 0, "": 0}),
        ("coin_flip", "0.375", {"3/8": 1, "0.37500": 1, "0": 0, "0.3": 0, "1": 0}),
        ("arc_agi", "1 2\n3 4", {"1 2\n3 4": 1, "1  2 \n3 4": 1, "1 2 3 4": 0, "1 2": 0, "": 0}),
        ("spiral_matrix", "1 2", {"1 2": 1, "[1, 2]": 0, "oracle_answer": 0, "[oracle_answer]": 0}),
        ("game_of_life", "[[0, 1], [1, 0]]", {"[[0, 1], [1, 0]]": 1, "[[0, 0], [0, 0]]": 0}),
        ("game_of_life", "[[0, 1], [1, 0]]", {"[[0,1],[0,0]]": 0.45, "[[1, 1], [1, 1]]": 0.45}),
        ("game_of_life", "[[0, 0], [0, 0]]", {"[[0, 0], [0, 0]]": 1, "[[0, 0], [1, 0]]": 0}),
        ("complex_arithmetic", "3.0 + 4.0i", {"3.0 + 4.0i": 1, "nan": 0, "NaN + nani": 0}),
        ("number_sorting", "[1, 2]", {"[1, 2]": 1, "[NaN, NaN]": 0, '["nan", "nan"]': 0}),
    ],
)
def test_treated_tasks_score_as_the_tables_say(task, gold, scores):
    metadata = {"result": [3.0, 4.0], "direction": "ascending"}
    entry = {"question": "?", "answer": gold, "metadata": metadata}
    found = {answer: logic.score_answer(task, answer, entry) for answer in scores}
    assert found == pytest.approx(scores)


def test_floors_cut_what_is_paid_for_junk_and_no_more():
    entry = {"question": "?", "answer": "2 × 2 × 3", "metadata": {}}
    paid = {"2 × 2 × 3": 1.0, "3 × 2 × 2": 1.0, "12": 0.0, "2 × 6": 0.0, "7": 0.0}
    for answer, score in paid.items():
        assert logic.score_answer("prime_factorization", answer, entry) == score
    words = {"question": "?", "answer": "a b c d", "metadata": {}}
    assert logic.score_answer("sentence_reordering", "a b", words) == 0.0
    assert logic.score_answer("sentence_reordering", "a b d c", words) == 0.5


def test_the_tables_name_tasks_once_and_say_why():
    from reasoning_gym.factory import DATASETS

    for table in (logic.GUARDED, logic.REIMPLEMENTED, logic.FLOORS):
        assert set(table) <= set(DATASETS) - set(logic.EXCLUDED)
        assert all(isinstance(reason, str) and reason for _, reason in table.values())
    assert not set(logic.REIMPLEMENTED) & (set(logic.GUARDED) | set(logic.FLOORS))
    assert all(0 < floor < 1 for floor, _ in logic.FLOORS.values())


TWO = "two answers to choose from"
SMALL = "answers are small numbers, which agree by chance"
NEAR = "pays for a number that is near"
# What a wrong answer may earn in the table test, and why: task -> (probes, reason).
EXCEPTIONS = {
    "circuit_logic": ("zero other", TWO),
    "complex_arithmetic": ("zero other", NEAR),
    "course_schedule": ("other", TWO),
    "game_of_life": ("other", "both boards are dead after one step"),
    "letter_counting": ("other", SMALL),
    "mini_sudoku": ("other", "pays for the cells that agree"),
    "polynomial_equations": ("zero other", NEAR),
    "propositional_logic": ("other", "the premises contradict each other: anything follows"),
    "rectangle_count": ("zero other", NEAR),
    "rotten_oranges": ("other", SMALL),
    "self_reference": ("other", SMALL),
    "shortest_path": ("other", "more than one entry is infeasible"),
    "spell_backward": ("shell list equal", "pays for the letters that agree"),
    "sudoku": ("other", "pays for the cells that agree"),
    "time_intervals": ("other", NEAR),
}
# The library's default scorer pays the share of the right answer in a longer text: no more here.
MAX_SHARE = 0.06
HANGS = {"simple_integration", "intermediate_integration", "polynomial_multiplication"}


def check_table(tasks, tmp_path):
    marker = tmp_path / "ran"
    for task, row in logic_table.table(tasks, marker).items():
        allowed = EXCEPTIONS.get(task, ("", ""))[0].split()
        for probe, verdicts in row.items():
            scores = [verdict.score for verdict in verdicts]
            statuses = {verdict.status for verdict in verdicts}
            where = (task, probe, verdicts)
            if probe in ("oracle", "scorer"):
                assert set(scores) == {1.0}, where
            elif probe not in allowed:
                share = MAX_SHARE if probe in ("shell", "list", "equal") else 0.0
                assert max(scores) <= share, where
            if probe == "power" and task in HANGS:
                assert statuses <= {Status.OK, Status.TIMEOUT}, where
            else:
                assert statuses == {Status.OK}, where
    assert not marker.exists(), "an answer was run as a program"


def test_treated_tasks_pay_for_right_answers_only(tmp_path):
    others = "boxnet chain_sum graph_color knights_knaves propositional_logic rubiks_cube rush_hour"
    others += " prime_factorization calendar_arithmetic"
    check_table([*logic.GUARDED, *logic.REIMPLEMENTED, *others.split()], tmp_path)


@pytest.mark.slow
def test_all_tasks_pay_for_right_answers_only(tmp_path):
    tasks = logic_table.all_tasks()
    assert len(tasks) >= 105 and set(EXCEPTIONS) <= set(tasks)
    check_table(tasks, tmp_path)


@pytest.mark.parametrize(
    "reference",
    [
        {},
        {"task": "no_such_task", "entry": SUM},
        {"task": "chain_sum"},
        {"task": "chain_sum", "entry": {"question": "?"}},
        {"task": "maze", "entry": {"answer": "2"}},
        {"task": "sudoku", "entry": {"answer": "2", "metadata": {}}},
        {"task": "composite", "entry": SUM},
    ],
)
def test_broken_references_are_our_error(reference):
    verdict = logic.verify("<answer>1+1</answer>", reference)
    assert verdict.status == Status.ERROR and verdict.detail


def test_a_scorer_that_raises_on_the_answer_scores_zero():
    entry = {"question": "?", "answer": "2 × 3", "metadata": {}}
    reference = {"task": "prime_factorization", "entry": entry}
    verdict = logic.verify("<answer>two × three</answer>", reference)
    assert verdict.score == 0.0 and verdict.status == Status.OK and "ValueError" in verdict.detail
    broken = {"task": "prime_factorization", "entry": {**entry, "answer": "junk"}}
    assert logic.verify("<answer>two</answer>", broken).status == Status.ERROR


def test_scoring_leaves_the_entry_alone():
    """The scorer of knight_swap writes into the metadata."""
    answer = json.dumps(["w,A1,B1", "B,C1,A1", "w,B1,C1"])
    board = {"A1": ["B1", "C1"], "B1": ["A1", "C1"], "C1": ["A1", "B1"]}
    metadata = {"is_possible": True, "board": board, "start_turn": "w", "solution": [1, 2, 3]}
    metadata["pieces"] = {"A1": "w", "B1": None, "C1": "B"}
    entry = {"question": "?", "answer": answer, "metadata": metadata}
    before = copy.deepcopy(entry)
    verdict = logic.verify(f"<answer>{answer}</answer>", {"task": "knight_swap", "entry": entry})
    assert verdict.score == 1.0 and entry == before
