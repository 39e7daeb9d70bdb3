"""Logic puzzles: the scorers of reasoning_gym on the last `<answer>` block; continuous.

Extraction: `<answer>...</answer>` blocks are read from left to right in the final answer text; the
last complete one counts. Some scorers evaluate the answer as Python or sympy text, so an answer to
those is refused when it holds anything but a plain expression; still, this runs only inside a
worker of the pool, which kills what hangs.

A scorer that raises on the answer gives score 0. It is an ERROR, ours, if it raises on the
reference's own answer too.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from prolong_jax.verifiers import Verdict, error, final_answer_text

PROMPT_SUFFIX = (
    "Let's think step by step and provide the answer in the following format:\n"
    "<answer>answer here</answer>\n"
    "Do not explain your reasoning inside the answer tags, provide only the final answer. "
    "When an example is provided, you should strictly follow the format of the output/answer "
    "in that example."
)
_EXAMPLE_ENTRY = {"question": "State the final answer to: 1 + 1 =", "answer": "2", "metadata": {}}
EXAMPLE = ("</think><answer>2</answer>", {"task": "chain_sum", "entry": _EXAMPLE_ENTRY})

# These scorers run the answer through eval or sympy's parse_expr.
EVALUATING = frozenset(
    "countdown puzzle24 simple_integration intermediate_integration polynomial_multiplication "
    "n_queens string_insertion spiral_matrix binary_matrix".split()
)
REFUSED = {
    "game_of_life_halting": "its scorer pays full marks for any text",
    "puzzle24": "its scorer does not check which numbers are used",
}
_FUNCTIONS = frozenset("sin cos tan asin acos atan sinh cosh tanh exp log ln sqrt Abs".split())
_ATTRIBUTE = re.compile(r"[\w)\]'\"]\s*+\.\s*+[A-Za-z_]")
_WORD = re.compile(r"[^\W\d]\w*+")


def last_answer(text: str) -> str | None:
    """The content of the last complete `<answer>...</answer>`, stripped, or None; linear time."""
    found, position = None, 0
    while (start := text.find("<answer>", position)) >= 0:
        start += len("<answer>")
        end = text.find("</answer>", start)
        if end < 0:
            break
        found, position = text[start:end].strip(), end + len("</answer>")
    return found


def verify(response: str, reference: Mapping[str, Any]) -> Verdict:
    """The score that the task's own scorer gives, clipped to [0, 1].

    Status ERROR for an unknown or refused task and for an entry that its scorer cannot read.
    """
    task, entry = reference.get("task"), reference.get("entry")
    if not isinstance(task, str) or not isinstance(entry, Mapping):
        return error("logic: expected a task name and an entry in the reference")
    if "answer" not in entry or not isinstance(entry.get("metadata"), Mapping):
        return error("logic: expected an entry with an answer and metadata")
    if task in REFUSED:
        return error(f"logic: task {task} is refused: {REFUSED[task]}")
    try:
        scorer = _scorer(task)
    except ValueError as problem:
        return error(f"logic: {problem}")
    answer = last_answer(final_answer_text(response))
    if answer is None:
        return Verdict(0.0, detail="no complete <answer> block")
    if task in EVALUATING and is_program(answer):
        return Verdict(0.0, detail="refused: more than a plain expression")
    return _score(scorer, answer, dict(entry))


def is_program(answer: str) -> bool:
    """Whether an answer is more than plain mathematics, digits, words and lists.

    Refused: a dunder, a colon (lambda, walrus), a brace (format strings), attribute access, and
    any word beside round brackets other than a one-letter name or an elementary function.
    """
    if "__" in answer or ":" in answer or "{" in answer or _ATTRIBUTE.search(answer):
        return True
    words = {word for word in _WORD.findall(answer) if len(word) > 1}
    return "(" in answer and not words <= _FUNCTIONS


@cache
def _scorer(task: str) -> Callable[..., Any]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def _score(scorer: Callable[..., Any], answer: str, entry: dict[str, Any]) -> Verdict:
    try:
        score = scorer(answer, entry)
    except Exception as problem:  # whatever a scorer does with junk
        return _after_exception(scorer, entry, problem)
    if not isinstance(score, (int, float)) or math.isnan(score):
        return error(f"logic: the scorer returned {score!r}")
    return Verdict(min(1.0, max(0.0, float(score))))


def _after_exception(
    scorer: Callable[..., Any], entry: dict[str, Any], problem: Exception
) -> Verdict:
    detail = f"scorer raised {type(problem).__name__}: {str(problem)[:200]}"
    try:
        scorer(entry["answer"], entry)
    except Exception:  # the entry is broken, not the answer
        return error(f"logic: {detail}, on the entry's own answer too")
    return Verdict(0.0, detail=detail)
