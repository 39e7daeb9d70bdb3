"""Instruction following: the strict checkers of IFEval (Zhou et al., arXiv 2311.07911).

The whole final answer text is checked, after the last `</think>`; an empty one fails everything.
Sentences are counted as the Punkt algorithm does without training data (Kiss and Strunk, 2006),
which gives the published strict verdicts. Keywords are literal text, not patterns.

Language: "all lower case" and "all capitals" also demand English. On short texts (less than
`MIN_LETTERS` letters) language detection is a lottery that would punish at random, so there nine
in ten letters must be ASCII instead. From that length on langdetect decides, with a fixed seed.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prolong_jax.verifiers import Verdict, error, final_answer_text

PROMPT_SUFFIX = ""
_LOWER = "english text in lower case "
EXAMPLE = (
    f"</think>{_LOWER * 10}",
    {"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]},
)

MIN_LETTERS = 50
Checker = Callable[[str, Mapping[str, Any]], bool]


def verify(response: str, reference: Mapping[str, Any]) -> Verdict:
    """The share of the instructions that the response follows; with mode "all" 1 if all, else 0.

    Status ERROR for unknown ids and for missing or malformed arguments.
    """
    ids, kwargs = reference.get("instruction_id_list"), reference.get("kwargs")
    mode = reference.get("mode") or "mean"
    if not isinstance(ids, list) or not isinstance(kwargs, list) or len(ids) != len(kwargs):
        return error("instruct: expected as many kwargs as instruction ids in the reference")
    if not ids or mode not in ("mean", "all"):
        return error(f"instruct: expected instruction ids and mode mean or all, got {mode!r}")
    if not all(isinstance(name, str) for name in ids):
        return error("instruct: expected instruction ids to be strings")
    unknown = unsupported(ids)
    if unknown:
        return error(f"instruct: no checker for {', '.join(unknown)}")
    text = final_answer_text(response)
    try:
        passed = [
            CHECKERS[name](text, _given(arguments))
            for name, arguments in zip(ids, kwargs, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
        return error(f"instruct: bad arguments for {', '.join(ids)}: {problem!r}")
    if not text.strip():
        return Verdict(0.0, detail="empty response")
    failed = ", ".join(name for name, ok in zip(ids, passed, strict=True) if not ok)
    share = sum(passed) / len(passed)
    return Verdict(float(all(passed)) if mode == "all" else share, detail=failed)


def unsupported(ids: Iterable[str]) -> list[str]:
    """The instruction ids that have no checker here, sorted, for a check before the run starts."""
    return sorted({str(name) for name in ids if name not in CHECKERS})


def _given(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments that are not null; whole floats become integers."""
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in given.items()
    }


def _compare(count: int, relation: str, limit: int) -> bool:
    if not isinstance(limit, int) or relation not in ("at least", "less than"):
        raise ValueError(f"expected 'at least' or 'less than' a number, got {relation!r} {limit!r}")
    return count >= limit if relation == "at least" else count < limit


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(w, str) for w in value):
        raise ValueError(f"expected a list of words, got {value!r}")
    return value


# --- keywords and letters ----------------------------------------------------------------------


def _existence(text: str, given: Mapping[str, Any]) -> bool:
    return all(re.search(re.escape(w), text, re.IGNORECASE) for w in _words(given["keywords"]))


def _forbidden(text: str, given: Mapping[str, Any]) -> bool:
    words = _words(given["forbidden_words"])
    return not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in words)


def _frequency(text: str, given: Mapping[str, Any]) -> bool:
    count = len(re.findall(re.escape(given["keyword"]), text, re.IGNORECASE))
    return _compare(count, given["relation"], given["frequency"])


def _letter_frequency(text: str, given: Mapping[str, Any]) -> bool:
    count = text.lower().count(given["letter"].strip().lower())
    return _compare(count, given["let_relation"], given["let_frequency"])


def _no_comma(text: str, given: Mapping[str, Any]) -> bool:
    return "," not in text


# --- lengths -----------------------------------------------------------------------------------


def _number_words(text: str, given: Mapping[str, Any]) -> bool:
    return _compare(len(re.findall(r"\w+", text)), given["relation"], given["num_words"])


def _number_sentences(text: str, given: Mapping[str, Any]) -> bool:
    return _compare(count_sentences(text), given["relation"], given["num_sentences"])


def _number_paragraphs(text: str, given: Mapping[str, Any]) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(1 for part in parts if part.strip()) == _whole(given["num_paragraphs"])


def _nth_paragraph_first_word(text: str, given: Mapping[str, Any]) -> bool:
    parts, nth = text.split("\n\n"), _whole(given["nth_paragraph"])
    count = sum(1 for part in parts if part.strip())
    if nth > count or not parts[nth - 1].strip():
        return False
    first = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split(r"[.,?!'\"]", first, maxsplit=1)[0].lower()
    return count == _whole(given["num_paragraphs"]) and first == given["first_word"].lower()


_END = re.compile(r"[.?!]")
_AFTER_END = "?!)\";}]*:@'({["  # what may follow the end of a sentence within a word
_NUMBER = re.compile(r"-?[.,]?[0-9][0-9,.-]*")
_CLOSING = re.compile(r"[\"')\]}]+?(?=\s|--|$)")
_BEFORE_TOKEN = '("`{[:;&#*@)}]-,'


def count_sentences(text: str) -> int:
    """The number of sentences, as untrained Punkt cuts them."""
    words = text.split()
    if not words:
        return 0
    count, pending = 0, False  # pending: text since the last cut
    for word, following in zip(words, [*words[1:], ""], strict=True):
        cut, rest = _cut(word, following)
        pending = True
        if cut:
            count += 1
            pending = bool(rest) and not _CLOSING.fullmatch(rest)
    return count + pending


def _cut(word: str, following: str) -> tuple[bool, str]:
    """Whether a sentence ends in the word, and what of the word belongs to the next sentence.

    Only the last possible end in a word is looked at.
    """
    for found in reversed(list(_END.finditer(word))):
        end = found.end()
        inside = end < len(word)
        if inside and word[end] not in _AFTER_END:
            continue
        if not inside and not following:
            continue
        return _ends(word[:end], word[end] if inside else following), word[end:]
    return False, ""


def _ends(token: str, following: str) -> bool:
    """Whether a sentence ends after the token (which ends in . ? or !) before the next one."""
    if token[-1] != ".":
        return True
    token = re.split(r"[?!)\";}\]*:@'({\[]|--+", token[:-1])[-1] + "."
    token = token.lstrip(_BEFORE_TOKEN)
    if token.endswith("..") or token == ".":
        return token == "."  # an ellipsis goes on
    next_token = following.lstrip() or " "
    lower_or_mark = next_token[0].islower() or next_token[0] in ";:,.!?"
    if re.fullmatch(r"[^\W\d]\.", token):
        return not lower_or_mark and not next_token[0].isupper()
    if _NUMBER.fullmatch(token):
        return not lower_or_mark
    return True


# --- format ------------------------------------------------------------------------------------


def _bullets(text: str, given: Mapping[str, Any]) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == _whole(given["num_bullets"])


def _highlighted(text: str, given: Mapping[str, Any]) -> bool:
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    count = sum(1 for found in single + double if found.strip("*").strip())
    return count >= _whole(given["num_highlights"])


def _title(text: str, given: Mapping[str, Any]) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].strip("<").rstrip(">").strip():
            return True
    return False


def _placeholders(text: str, given: Mapping[str, Any]) -> bool:
    count = 0
    for line in text.split("\n"):
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= _whole(given["num_placeholders"])


def _sections(text: str, given: Mapping[str, Any]) -> bool:
    parts = re.split(rf"\s?{re.escape(given['section_spliter'])}\s?\d+\s?", text)
    return len(parts) - 1 >= _whole(given["num_sections"])


def _json_format(text: str, given: Mapping[str, Any]) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(text.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _constrained(text: str, given: Mapping[str, Any]) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _postscript(text: str, given: Mapping[str, Any]) -> bool:
    marker = str(given["postscript_marker"]).strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns[marker] if marker in patterns else re.escape(marker.lower())
    return re.search(pattern, text.lower()) is not None


# --- start, end, combinations ------------------------------------------------------------------


def _end_phrase(text: str, given: Mapping[str, Any]) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(text: str, given: Mapping[str, Any]) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _repeat_prompt(text: str, given: Mapping[str, Any]) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _two_responses(text: str, given: Mapping[str, Any]) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    valid = [part.strip() for part in parts if part.strip()]
    return len(valid) == 2 and valid[0] != valid[1]


# --- case and language -------------------------------------------------------------------------


def _lowercase(text: str, given: Mapping[str, Any]) -> bool:
    return text.islower() and _is_english(text)


def _capital(text: str, given: Mapping[str, Any]) -> bool:
    return text.isupper() and _is_english(text)


def _capital_words(text: str, given: Mapping[str, Any]) -> bool:
    count = sum(1 for word in re.findall(_CASED_WORD, text) if word.isupper())
    return _compare(count, given["capital_relation"], given["capital_frequency"])


# A word with its inner hyphens, full stops and the like, cut before an apostrophe.
_CASED_WORD = r"[^\W_]+(?:[-./&_][^\W_]+)*"


def _language(text: str, given: Mapping[str, Any]) -> bool:
    return _detect(text, given["language"])


def _is_english(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    if len(letters) < MIN_LETTERS:
        return sum(c.isascii() for c in letters) >= 0.9 * len(letters)
    return _detect(text, "en")


def _detect(text: str, language: str) -> bool:
    """Whether langdetect names the language; a text that it cannot judge passes, as in IFEval."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


CHECKERS: dict[str, Checker] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:json_format": _json_format,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlighted,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_words": _number_words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _end_phrase,
    "startend:quotation": _quotation,
}
