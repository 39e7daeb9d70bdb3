"""Logic puzzles: extraction, scores of real tasks, junk, and what is our error."""

import time

import pytest

from prolong_jax.verifiers import Status, logic

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
    start = time.monotonic()
    assert logic.last_answer("<answer>" * 200_000) is None
    assert logic.last_answer("<answer>1</answer>" * 100_000) == "1"
    assert time.monotonic() - start < 1.0


def test_scores_are_those_of_the_task():
    reference = {"task": "chain_sum", "entry": SUM}
    assert logic.verify("<think>1</think><answer>2</answer>", reference).score == 1.0
    assert logic.verify("</think><answer>3</answer>", reference).score == 0.0
    assert logic.verify("<think><answer>2</answer>", reference).score == 0.0
    assert logic.verify("</think>2", reference).score == 0.0
    partial = logic.verify("<answer>the answer is 2</answer>", reference)
    assert 0.0 <= partial.score < 1.0 and partial.status == Status.OK


@pytest.mark.parametrize(
    "task", ["spell_backward", "number_filtering", "count_bits", "chain_sum", "countdown", "maze"]
)
def test_oracle_scores_one_and_junk_does_not(task):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=2, seed=1)[0]
    reference = {"task": task, "entry": entry}
    oracle = logic.verify(f"<answer>{entry['answer']}</answer>", reference)
    assert oracle.score == 1.0 and oracle.status == Status.OK
    for junk in ("", "\x00", "[[[", "None", "\ud800", "nan", "-1e999", "x" * 10_000):
        verdict = logic.verify(f"<answer>{junk}</answer>", reference)
        assert verdict.score <= 0.2 and verdict.status == Status.OK, (junk, verdict)


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('touch {0}')",
        "open('{0}', 'w')",
        "(lambda: open('{0}', 'w'))()",
        "[].append(open('{0}', 'w'))",
        "exec('open(chr(47))')",
        "(print)(1)",
    ],
)
def test_answers_are_not_run_as_programs(answer, tmp_path):
    path = tmp_path / "ran"
    reference = {"task": "countdown", "entry": COUNTDOWN}
    verdict = logic.verify(f"<answer>{answer.format(path)}</answer>", reference)
    assert verdict.score == 0.0 and "refused" in verdict.detail
    assert not path.exists()


@pytest.mark.parametrize(
    "answer", ["2*3", "(2 + 3)*4", "x**2/2 + sin(x) + C", "['A', 'B']", "Q _ _\n_ Q _", "1 2\n3 4"]
)
def test_plain_answers_are_no_programs(answer):
    assert not logic.is_program(answer)


@pytest.mark.parametrize(
    "reference",
    [
        {},
        {"task": "no_such_task", "entry": SUM},
        {"task": "chain_sum"},
        {"task": "chain_sum", "entry": {"question": "?"}},
        {"task": "maze", "entry": {"answer": "2"}},
        {"task": "sudoku", "entry": {"answer": "2", "metadata": {}}},
        {"task": "game_of_life_halting", "entry": SUM},
    ],
)
def test_broken_references_are_our_error(reference):
    verdict = logic.verify("<answer>1+1</answer>", reference)
    assert verdict.status == Status.ERROR and verdict.detail


def test_a_scorer_that_raises_on_the_answer_scores_zero():
    def scorer(answer, entry):
        return 1.0 if int(answer) == int(entry["answer"]) else 0.0

    verdict = logic._score(scorer, "junk", {"answer": "2"})
    assert verdict.score == 0.0 and verdict.status == Status.OK and "ValueError" in verdict.detail
    assert logic._score(scorer, "junk", {"answer": "also junk"}).status == Status.ERROR
    assert logic._score(lambda a, e: float("nan"), "2", SUM).status == Status.ERROR
    assert logic._score(lambda a, e: 7, "2", SUM).score == 1.0
