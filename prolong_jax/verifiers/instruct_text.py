"""Text tools of the instruction checkers: arguments of a reference, sentences, words.

Sentences come in two ways, as the instructions are defined by one or the other: `sentences` is the
Punkt algorithm without training data (Kiss and Strunk, 2006), `rule_sentences` the rules about
abbreviations, web addresses and quotes of the IFEval code. `tokens` cuts as the Penn Treebank does.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Given = Mapping[str, Any]  # the arguments of an instruction, by name
Checker = Callable[[str, Given], bool]


def number(given: Given, key: str, least: int = 0) -> int:
    """The whole number under the key; a float without fraction will do."""
    value = given.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {key} to be a whole number from {least}, got {value!r}")
    return value


def phrase(given: Given, key: str, strip: bool = True) -> str:
    """The text under the key, without outer white space; of a list its first element."""
    value = given.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected {key} to be a text, got {value!r}")
    return value.strip() if strip else value


def phrases(given: Given, key: str) -> list[str]:
    """The list of texts under the key."""
    value = given.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(w, str) for w in value):
        raise ValueError(f"expected {key} to be a list of words, got {value!r}")
    return value


def compare(count: int, given: Given, limit: str, relation: str = "relation") -> bool:
    """Whether the count is "at least" or "less than" the limit; both are named by their keys."""
    bound, how = number(given, limit), given.get(relation)
    if how not in ("at least", "less than"):
        raise ValueError(f"expected {relation} to be 'at least' or 'less than', got {how!r}")
    return count >= bound if how == "at least" else count < bound


def occurrences(word: str, text: str) -> int:
    """How often the text holds the word, whatever its case and wherever it stands."""
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def divided(text: str, pattern: str) -> list[str]:
    """The parts between the dividers without a blank first or last; none if another is blank."""
    parts = re.split(pattern, text)
    inner = all(part.strip() for part in parts[1:-1])
    return [part for part in parts if part.strip()] if inner else []


# --- sentences ---------------------------------------------------------------------------------

_AFTER_END = "?!)\";}]*:@'({["  # what may follow the end of a sentence within a word
_NUMBER = re.compile(r"-?[.,]?[0-9][0-9,.-]*")
_CLOSING = re.compile(r"[\"')\]}]+?(?=\s|--|$)")
_MARK = re.compile(r"[;:,]|[.!?]$")
_BEFORE_TOKEN = '("`{[:;&#*@)}]-,'


def sentences(text: str) -> list[str]:
    """The sentences, as untrained Punkt cuts them."""
    spans: list[tuple[int, int]] = []
    words, start = list(re.finditer(r"\S+", text)), -1  # start: of the open sentence; -1: none
    for word, following in zip(words, [*(w[0] for w in words[1:]), ""], strict=False):
        begin, stop = word.span()
        start = _opened(text, spans, begin, stop) if start < 0 else start
        end = begin + _cut(word[0], following)
        if end > begin:
            spans.append((start, end))
            start = _opened(text, spans, end, stop) if end < stop else -1
    if start >= 0:
        spans.append((start, len(text)))
    return [cut for begin, end in spans if (cut := text[begin:end].strip())]


def _opened(text: str, spans: list[tuple[int, int]], begin: int, stop: int) -> int:
    """Where from begin on a sentence begins: closing marks there belong to the one before."""
    closing = _CLOSING.match(text, begin, stop) if spans else None
    if closing is None:
        return begin
    spans[-1] = (spans[-1][0], closing.end())
    return closing.end()


def _cut(word: str, following: str) -> int:
    """Where in the word a sentence ends, or 0; only its last possible end is looked at."""
    for end in range(len(word), 0, -1):
        if word[end - 1] not in ".?!":
            continue
        inside = end < len(word)
        if word[end] not in _AFTER_END if inside else not following:
            continue
        return end if _ends(word[:end], word[end] if inside else following) else 0
    return 0


def _ends(token: str, following: str) -> bool:
    """Whether a sentence ends after the token (which ends in . ? or !) before the next one."""
    if token[-1] != ".":
        return True
    token = re.split(r"[)\";}\]*:@({\[]|--+|(?=[?!'])", token[:-1])[-1] + "."
    token = token.lstrip(_BEFORE_TOKEN)
    if token.endswith("..") or token == ".":
        return token == "."  # an ellipsis goes on
    lower_or_mark = following[0].islower() or _MARK.match(following)
    if re.fullmatch(r"[^\W\d]\.", token):
        return not lower_or_mark and not following[0].isupper()
    if _NUMBER.fullmatch(token):
        return not lower_or_mark
    return True


_KEPT = "\ue000"  # stands for a full stop that ends nothing
_STARTER = (
    r" (?:Mrs?|Ms|Dr|Prof|Capt|Cpt|Lt|Wherever|"
    r"(?:He|She|It|They|Their|Our|We|But|However|That|This)\s)"
)
_FORCED = re.compile(
    rf"\.{{2,}}|(?:[A-Z]\.){{2,3}}(?={_STARTER})|(?<= )(?:Inc|Ltd|Jr|Sr|Co)\.(?={_STARTER})"
)
_ABBREVIATION = re.compile(
    r"(?:Mrs?|St|Ms|Dr|Ph\.D)\.|\.(?=com|net|org|io|gov|edu|me)|[0-9]\.(?=[0-9])"
    r"|(?<=\s)(?:[A-Za-z]|Inc|Ltd|Jr|Sr|Co)\.(?![A-Za-z]\.)|(?:[A-Za-z]\.){2,3}"
)


def rule_sentences(text: str) -> list[str]:
    """The sentences, white space as single blanks, as the rules of the IFEval code cut them.

    An ellipsis ends a sentence, other abbreviations do not, and a closing double quote belongs to
    the sentence that it closes.
    """
    text = f" {text}  ".replace("\n", " ")
    text = _FORCED.sub(lambda found: found[0].replace(".", _KEPT) + "\n", text)
    text = _ABBREVIATION.sub(lambda found: found[0].replace(".", _KEPT), text)
    text = re.sub(r'\.”|([.!?])"', lambda found: found[0][::-1], text)
    parts = re.sub(r"[.?!]", "\\g<0>\n", text).replace(_KEPT, ".").split("\n")
    parts = [part.strip() for part in parts]
    return parts if parts[-1] else parts[:-1]


# --- words -------------------------------------------------------------------------------------

_PIECE = re.compile(
    r"""\.{2,}|--|``?|''|[][;@#$%&?!*(){}<>«»“”„‘’"‒-―]|[:,](?!\d)|\.(?=[\])}>"'»”’\s]*$)"""
    r"""|(?<!\w)'(?=\w)(?!(?:re|ve|ll|[mtsdn])\b)"""
    r"""|(?:[^][\s;@#$%&?!*(){}<>«»“”„‘’"‒-―`:,.'-]|[:,](?=\d)|\.(?!\.|[\])}>"'»”’\s]*$)"""
    r"""|-(?!-)|'(?!'))+"""
)
_CLITIC = re.compile(
    r"(?i)(can)(not)|(gim|lem)(me)|(gon|wan)(na)|(got)(ta)|(.*[^'])('(?:[smd]|ll|re|ve)?|n't)"
)


def tokens(text: str) -> list[str]:
    """The words and signs of all sentences."""
    return [token for sentence in sentences(text) for token in sentence_tokens(sentence)]


def sentence_tokens(sentence: str) -> list[str]:
    """The words and signs, as the Penn Treebank cuts them; opening quotes are ``, closing ''."""
    found: list[str] = []
    for piece in _PIECE.finditer(sentence):
        before = sentence[piece.start() - 1 : piece.start()]
        if piece[0] == '"':
            found.append("``" if not before or before in " ([{<" else "''")
        elif clitic := _CLITIC.fullmatch(piece[0]):
            found += [part for part in clitic.groups() if part]
        else:
            found.append(piece[0])
    return found
