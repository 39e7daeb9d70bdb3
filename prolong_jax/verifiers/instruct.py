"""Instruction following: the strict checkers of IFEval (Zhou et al., arXiv 2311.07911) and later.

What is checked: the text after the last `</think>`, of that the part after the last `<answer>`,
if that is closed, with the tags taken off. An empty text fails everything. Keywords are literal
text, not patterns. langdetect decides about languages, with a fixed seed.
`COVERED` lists the instruction ids: IFEval here, IFEvalG and IFBench in `instruct_more`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from prolong_jax.verifiers import Verdict, error, final_answer_text
from prolong_jax.verifiers.instruct_more import IF_BENCH, IFEVAL_G
from prolong_jax.verifiers.instruct_text import (
    Checker,
    Given,
    compare,
    divided,
    number,
    occurrences,
    phrase,
    phrases,
    sentences,
    tokens,
)

PROMPT_SUFFIX = ""
_LOWER = "english text in lower case "
EXAMPLE = (
    f"</think>{_LOWER * 10}",
    {"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]},
)


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
    if unknown := unknown_ids(reference):
        return error(f"instruct: no checker for {', '.join(unknown)}; drop such rows")
    text, failed = _answer(response), []
    for name, given in zip(ids, kwargs, strict=True):
        try:
            if not CHECKERS[name](text, _mapping(given)):
                failed.append(name)
        except ValueError as problem:
            return error(f"instruct: {name}: {problem}; correct the kwargs of the row")
    if not text.strip():
        return Verdict(0.0, detail="empty response")
    share = (len(ids) - len(failed)) / len(ids)
    return Verdict(float(not failed) if mode == "all" else share, detail=", ".join(failed))


def unknown_ids(reference: Mapping[str, Any]) -> list[str]:
    """The instruction ids of the reference without a checker, sorted, for readers to refuse."""
    ids = reference.get("instruction_id_list")
    ids = ids if isinstance(ids, Iterable) else []
    return sorted({str(name) for name in ids if not isinstance(name, str) or name not in CHECKERS})


def _answer(response: str) -> str:
    text = final_answer_text(response)
    inside = text.rpartition("<answer>")[2]
    return inside.replace("</answer>", "") if "</answer>" in inside else text


def _mapping(given: Any) -> Given:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"expected a mapping of arguments or null, got {given!r}")
    return given or {}


# --- IFEval ------------------------------------------------------------------------------------


def _forbidden(text: str, given: Given) -> bool:
    words = phrases(given, "forbidden_words")
    return not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in words)


def _letter_frequency(text: str, given: Given) -> bool:
    count = text.lower().count(phrase(given, "letter").lower())
    return compare(count, given, "let_frequency", "let_relation")


def _nth_paragraph_first_word(text: str, given: Given) -> bool:
    parts, nth = text.split("\n\n"), number(given, "nth_paragraph", least=1)
    count, wanted = sum(bool(part.strip()) for part in parts), phrase(given, "first_word")
    right = count == number(given, "num_paragraphs")
    if nth > count or not parts[nth - 1].strip():
        return False
    first = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    return right and re.split(r"[.,?!'\"]", first, maxsplit=1)[0].lower() == wanted.lower()


def _bullets(text: str, given: Given) -> bool:
    found = re.findall(r"^[^\S\n]*(?:\*[^*]|-).*$", text, re.MULTILINE)
    return len(found) == number(given, "num_bullets")


def _highlighted(text: str, given: Given) -> bool:
    found = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in found) >= number(given, "num_highlights")


def _title(text: str, given: Given) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].strip("<").rstrip(">").strip():
            return True
    return False


def _placeholders(text: str, given: Given) -> bool:
    count = 0
    for line in text.split("\n"):
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= number(given, "num_placeholders")


def _sections(text: str, given: Given) -> bool:
    splitter = re.escape(phrase(given, "section_spliter"))
    return len(re.findall(rf"{splitter}\s?\d+", text)) >= number(given, "num_sections")


def _json_format(text: str, given: Given) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(text.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _postscript(text: str, given: Given) -> bool:
    marker = phrase(given, "postscript_marker")
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _two_responses(text: str, given: Given) -> bool:
    parts = [part.strip() for part in divided(text, r"\*{6}")]
    return len(parts) == 2 and parts[0] != parts[1]


def _detect(text: str, language: str) -> bool:
    """Whether langdetect names the language; a text that it cannot judge passes, as in IFEval."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


IFEVAL: dict[str, Checker] = {
    "change_case:capital_word_frequency": lambda text, given: compare(
        sum(map(str.isupper, tokens(text))), given, "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": lambda text, _: text.isupper() and _detect(text, "en"),
    "change_case:english_lowercase": lambda text, _: text.islower() and _detect(text, "en"),
    "combination:repeat_prompt": lambda text, given: (
        text.strip().lower().startswith(phrase(given, "prompt_to_repeat").lower())
    ),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text, _: any(
        f"My answer is {word}." in text for word in ("yes", "no", "maybe")
    ),
    "detectable_format:json_format": _json_format,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlighted,
    "detectable_format:title": _title,
    "keywords:existence": lambda text, given: all(
        occurrences(word, text) for word in phrases(given, "keywords")
    ),
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": lambda text, given: compare(
        occurrences(phrase(given, "keyword"), text), given, "frequency"
    ),
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": lambda text, given: _detect(text, phrase(given, "language")),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "length_constraints:number_paragraphs": lambda text, given: (
        len(divided(text, r"\s?\*\*\*\s?")) == number(given, "num_paragraphs")
    ),
    "length_constraints:number_sentences": lambda text, given: compare(
        len(sentences(text)), given, "num_sentences"
    ),
    "length_constraints:number_words": lambda text, given: compare(
        len(re.findall(r"\w+", text)), given, "num_words"
    ),
    "punctuation:no_comma": lambda text, _: "," not in text,
    "startend:end_checker": lambda text, given: (
        text.strip().strip('"').lower().endswith(phrase(given, "end_phrase").lower())
    ),
    "startend:quotation": lambda text, _: (
        len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'
    ),
}
CHECKERS = {**IFEVAL, **IFEVAL_G, **IF_BENCH, "letters:letter_counting2": _letter_frequency}
COVERED = tuple(sorted(CHECKERS))
