r"""Mathematical answers: math-verify behind guards; binary.

Extraction: the last `\boxed{...}` with balanced braces in the final answer text (of nested boxes
the outer one). Nothing else counts as an answer.

Equality is math-verify's, with these corrections: whole numbers are compared exactly and decimals
to a relative 1e-5 (it rounds to six places); units that pint knows must be the same where both
sides name one, and all other words behind a number are remarks; of numerals with a base ("52_8")
the bases count; an integral, sum, product or limit is no answer unless the reference has one, nor
is a number behind an inequality sign, or an equation of two numbers that differ.

No alarm is set here: what slips through the guards runs until the pool of workers kills it.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import isfinite, prod
from typing import Any

from prolong_jax.verifiers import Verdict, error, final_answer_text

PROMPT_SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
EXAMPLE = (r"</think>\boxed{\frac{2}{4}}", {"answer": r"\frac{1}{2}"})

MAX_CHARS = 500  # of an answer
MAX_DEPTH = 20  # of brackets
MAX_EXPONENT = 10_000
MAX_FACTORIAL = 1000
SMALL = 1e-3  # below, math-verify's rounding to six decimals is too coarse
RELATIVE_TOLERANCE = 1e-5
EQUATED_TOLERANCE = 5e-3  # of the two sides of an answer such as "22/7 = 3.14"

_BOX_TOKEN = re.compile(r"\\boxed\s*+\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(
    r"[+-]?(?=\.?[0-9])(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)|[0-9]*)"
    r"(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?"
)
_POWER_OF_TEN = re.compile(r"\s*\\(?:times|cdot)\s*10\^(?:\{([+-]?[0-9]{1,3})\}|([0-9]))$")
_BASED = re.compile(r"(-?[0-9A-Z]+)_\{?([0-9]{1,2})\}?")
_UNIT = re.compile(
    r"(?:[0-9}]\s*\\(?:text|mbox|textnormal|mathrm|rm)\s*\{|^[-+0-9.,]+(?:\s|\\[ ,]))\s*+"
    r"([A-Za-z]+(?: [A-Za-z]+)?)\s*+\}?(?:\s*+\^\{?([0-9])\}?)?$"
)
_UNEVALUATED = re.compile(r"\\(?:i{1,3}nt|oint|sum|prod|lim)(?![A-Za-z])")
_INEQUALITY = re.compile(r"[<>≠≤≥]|\\(?:not|neq?|[lg]eq?|[lg]eqslant|[lg]t)(?![A-Za-z])")
_REPEATING = re.compile(
    r"(?<![0-9])([0-9]{0,9})\.([0-9]{0,9})\\(?:overline|bar)\s*\{([0-9]{1,9})\}(?!_)"
)
_SPELLINGS = [  # what math-verify misreads, and how it reads it
    (re.compile(r"\\!\s*|(?<=[0-9])\\[,:](?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])i(?![A-Za-z])"), " i"),
    (re.compile(r"°"), r"^\\circ"),
    (re.compile(r"−"), "-"),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])|π"), r"\\pi "),
    (re.compile(r"(?<=[0-9])\s*dollars?$"), ""),
]
_NO_ALARM: Any = None  # the library annotates the setting as int, and documents None
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LITERAL = re.compile(r"[0-9]+")


def last_boxed(text: str) -> str | None:
    r"""The content of the `\boxed{...}` that closes last, or None; linear time."""
    opened: list[tuple[int, bool]] = []  # where the content starts, whether it is a box
    found = None
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            found = (start, token.start()) if is_box else found
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.end(), token[0] != "{"))
    return None if found is None else text[found[0] : found[1]]


def verify(response: str, reference: Mapping[str, Any]) -> Verdict:
    r"""Score 1 if the last complete box equals `reference["answer"]`, else 0.

    Status ERROR if the reference has no answer that can be parsed.
    """
    gold = reference.get("answer")
    if not isinstance(gold, (str, int, float)) or not str(gold).strip():
        return error(f"math: expected an answer in the reference, got {gold!r}")
    answer = last_boxed(final_answer_text(response))
    if answer is None:
        return Verdict(0.0, detail="no complete \\boxed{}")
    return compare(answer, str(gold))


def compare(answer: str, gold: str) -> Verdict:
    """Score 1 if the two expressions are equal, else 0; plain numbers without sympy.

    What would take too long to evaluate is refused before it is parsed (score 0).
    """
    answer, gold = _strip(answer), _strip(gold)
    if not answer:
        return Verdict(0.0, detail="empty answer")
    told, true = _plain_number(answer), _plain_number(gold)
    if answer == gold or (true is None and answer.replace(" ", "") == gold.replace(" ", "")):
        return Verdict(1.0)
    if told is not None and true is not None:
        slack = 0 if true.denominator == 1 else Fraction(RELATIVE_TOLERANCE) * abs(true)
        return Verdict(float(abs(told - true) <= slack))
    numerals = _BASED.fullmatch(answer), _BASED.fullmatch(gold)
    if numerals[0] and numerals[1]:
        return Verdict(float(numerals[0].groups() == numerals[1].groups()))
    reason = refusal(answer)
    if not reason and _UNEVALUATED.search(answer) and not _UNEVALUATED.search(gold):
        reason = "not evaluated"
    if reason:
        return Verdict(0.0, detail=f"refused: {reason}")
    return _compare_symbolic(answer, gold)


def _strip(text: str) -> str:
    text = text.strip().strip("*").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$").strip()
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _REPEATING.sub(_fraction, text).removesuffix(".")


def _fraction(found: re.Match[str]) -> str:
    """The fraction that a repeating decimal is."""
    fixed, period = found[1] + found[2], found[3]
    top = int(fixed + period) - int(fixed or 0)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(found[2])}}}"


def _plain_number(text: str) -> Fraction | None:
    text = _POWER_OF_TEN.sub(r"e\1\2", text[: MAX_CHARS + 1])
    if len(text) > MAX_CHARS or not _NUMBER.fullmatch(text):
        return None
    return Fraction(re.sub("[, ]", "", text))


def _compare_symbolic(answer: str, gold: str) -> Verdict:
    import math_verify

    true = _parse(gold)
    if not true:
        return error(f"math: the answer of the reference cannot be parsed: {gold[:200]!r}")
    units = _unit(answer), _unit(gold)
    if units[0] is not None and units[1] is not None and units[0] != units[1]:
        return Verdict(0.0, detail=f"unit {units[0]} where {units[1]} was expected")
    told = _parse(answer)
    if told and not _INEQUALITY.search(gold) and _has_false_relation(answer, told[0]):
        return Verdict(0.0, detail="a relation where a value was expected")
    equal = math_verify.verify(
        list(true), list(told), timeout_seconds=None, allow_set_relation_comp=True
    )
    return Verdict(float(equal and not _differ_when_small(told[0], true[0])))


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    import math_verify

    if refusal(text):
        return ()
    return tuple(math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=_NO_ALARM))


def value(text: str) -> float | None:
    """The real number that an expression without variables stands for, behind the guards."""
    text = _strip(text)
    if _UNEVALUATED.search(text) or _INEQUALITY.search(text):
        return None
    parsed = _parse(text)
    number = _number(parsed[0]) if parsed else None
    return None if number is None or number.imag or not isfinite(number.real) else number.real


def _number(expression: Any) -> complex | None:
    import sympy

    if not (isinstance(expression, sympy.Expr) and expression.is_number):
        return None
    try:
        return complex(expression)
    except (TypeError, ValueError, OverflowError):
        return None  # infinite or undefined


def _has_false_relation(answer: str, parsed: Any) -> bool:
    """Whether the answer has an inequality sign that was dropped, or equates different numbers."""
    import sympy

    for part in parsed.args if isinstance(parsed, sympy.And) else (parsed,):
        left, right = map(_number, part.args) if isinstance(part, sympy.Eq) else (None, None)
        if left is None or right is None:
            continue
        if abs(left - right) > EQUATED_TOLERANCE * abs(right):
            return True
    return isinstance(parsed, sympy.Expr) and bool(_INEQUALITY.search(answer))


def _differ_when_small(answer: Any, gold: Any) -> bool:
    """Whether numbers that math-verify rounds to the same six decimals differ after all."""
    import sympy

    if isinstance(answer, (sympy.Tuple, sympy.Set)):
        return any(map(_differ_when_small, answer.args, getattr(gold, "args", ())))
    told, true = _number(answer), _number(gold)
    if told is None or true is None:
        return False  # nothing to compare
    if max(abs(told), abs(true)) >= SMALL:
        return False
    return abs(told - true) > RELATIVE_TOLERANCE * abs(true)


def _unit(text: str) -> Any:
    """The pint unit behind the number at the end of a text; None where there is none."""
    found = _UNIT.search(text)
    if found is None or "unit" in found[1]:  # to pint, units are micro-nits
        return None
    return parse_unit(f"{found[1]} ^ {found[2] or 1}")


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> Any:
    """The unit that a text names, as pint's Unit; None where pint does not know it."""
    import pint

    try:
        return pint.get_application_registry().parse_units(text)
    except Exception:  # pint raises a dozen unrelated kinds on odd unit names
        return None


def refusal(text: str) -> str:
    """Why an expression must not be parsed, "" if it may; linear time.

    The guards are rules of thumb about size, so that ordinary hostile answers cost nothing; the
    deadline of the pool is behind them.
    """
    if len(text) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    plain = text.replace("**", "^").replace("\\left", "").replace("\\right", "")
    plain = re.sub(r"\s+", "", plain).translate(str.maketrans("{}[]", "()()"))
    groups, depth = _groups(plain)
    if depth > MAX_DEPTH:
        return f"brackets nested deeper than {MAX_DEPTH}"
    if re.search(r"[0-9.][eE][+-]?[0-9]{5}", plain):
        return "huge exponent"
    for position, character in enumerate(plain):
        if character == "^" and (reason := _power_refusal(plain, position, groups)):
            return reason
        if character == "!" and _is_huge_factorial(plain, position, groups):
            return "huge factorial"
    return ""


def _groups(plain: str) -> tuple[dict[int, int], int]:
    """The matching bracket of each bracket, and the deepest nesting."""
    groups: dict[int, int] = {}
    opened: list[int] = []
    depth = 0
    for position, character in enumerate(plain):
        if character == "(":
            opened.append(position)
            depth = max(depth, len(opened))
        elif character == ")" and opened:
            start = opened.pop()
            groups[start], groups[position] = position, start
    return groups, depth


def _power_refusal(plain: str, position: int, groups: dict[int, int]) -> str:
    start = position + 1
    if plain[start : start + 1] in ("+", "-"):
        start += 1
    if start in groups:
        end = groups[start] + 1
    else:
        literal = _LITERAL.match(plain, start)
        end = literal.end() if literal else start + 1
    exponent = _COMMAND.sub("*", plain[start:end])
    numeric = not re.search("[A-Za-z]", exponent)
    if numeric and ("^" in exponent or plain[end : end + 1] == "^"):
        return "tower of powers"
    if "!" in exponent and _LITERAL.search(exponent):
        return "factorial in an exponent"
    size = _size(exponent)
    base = groups.get(position - 1)
    if base is not None and plain[position - 1] == ")":
        for raised in re.findall(r"\^\(?[+-]?([0-9]+)", plain[base:position]):
            size *= max(1, int(raised))
    return "huge exponent" if size > MAX_EXPONENT else ""


def _size(exponent: str) -> int:
    """A bound for the value of an exponent: a product if it multiplies, else the largest number."""
    numbers = [int(number) for number in _LITERAL.findall(exponent)]
    multiplies = "*" in exponent or ")(" in exponent or re.search(r"[0-9)]\(", exponent)
    return prod(max(1, n) for n in numbers) if multiplies else max(numbers, default=1)


def _is_huge_factorial(plain: str, position: int, groups: dict[int, int]) -> bool:
    before = plain[position - 1 : position]
    if before == "!":
        return True  # of a factorial
    start = groups.get(position - 1) if before == ")" else None
    argument = re.split("[^0-9]", plain[:position])[-1] if start is None else plain[start:position]
    numbers = [int(number) for number in _LITERAL.findall(argument)]
    grows = bool(re.search(r"[*^!\\]|[0-9)]\(", argument))
    return max(numbers, default=0) > MAX_FACTORIAL or (grows and bool(numbers))
