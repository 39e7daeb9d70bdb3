r"""Science answers: multiple choice, numbers with units, else symbolic through math; binary.

Multiple choice (the reference has `options`): the last complete `\boxed{...}` must hold exactly one
capital letter, bare or inside `\text{}`, `\textbf{}`, `\mathrm{}`, `\mathbf{}` or round brackets, with
or without a final full stop. Only where there is no complete box, the last non-empty line may
instead read "Answer: B" ("The final answer is (B)." and the like). Anything else, as "B or C", is
wrong. The letter of the reference may be in lower case, that of the response may not.

Numbers, as numerals or as expressions without variables: the last complete box. The value must lie
within a relative tolerance of the reference after conversion to its unit (pint knows the units;
"0.084 km" is "84 m"). The tolerance is the `rel_tol` of the reference, 1% by default; 0 takes exact
values only. A reference with a unit demands a unit; where pint does not know it, the same words. A
reference without a unit takes any unit as a remark, and any words of three letters or more that
name no number, save that a per cent sign counts.

Chemical formulas: subscripts may be written in any way, and capitals count.
"""

import re
from collections.abc import Mapping
from typing import Any

from prolong_jax.verifiers import Verdict, error, final_answer_text, math

PROMPT_SUFFIX = math.PROMPT_SUFFIX
EXAMPLE = (r"</think>\boxed{0.084 \text{ km}}", {"answer": "84 m"})

DEFAULT_REL_TOL = 0.01
MAX_CHARS = 200  # of a number with its unit

_WRAPPER = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|rm)\s*+\{"
_WRAPPED = re.compile(_WRAPPER + r"((?:[^{}]++|\{[^{}]*+\})*+)\}")
_LETTER = re.compile(r"\(?([A-Z])\)?\.?")
_LETTER_LINE = re.compile(
    r"(?i:(?:so )?(?:the )?(?:final |correct )?answer(?: is)?)\s*:?\s*\(?([A-Z])\)?\.?"
)

_FLOAT = r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]*+)?|[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_POWER_OF_TEN = r"10\s*\^\s*\(?(?P<{}>[+-]?[0-9]{{1,3}})\)?"
_NUMBER = re.compile(
    rf"(?:(?P<top>{_FLOAT})\s*/\s*(?P<bottom>{_FLOAT})(?![0-9^])"
    rf"|\((?P<top2>{_FLOAT})\)\s*/\s*\((?P<bottom2>{_FLOAT})\)"
    rf"|(?P<only_sign>[+-]?){_POWER_OF_TEN.format('only')}"
    rf"|(?P<value>{_FLOAT})"
    rf"(?:[eE](?P<e>[+-]?[0-9]{{1,3}})(?![0-9])|(?:\s*+\*\s*+|\s++){_POWER_OF_TEN.format('power')})?)"
    r"(?P<unit>.*)",
    re.DOTALL,
)
_UNIT = re.compile(r"(?:[A-Za-z%]++(?:\^\(?[+-]?[0-9]{1,2}\)?)?|1(?=\s*/)|[*/()\s])*+")
_LATEX = [
    (re.compile(r"\\[,;:! ]|\\quad|~|\u00a0|\u202f"), " "),
    (re.compile(r"\{\s*\}"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*|°\s*|\\degree\s*"), " deg"),
    (re.compile(r"\bdeg(?:rees?)?\s*([CF])(?:elsius|ahrenheit)?(?![A-Za-z])"), r"deg\1"),
    (re.compile(r"\s*\^\s*\{([^{}]*+)\}"), r"^\1"),
    (re.compile(r"\s*\^\s*"), "^"),
    (re.compile(r"(?<=[A-Za-z])-(?=[A-Za-z])"), "*"),
    (re.compile(r"\\[dt]?frac\s*+\{([^{}]*+)\}\s*+\{([^{}]*+)\}"), r"(\1)/(\2)"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·⋅∙]|\*\*(?=\s*10)"), "*"),
    (re.compile(r"\\mu\s*|[µμ]"), "u"),
    (re.compile(r"\\Omega(?![A-Za-z])|[ΩΩ]"), "ohm"),
    (re.compile(r"Å|\\AA(?![A-Za-z])"), "angstrom"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:approx|left|right)(?![A-Za-z])|≈|\\?\$"), " "),
    (re.compile(r"−"), "-"),
    (re.compile(r"²"), "^2"),
    (re.compile(r"³"), "^3"),
]
_NAMED = re.compile(r"[A-Za-z][A-Za-z_0-9{}]{0,20}\s*=\s*")
_BEHIND_EXPRESSION = re.compile(  # where a unit may begin
    rf"(?:\\[dt]?frac\s*+\{{\s*+)?{_WRAPPER}|\\(?:%|(?:Omega|mu)(?![A-Za-z]))"
    r"|(?:(?<=[\s~])|(?<=\\[,;:]))[A-Za-z%]"
)
_WORD = re.compile(r"[A-Za-z]+")
_CONSTANT = re.compile(r"(?<![A-Za-z])(?:pi|e)(?![A-Za-z])")  # units to pint
_VARIABLE = re.compile(r"[a-z](?<![ghlmsu])")  # many of them are rare units to pint
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NUMBER_WORD = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|half|halves"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    r"|hundred|thousand|million|billion|trillion)s?\b",
    re.IGNORECASE,
)
_PREPOSITIONS = {"of", "to", "by", "on"}
_FORMULA = re.compile(r"(?:(?:[A-Z][a-z]?|[()])[0-9]*+)++")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789", "_{}$")


def verify(response: str, reference: Mapping[str, Any]) -> Verdict:
    """Score 1 if the answer agrees with `reference["answer"]` under the rules above, else 0."""
    gold = reference.get("answer")
    if not isinstance(gold, (str, int, float)) or not str(gold).strip():
        return error(f"stem: expected an answer in the reference, got {gold!r}")
    text, gold = final_answer_text(response), str(gold).strip()
    if reference.get("options"):
        return _verify_choice(text, gold, len(reference["options"]))
    rel_tol = reference.get("rel_tol")
    rel_tol = DEFAULT_REL_TOL if rel_tol is None else rel_tol
    if not isinstance(rel_tol, (int, float)) or not 0 <= rel_tol < 1:
        return error(f"stem: expected rel_tol in [0, 1), got {rel_tol!r}")
    answer = math.last_boxed(text)
    if answer is None:
        return Verdict(0.0, detail="no complete \\boxed{}")
    return _verify_open(answer.strip(), gold, float(rel_tol))


def extract_letter(text: str) -> str | None:
    """The letter that a final answer text chooses, by the rule of this module, else None."""
    box = math.last_boxed(text)
    if box is not None:
        found = _LETTER.fullmatch(_WRAPPED.sub(r"\1", box).strip())
        return found[1] if found else None
    lines = text.strip().splitlines()
    found = _LETTER_LINE.fullmatch(lines[-1].strip()[:MAX_CHARS]) if lines else None
    return found[1] if found else None


def _verify_choice(text: str, gold: str, num_options: int) -> Verdict:
    gold, letters = gold.upper(), [chr(ord("A") + i) for i in range(min(num_options, 26))]
    if gold not in letters:
        return error(f"stem: expected the answer to be one of {''.join(letters)}, got {gold!r}")
    letter = extract_letter(text)
    return Verdict(float(letter == gold), detail="" if letter else "no single letter")


def _verify_open(answer: str, gold: str, rel_tol: float) -> Verdict:
    formulas = _formula(answer), _formula(gold)
    if formulas[1] and formulas[0].lower() == formulas[1].lower():
        return Verdict(float(formulas[0] == formulas[1]))
    true, told = parse_quantity(gold), parse_quantity(answer)
    plain = true is not None and told is not None
    true = true or _parse_expression(gold)
    told = told or (_parse_expression(answer) if true else None)
    if true and told and (true[1] or _is_remark(told[1], answer)):
        verdict = _compare_quantities(told, true, rel_tol)
        if verdict.score or plain or true[1]:
            return verdict
    if told and _NUMBER_WORD.search(told[1]):
        answer = _WRAPPED.sub(r" \1 ", answer)  # to math, text is a remark
    return math.compare(answer, gold)


def _formula(text: str) -> str:
    """The text without what lowers its subscripts, "" if it cannot be a chemical formula."""
    text = _WRAPPED.sub(r"\1", text).translate(_SUBSCRIPTS).strip()
    return text if _FORMULA.fullmatch(text) else ""


def _is_remark(unit: str, answer: str) -> bool:
    """Whether what stands behind the number is a unit or plain words, not a factor or a number."""
    words = _WORD.findall(unit)
    if any(map(_VARIABLE.fullmatch, words)):
        return False
    unknown = [w for w in words if w not in _PREPOSITIONS and math.parse_unit(w) is None]
    if any(len(word) < 3 or _NUMBER_WORD.fullmatch(word) for word in unknown):
        return False
    return not unknown or not re.search(rf"[0-9]{words[0]}", answer)


def parse_quantity(text: str) -> tuple[float, str] | None:
    """The number and the unit ("" if none) that a text consists of, or None if it is no number."""
    if len(text) > MAX_CHARS:
        return None
    text = _WRAPPED.sub(r" \1 ", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _NAMED.sub("", text.strip().removesuffix("."), count=1).strip()
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    unit = re.sub(r"\s+", " ", found["unit"]).strip()
    value = _value(found)
    if value is None or not _UNIT.fullmatch(unit) or _CONSTANT.search(unit):
        return None
    first, _, rest = unit.partition(" ")
    power = _POWERS.get(first.lower())
    return (value, unit) if power is None else (value * 10.0**power, rest)


def _parse_expression(text: str) -> tuple[float, str] | None:
    """As `parse_quantity`, of an expression without variables that may have a unit behind it."""
    if len(text) > MAX_CHARS:
        return None
    text = _NAMED.sub("", text, count=1)
    behind = _BEHIND_EXPRESSION.search(text)
    unit = parse_quantity("1 " + text[behind.start() :]) if behind else None
    if behind and unit:
        value = math.value(text[: behind.start()].rstrip("\\,;:!~ "))
        return None if value is None else (value * unit[0], unit[1])
    value = None if behind and behind[0].startswith("\\") else math.value(text)
    return None if value is None else (value, "")


def _value(found: re.Match[str]) -> float | None:
    top, bottom = found["top"] or found["top2"], found["bottom"] or found["bottom2"]
    if top:
        below = _float(bottom)
        return _float(top) / below if below else None
    if found["only"]:
        return float(f"{found['only_sign']}1e{found['only']}")
    return float(f"{found['value'].replace(',', '')}e{found['e'] or found['power'] or 0}")


def _float(text: str) -> float:
    return float(text.replace(",", ""))


def _compare_quantities(
    told: tuple[float, str], true: tuple[float, str], rel_tol: float
) -> Verdict:
    value, unit = told
    gold, gold_unit = true
    if gold_unit and not unit:
        return Verdict(0.0, detail=f"unit missing, expected {gold_unit}")
    if gold_unit and unit != gold_unit:
        converted = _convert(value, unit, gold_unit)
        if converted is None:  # "J/mol K" is often meant as "J/(mol K)"
            converted = _convert(value, _one_fraction(unit), _one_fraction(gold_unit))
        if converted is None:
            return Verdict(0.0, detail=f"unit {unit} where {gold_unit} was expected")
        value = converted
    elif unit == "%" and not gold_unit:
        value /= 100
    return Verdict(float(abs(value - gold) <= rel_tol * abs(gold)))


def _one_fraction(unit: str) -> str:
    return re.sub(r"^([^/()]*)/([^/()]*)$", r"\1/(\2)", unit)


def _convert(value: float, unit: str, to: str) -> float | None:
    """The value in another unit, or None where the units are unknown or do not fit."""
    import pint

    if {unit, to} == {"C", "degC"}:
        return value
    told, true = math.parse_unit(unit), math.parse_unit(to)
    if told is None or true is None:
        return None
    try:
        return float(pint.get_application_registry().Quantity(value, told).to(true).magnitude)
    except (pint.errors.PintError, ArithmeticError):
        return None  # they do not fit, or the factor overflows
