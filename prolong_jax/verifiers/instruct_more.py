"""The instructions that came after IFEval, as far as their rule needs nothing but the text.

IFEvalG is the 29 training instructions of Pyatkin et al. (arXiv 2507.02833), which the Nemotron
sets use beside the 25 of IFEval; of the test instructions of that paper, IFBench, the ids below.
The rules are the published ones, loopholes included (one letter is a palindrome), but for these:
a missing argument is an error (there: drawn at random), keywords are literal text (there: some are
patterns), format:sub-bullets wants a bullet point, and blank lines never count as lines.
"""

import re
import string
from collections import Counter
from itertools import pairwise

from prolong_jax.verifiers.instruct_text import (
    Checker,
    Given,
    compare,
    divided,
    number,
    occurrences,
    phrase,
    rule_sentences,
    sentence_tokens,
    tokens,
)

_EDGES = string.punctuation + " "
_NO_MARKS = str.maketrans("", "", string.punctuation)
_STOP_WORDS = set(
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself "
    "she her hers herself it its itself they them their theirs themselves what which who whom "
    "this that these those am is are was were be been being have has had having do does did doing "
    "a an the and but if or because as until while of at by for with about against between into "
    "through during before after above below to from up down in out on off over under again "
    "further then once here there when where why how all any both each few more most other some "
    "such no nor not only own same so than too very s t can will just don should now d ll m o re "
    "ve y ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn "
    "weren won wouldn".split()
)
_NAMES = (
    "Emma|Liam|Sophia|Jackson|Olivia|Noah|Ava|Lucas|Isabella|Mason|Mia|Ethan|Charlotte|Alexander|"
    "Amelia|Benjamin|Harper|Leo|Zoe|Daniel|Chloe|Samuel|Lily|Matthew|Grace|Owen|Abigail|Gabriel|"
    "Ella|Jacob|Scarlett|Nathan|Victoria|Elijah|Layla|Nicholas|Audrey|David|Hannah|Christopher|"
    "Penelope|Thomas|Nora|Andrew|Aria|Joseph|Claire|Ryan|Stella|Jonathan"
)


def _words(text: str) -> list[str]:
    return text.translate(_NO_MARKS).split()


def _begin_with(parts: list[str], word: str) -> bool:
    return all(part.lower().split()[:1] == [word.lower()] for part in parts)


def _end_with(parts: list[str], word: str) -> bool:
    lasts = [re.sub(r"[^\w\s]", "", "".join(part.split()[-1:])) for part in parts]
    return all(last.lower() == word.lower() for last in lasts)


def _repeat_phrase(text: str, given: Given) -> bool:
    wanted, count = phrase(given, "phrase").split(), number(given, "small_n", least=1)
    first, last = re.escape(wanted[0]), re.escape(wanted[-1])
    found = [f.split() for f in re.findall(rf"{first} .{{0,2000}}? {last}", text)]
    if len(found) != count or any(len(words) != len(wanted) for words in found):
        return False
    changed = [sum(a != b for a, b in zip(words, wanted, strict=True)) for words in found]
    return max(changed) == changed[-1] == 1


def _is_copy(text: str, given: Given) -> bool:
    return text.strip().lower() == phrase(given, "prompt_to_repeat").lower()


def _copying_multiple(text: str, given: Given) -> bool:
    copies = [_is_copy(part, given) for part in text.split("******")]
    return len(copies) == number(given, "N") and all(copies)


def _copy_span(text: str, given: Given) -> bool:
    span = slice(number(given, "n_start"), number(given, "n_end"))
    copied = phrase(given, "prompt_to_repeat", strip=False)[span]
    return text.strip().lower() == copied.strip().lower()


def _sentence_hyphens(text: str, given: Given) -> bool:
    cut = rule_sentences(text.replace("-", " "))
    pairs = zip(text.split("-"), cut, strict=False)
    return all(part == part.strip() == wanted for part, wanted in pairs)


def _composition(text: str, given: Given) -> bool:
    num_sentences, num_words = number(given, "n_sent"), number(given, "n_words")
    parts = [rule_sentences(part) for part in re.split(r"\s?\*\*\*\s?", text)]
    lengths = {len(sentence_tokens(sentence)) for part in parts for sentence in part}
    return [len(part) for part in parts] == 3 * [num_sentences] and lengths == {num_words}


def _nth_word(text: str, given: Given) -> bool:
    nth, word = number(given, "n", least=1), number(given, "m", least=1)
    chosen = sentence_tokens("".join(rule_sentences(text)[nth - 1 : nth]))
    return chosen[word - 1 : word] == [phrase(given, "keyword")]


IFEVAL_G: dict[str, Checker] = {
    "copy:copy": _is_copy,
    "copy:copying_multiple": _copying_multiple,
    "copy:copying_simple": _is_copy,
    "copy:repeat_phrase": _repeat_phrase,
    "count:count_increment_word": lambda text, given: (
        [occurrences(phrase(given, f"keyword{i}"), text) for i in (1, 2)] == [1, 2]
    ),
    "count:count_unique": lambda text, _: max(Counter(tokens(text)).values(), default=1) == 1,
    "count:counting_composition": _composition,
    "count:lowercase_counting": lambda text, given: (
        len(re.findall(r"\b[a-z]+\b", text)) <= number(given, "N")
    ),
    "detectable_format:bigram_wrapping": lambda text, _: all(
        a.startswith("<<") and b.endswith(">>")
        for a, b in zip(text.split()[::2], text.split()[1::2], strict=False)
    ),
    "detectable_format:sentence_hyphens": _sentence_hyphens,
    "detectable_format:square_brackets": lambda text, _: all(
        word[0] == "[" and word[-1] == "]" for word in text.split()
    ),
    "first_word:first_word_answer": lambda text, given: _begin_with(
        [text], phrase(given, "first_word")
    ),
    "first_word:first_word_sent": lambda text, given: _begin_with(
        rule_sentences(text), phrase(given, "first_word")
    ),
    "keywords:exclude_word_harder": lambda text, given: f" {phrase(given, 'keyword')} " not in text,
    "keywords:keyword_specific_position": _nth_word,
    "keywords:no_adjacent_consecutive": lambda text, _: all(
        ord(b[0].lower()[0]) - ord(a[0].lower()[0]) != 1 for a, b in pairwise(text.split())
    ),
    "keywords:palindrome": lambda text, _: any(word == word[::-1] for word in text.split()),
    "keywords:start_end": lambda text, _: (
        len(words := [word.lower() for word in tokens(text)]) > 1 and words[0] == words[-1]
    ),
    "keywords:word_count_different_numbers": lambda text, given: compare(
        occurrences(phrase(given, "keyword"), text), given, "frequency"
    ),
    "keywords:word_once": lambda text, given: occurrences(phrase(given, "keyword"), text) == 1,
    "last_word:last_word_answer": lambda text, given: _end_with([text], phrase(given, "last_word")),
    "last_word:last_word_sent": lambda text, given: _end_with(
        rule_sentences(text), phrase(given, "last_word")
    ),
    "letters:letter_counting": lambda text, given: compare(
        len(re.findall("[a-zA-Z]", text)), given, "N"
    ),
    "new:copy_span_idx": _copy_span,
    "paragraphs:paragraphs": lambda text, _: len(divided(text, r"\s?\*\*\*\s?")) == 2,
    "paragraphs:paragraphs2": lambda text, _: len(divided(text, "\n\n")) == 2,
    "punctuation:punctuation_dot": lambda text, _: "." not in text,
    "punctuation:punctuation_exclamation": lambda text, _: "!" not in text,
}


# --- IFBench -----------------------------------------------------------------------------------


def _stop_words(text: str, given: Given) -> bool:
    words, most = re.findall(r"\w+", text.lower()), number(given, "percentage")
    return bool(words) and 100 * sum(w in _STOP_WORDS for w in words) / len(words) <= most


def _conjunctions(text: str, given: Given) -> bool:
    words = {w for w in text.split() if re.fullmatch(r"(?i)\W*(and|but|for|nor|or|so|yet)\W*", w)}
    return len(words) >= number(given, "small_n")


def _line_indent(text: str, given: Given) -> bool:
    indents = [len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()]
    return all(a < b for a, b in pairwise(indents))


def _keywords_multiple(text: str, given: Given) -> bool:
    counts = [text.lower().count(phrase(given, f"keyword{i}").lower()) for i in range(1, 6)]
    return counts == [1, 2, 3, 5, 7]


IF_BENCH: dict[str, Checker] = {
    "count:conjunctions": _conjunctions,
    "count:keywords_multiple": _keywords_multiple,
    "count:numbers": lambda text, given: (
        len(re.findall(r"\d+", text.translate(_NO_MARKS))) == number(given, "N")
    ),
    "count:person_names": lambda text, given: (
        len(set(re.findall(rf"\b(?:{_NAMES})\b", text))) >= number(given, "N")
    ),
    "count:unique_word_count": lambda text, given: (
        len({word.strip(_EDGES) for word in text.lower().split()}) >= number(given, "N")
    ),
    "count:word_count_range": lambda text, given: (
        len(re.findall(r"\w+", text))
        in range(number(given, "min_words"), number(given, "max_words") + 1)
    ),
    "format:line_indent": _line_indent,
    "format:list": lambda text, given: text.count(phrase(given, "sep")) >= 2,
    "format:no_whitespace": lambda text, _: not any(map(str.isspace, text)),
    "format:sub-bullets": lambda text, _: (
        "*" in text and all("-" in bullet for bullet in text.split("*")[1:])
    ),
    "ratio:stop_words": _stop_words,
    "words:no_consecutive": lambda text, _: all(
        a[0] != b[0] for a, b in pairwise(_words(text.lower()))
    ),
    "words:palindrome": lambda text, _: (
        sum(len(w) >= 5 and w == w[::-1] for w in _words(text.lower())) >= 10
    ),
    "words:repeats": lambda text, given: (
        max(Counter(_words(text.lower())).values(), default=0) <= number(given, "small_n")
    ),
    "words:vowel": lambda text, _: (
        "\n" not in text.strip() and len(set("aeiou") & set(text.lower())) <= 3
    ),
}
