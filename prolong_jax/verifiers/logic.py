"""Logic puzzles: the scorers of reasoning_gym on the last `<answer>` block; continuous.

Extraction: `<answer>...</answer>` blocks are read from left to right in the final answer text; the
last complete one counts.

The reference's own answer scores 1; every other one is scored once and remembered.

Some of the library's scorers evaluate the answer, pay for anything, or take long over it. The tables
below say task by task what is done about it and why; every other task is scored by the library as
it is. `score_answer` gets the answer in a confined process with a time limit.

A scorer that raises on the answer gives score 0. It is an ERROR, ours, if it raises on the
reference's own answer too.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from prolong_jax.verifiers import Status, Verdict, error, final_answer_text, remembered, sandbox

PROMPT_SUFFIX = (
    "Let's think step by step and provide the answer in the following format:\n"
    "<answer>answer here</answer>\n"
    "Do not explain your reasoning inside the answer tags, provide only the final answer. "
    "When an example is provided, you should strictly follow the format of the output/answer "
    "in that example."
)
_EXAMPLE_ENTRY = {"answer": "2*3", "metadata": {"numbers": [2, 3], "target": 6}}
TIME_LIMIT_S = 5.0  # of a scorer
_cache: dict[bytes, Verdict] = {}  # of task, answer and entry: a group's responses often agree
# Not the reference's own answer, which needs no scorer.
EXAMPLE = ("</think><answer>3*2</answer>", {"task": "countdown", "entry": _EXAMPLE_ENTRY})
PRELOAD = ("reasoning_gym",)  # modules that a confined process should find loaded
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


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
    """The score of the last `<answer>` block for the entry of a task.

    Args:
      response: any text.
      reference: {"task": name in reasoning_gym, "entry": an item of it, as JSON}.

    Returns:
      A score in [0, 1]; ERROR for an unknown or excluded task and an entry that cannot be read.
    """
    task, entry = reference.get("task"), reference.get("entry")
    if not isinstance(task, str) or not isinstance(entry, Mapping):
        return error("logic: expected a task name and an entry in the reference")
    if "answer" not in entry or not isinstance(entry.get("metadata"), Mapping):
        return error("logic: expected an entry with an answer and metadata")
    if task in EXCLUDED:
        return error(f"logic: task {task} is excluded: {EXCLUDED[task]}")
    answer = last_answer(final_answer_text(response))
    if answer is None:
        return Verdict(0.0, detail="no complete <answer> block")
    if answer and answer == str(entry["answer"]).strip():
        return Verdict(1.0, detail="the reference's own answer")
    return remembered(_cache, [task, answer, entry], lambda: _verify(task, answer, entry))


def _verify(task: str, answer: str, entry: Mapping[str, Any]) -> Verdict:
    verdict = _scored(task, answer, entry)
    if verdict.status == Status.ERROR:
        if _scored(task, entry["answer"], entry).status != Status.ERROR:
            return Verdict(0.0, detail=verdict.detail)
    return verdict


def _scored(task: str, answer: str, entry: Mapping[str, Any]) -> Verdict:
    """The verdict of `score_answer` in the sandbox; ERROR if it raises."""
    arguments = [task, answer, dict(entry)]
    outcome = sandbox.call(f"{__name__}:score_answer", arguments, TIME_LIMIT_S)
    if outcome.timed_out:
        return Verdict(0.0, Status.TIMEOUT, f"the scorer took more than {TIME_LIMIT_S:g} s")
    if outcome.raised is not None:
        return error(f"logic: {': '.join(outcome.raised)[:200]}")
    return error(f"logic: {outcome.failed}") if outcome.failed else Verdict(outcome.value)


def score_answer(task: str, answer: str, entry: dict[str, Any]) -> float:
    """The score in [0, 1] of an answer, by the tables of this module and the library's scorer.

    May hang and may raise anything: call it in a process that can be killed.
    """
    if task in GUARDED and not GUARDED[task][0].fullmatch(answer):
        return 0.0
    scorer = REIMPLEMENTED[task][0] if task in REIMPLEMENTED else _library_scorer(task)
    score = float(scorer(answer, entry))
    if math.isnan(score):
        raise ValueError("the scorer gave no number")
    floor, _ = FLOORS.get(task, (0.0, ""))
    return min(1.0, score) if score > floor else 0.0


@cache
def _library_scorer(task: str) -> Callable[..., Any]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def _same_text(answer: str, entry: Mapping[str, Any]) -> bool:
    return answer in entry["metadata"].get("valid_answers", [entry["answer"].strip()])


def _same_board(answer: str, entry: Mapping[str, Any]) -> bool:
    ours, gold = ([row.split() for row in text.splitlines()] for text in (answer, entry["answer"]))
    return ours == gold


def _live_cells(answer: str, entry: Mapping[str, Any]) -> float:
    """1 for equal boards, else 0.9 times the live cells of both over the live cells of either."""
    ours, gold = json.loads(answer), json.loads(entry["answer"])
    if ours == gold:
        return 1.0
    ours, gold = (
        {(i, j) for i, row in enumerate(board) for j, cell in enumerate(row) if cell}
        for board in (ours, gold)
    )
    return 0.9 * len(ours & gold) / max(1, len(ours | gold))


def _near_fraction(answer: str, entry: Mapping[str, Any]) -> bool:
    ours, gold = (Fraction(text.replace(",", "")) for text in (answer, entry["answer"]))
    return abs(ours - gold) <= Fraction(1, 10_000)


def _makes_24(answer: str, entry: Mapping[str, Any]) -> bool:
    return _arithmetic(answer, entry["metadata"]["numbers"]) == 24


def _makes_target(answer: str, entry: Mapping[str, Any]) -> bool:
    return _arithmetic(answer, entry["metadata"]["numbers"]) == entry["metadata"]["target"]


def _arithmetic(text: str, numbers: list[int]) -> Fraction | None:
    """The value of an expression of + - * / over exactly these whole numbers; None with others.

    Raises:
      ValueError, SyntaxError, ArithmeticError, RecursionError: anything else.
    """
    tree = ast.parse(text, mode="eval")
    used: list[Any] = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    value = _value(tree.body)
    return value if sorted(used) == sorted(numbers) else None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=number) if type(number) is int:
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left), _value(right))
    raise ValueError("more than arithmetic")


EXCLUDED = {"composite": "it is a container of other tasks, which are named themselves"}

# An answer that does not match as a whole scores 0. So does the entry's own answer where it is an
# unevaluated Integral (one in twelve of intermediate_integration); its closed form scores 1.
_FORMULA = re.compile(
    r"(?:[\d\s.+\-*/()]|\b(?:[A-Za-z](?!\s*\()|pi|exp|log|ln|sqrt|Abs|a?(?:sin|cos|tan)h?)\b)*"
)
_NO_NAN = re.compile(r"[^nN]*")
_SYMPY = "its scorer runs the answer as Python with sympy, which solves the task or forges equality"
GUARDED = {
    "simple_integration": (_FORMULA, _SYMPY),
    "intermediate_integration": (_FORMULA, _SYMPY),
    "polynomial_multiplication": (_FORMULA, _SYMPY),
    "complex_arithmetic": (_NO_NAN, "its scorer pays full marks for the number nan"),
    "number_sorting": (_NO_NAN, "its scorer pays full marks for a list of NaN"),
}

_EVAL = (
    "its scorer runs the answer as Python, for a tenth to half of the marks; the text has to match"
)
_JSON = "its scorer compares with tuples, which JSON makes lists, and pays 0.05 for any board"
REIMPLEMENTED = {
    "arc_agi": (_same_board, _JSON),
    "rearc": (_same_board, _JSON),
    "binary_matrix": (_same_text, _EVAL),
    "n_queens": (_same_text, _EVAL),
    "spiral_matrix": (_same_text, _EVAL),
    "string_insertion": (_same_text, _EVAL),
    "game_of_life_halting": (_same_text, "its scorer pays full marks for any text"),
    "game_of_life": (_live_cells, "its scorer pays 0.9 for an empty board, as most cells are dead"),
    "coin_flip": (_near_fraction, "its scorer pays full marks for a first digit that is right"),
    "countdown": (_makes_target, "its scorer runs the answer as Python and pays 0.05 for a number"),
    "puzzle24": (_makes_24, "its scorer runs the answer as Python, and any four numbers will do"),
}

# Scores up to the number are 0.
_ANY = "pays 0.01 for any text"
_FORM = "pays 0.01 for any answer of the right form"
FLOORS = {
    "advanced_geometry": (0.05, "pays 0.01 for any text and 0.05 for any number"),
    "boxnet": (0.05, "pays 0.05 for an empty plan"),
    "calendar_arithmetic": (0.1, "pays 0.1 for any weekday"),
    "codeio": (0.01, _FORM),
    "color_cube_rotation": (0.01, _ANY),
    "cryptarithm": (0.01, _FORM),
    "emoji_mystery": (0.01, _ANY),
    "figlet_font": (0.3, "pays 0.1 for each letter that happens to be in its place"),
    "fraction_simplification": (0.1, "pays 0.01 for any text and 0.1 for the fraction as it was"),
    "graph_color": (0.01, _FORM),
    "group_anagrams": (0.01, _FORM),
    "gsm_symbolic": (0.01, _FORM),
    "jugs": (0.01, _FORM),
    "knight_swap": (0.05, "pays 0.05 for no moves"),
    "palindrome_generation": (0.05, "pays 0.02 for any text and 0.05 for a single letter"),
    "pool_matrix": (0.1, "pays 0.1 for any matrix of the right size"),
    "power_function": (0.01, _ANY),
    "prime_factorization": (0.5, "pays 0.5 for the number itself"),
    "propositional_logic": (0.25, "pays 0.05 for any formula and 0.25 for a tautology or a word"),
    "rubiks_cube": (
        0.95,
        "pays for every sticker in place after any move, though none was put there",
    ),
    "rush_hour": (0.01, _ANY),
    "sentence_reordering": (0.05, "pays 0.05 for any text"),
    "tower_of_hanoi": (0.05, "pays 0.05 for a single move"),
    "tsumego": (0.05, "pays 0.01 for any text and 0.05 for any point"),
    "word_sorting": (0.2, "pays 0.2 for the words as they were"),
}
