"""IFEval checkers: each in both directions, and the published verdicts on real responses."""

import json
import os
import random
import time
from pathlib import Path

import pytest

from prolong_jax.verifiers import Status, instruct
from prolong_jax.verifiers.instruct_text import rule_sentences, sentence_tokens, sentences, tokens

LONG = "the quick brown fox jumps over the lazy dog and then it runs away into the deep forest. "
SPANISH = "el perro corre por la calle y despues se va a dormir en la casa de su amigo viejo. "
COUNT = {"relation": "at least"}

# id, arguments, a text that passes, a text that fails
CASES = [
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("change_case:english_lowercase", {}, LONG * 3, LONG * 3 + "X"),
    ("change_case:english_lowercase", {}, LONG * 3, SPANISH * 3),
    ("change_case:english_lowercase", {}, LONG, "etchings"),  # langdetect: German
    ("change_case:english_capital", {}, LONG.upper(), LONG.upper() + "x"),
    ("keywords:existence", {"keywords": ["sun", "c++"]}, "Sunny C++", "sun and c"),
    ("keywords:forbidden_words", {"forbidden_words": ["car"]}, "carpet", "my Car."),
    ("keywords:frequency", {"keyword": "dog", "frequency": 2.0, **COUNT}, "Dog dogs", "dog"),
    (
        "keywords:frequency",
        {"keyword": "dog", "frequency": 2, "relation": "less than", "spare": None},
        "dog",
        "dog dog",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "n", "let_frequency": 2, "let_relation": "at least"},
        "Nun",
        "no",
    ),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So. the END."', "The end. Not."),
    ("startend:quotation", {}, ' "yes" ', '"yes'),
    ("startend:quotation", {}, '""', '"'),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n\n - b", "* a"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a", "** a\n+ b"),
    ("detectable_format:title", {}, "<<A>>\nb", "<< >>\nb"),
    ("detectable_format:title", {}, "x <<<A>> y", "<<A\n>>"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\np. s. b", "a ps b"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S b", "P.S. b"),
    ("length_constraints:number_words", {"num_words": 3, **COUNT}, "a b-c", "a b"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, **COUNT},
        "It is. We go.",
        "It is.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a***b***", "a*** ***b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "a\n\nSo, b",
        "so\n\na",
    ),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* b"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it now", "now say it"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a] [b"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1 a Day 2 b",
        "Day 1 a Day b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "My answer is No."),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "I AM",
        "I am",
    ),
    ("language:response_language", {"language": "es"}, SPANISH * 3, LONG * 3),
]

PROMPT = {"prompt_to_repeat": "Tell me a story"}
FIVE = {f"keyword{i}": word for i, word in enumerate("abcde", 1)}
# The later instructions, in the same way.
LATER_CASES = [
    ("copy:copy", PROMPT, " tell me a story\n", "Tell me a story. Once"),
    ("copy:copying_simple", PROMPT, "Tell me a story", "Tell me the story"),
    (
        "copy:copying_multiple",
        {**PROMPT, "N": 2},
        "Tell me a story ****** tell me a story",
        "Tell me a story",
    ),
    (
        "copy:repeat_phrase",
        {"phrase": "the pen is mighty", "small_n": 2},
        "the cat is mighty, the pen was mighty",
        "the pen is mighty the pen is mighty",
    ),
    (
        "copy:repeat_phrase",
        {"phrase": "the pen is mighty", "small_n": 1},
        "the pen was mighty",
        "the cat was mighty",
    ),
    ("new:copy_span_idx", {**PROMPT, "n_start": 5, "n_end": 9}, "me a", "me a s"),
    ("detectable_format:sentence_hyphens", {}, "It rains.-We go.", "It rains. - We go."),
    ("detectable_format:square_brackets", {}, "[so] [it]", "[so it]"),
    ("detectable_format:bigram_wrapping", {}, "<<I am>> <<at home>> now", "<<I am>> at home"),
    ("keywords:no_adjacent_consecutive", {}, "a c b", "a big"),
    ("keywords:word_once", {"keyword": "sun"}, "The Sun.", "Sunny sun"),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "sun", "frequency": 2, "relation": "less than"},
        "sun",
        "sun sun",
    ),
    ("keywords:exclude_word_harder", {"keyword": "sun"}, "sunny sun.", "the sun is"),
    ("keywords:palindrome", {}, "a level field", "it is ok"),
    (
        "keywords:keyword_specific_position",
        {"keyword": "we", "n": 2, "m": 3},
        "It rains. So, we go.",
        "It rains. So we go.",
    ),
    (
        "keywords:keyword_specific_position",
        {"keyword": ["Mr."], "n": 1.0, "m": 1.0},
        "Mr. X left.",
        "mr. X left.",
    ),
    ("keywords:start_end", {}, "Sun is the sun", "Sun is the sun."),
    ("paragraphs:paragraphs", {}, "a\n***\nb", "a\n\nb"),
    ("paragraphs:paragraphs2", {}, "a\n\nb\n\n", "a\n\n\n\nb"),
    (
        "first_word:first_word_sent",
        {"first_word": ["so"]},
        "So it is. so we go.",
        "So it is. We go.",
    ),
    ("first_word:first_word_answer", {"first_word": "So"}, "so it is", "so, it is"),
    ("last_word:last_word_sent", {"last_word": "sun"}, 'The sun. "My Sun!"', "The sun. The end."),
    ("last_word:last_word_answer", {"last_word": "sun"}, "It is the Sun.", "sun it is"),
    ("punctuation:punctuation_dot", {}, "a, b!", "a."),
    ("punctuation:punctuation_exclamation", {}, "a.", "a!"),
    ("count:lowercase_counting", {"N": 2}, "a b C D", "a b c"),
    ("letters:letter_counting", {"N": 3, "relation": "less than"}, "a1b", "abc"),
    (
        "letters:letter_counting2",
        {"letter": "A", "let_frequency": 2, "let_relation": "at least"},
        "a a",
        "a b",
    ),
    (
        "count:counting_composition",
        {"n_sent": 2, "n_words": 3},
        "I go. We go.\n***\nI go! We go!***So be. It is.",
        "I go. We go.***I go.***I go. We go.",
    ),
    ("count:count_unique", {}, "We go. Why?", "We go, we do, or not"),
    (
        "count:count_increment_word",
        {"keyword1": "sun", "keyword2": "sea"},
        "sun sea Sea",
        "sun sea",
    ),
    ("count:conjunctions", {"small_n": 2}, "and, so", "and and"),
    ("count:keywords_multiple", FIVE, "a bb ccc ddddd eeeeeee", "a bb ccc ddddd eeeeee"),
    ("count:numbers", {"N": 2}, "1,000 and 2.5", "1 and 2 and 3"),
    ("count:person_names", {"N": 2}, "Emma, Liam", "Emma, Emma, Liamson"),
    ("count:unique_word_count", {"N": 2}, "a b", "a A a."),
    ("count:word_count_range", {"min_words": 2, "max_words": 3.0}, "a b c", "a b c d"),
    ("format:line_indent", {}, "a\n b\n\n  c", "a\n b\n c"),
    ("format:list", {"sep": "..."}, "... a\n... b", "... a"),
    ("format:no_whitespace", {}, "so-it", "so it"),
    ("format:sub-bullets", {}, "* a\n - b", "a - b"),
    ("ratio:stop_words", {"percentage": 50.0}, "the sea", "the sea of the"),
    ("words:no_consecutive", {}, "a bag is", "big bag"),
    ("words:palindrome", {}, "Level " * 10, "level " * 9),
    ("words:repeats", {"small_n": 1}, "a b", "a A."),
    ("words:vowel", {}, "the sea is", "a big sun out here"),
]


def check(name: str, arguments: dict, text: str) -> float:
    verdict = instruct.verify(text, {"instruction_id_list": [name], "kwargs": [arguments]})
    assert verdict.status == Status.OK, verdict
    return verdict.score


@pytest.mark.parametrize("name, arguments, passing, failing", CASES + LATER_CASES)
def test_each_checker_in_both_directions(name, arguments, passing, failing):
    assert check(name, arguments, passing) == 1.0
    assert check(name, arguments, failing) == 0.0
    assert check(name, arguments, f"<think>{failing}</think>{passing}") == 1.0
    assert check(name, arguments, "") == 0.0


def test_every_checker_has_a_case():
    assert {case[0] for case in CASES + LATER_CASES} == set(instruct.COVERED)


def test_the_reward_is_the_mean_or_all():
    reference = {
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [None, {"unused": None}],
    }
    assert instruct.verify("a b", reference).score == 0.5
    assert instruct.verify("a b", {**reference, "mode": "all"}).score == 0.0
    assert instruct.verify("<<a>>", {**reference, "mode": "all"}).score == 1.0
    assert instruct.verify("<think>x</think> \n", reference).score == 0.0
    assert instruct.verify("<think><<a>>", reference).score == 0.0


@pytest.mark.parametrize(
    "reference",
    [
        {},
        {"instruction_id_list": [], "kwargs": []},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"instruction_id_list": ["new:unknown"], "kwargs": [{}]},
        {"instruction_id_list": [["x"]], "kwargs": [{}]},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "mode": "some"},
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]},
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "word"}]},
        {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": 3}]},
        {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{}]},
        {
            "instruction_id_list": ["length_constraints:number_words"],
            "kwargs": [{"num_words": 2.5, "relation": "at least"}],
        },
        {"instruction_id_list": ["count:lowercase_counting"], "kwargs": [{"N": -1}]},
        {"instruction_id_list": ["count:lowercase_counting"], "kwargs": [{"N": True}]},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [["x"]]},
    ],
)
@pytest.mark.parametrize("text", ["some text", ""])
def test_broken_references_are_our_error(reference, text):
    assert instruct.verify(text, reference).status == Status.ERROR


def test_unknown_ids_are_named():
    ids = ["punctuation:no_comma", "b:c", "a:b", "b:c"]
    assert instruct.unknown_ids({"instruction_id_list": ids}) == ["a:b", "b:c"]
    assert instruct.unknown_ids({}) == []


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        ("One", 1),
        ("One. Two! Three? Four", 4),
        ("Wait... what", 1),
        ("J. Smith came. He left.", 2),
        ("It costs 3. apples cost 4. Yes.", 2),
        ('He said "Go." Then he went.', 2),
        ("What?! No.", 2),
        ("See e.g. this. And that.", 3),
    ],
)
def test_sentences_are_counted_as_untrained_punkt_does(text, count):
    assert len(sentences(text)) == count


def test_sentences_keep_their_closing_marks():
    assert sentences('"Go." (Why?) So\n it\tis') == ['"Go."', "(Why?)", "So\n it\tis"]
    assert sentences("Shi'a. We go. 3. ... So") == ["Shi'a.", "We go.", "3.", "... So"]


@pytest.mark.parametrize(
    "text, cut",
    [
        ("Mr. X of the U.S. left. He\nran!", ["Mr. X of the U.S. left.", "He ran!"]),
        ("We saw the U.S. They did not.", ["We saw the U.S.", "They did not."]),
        (
            'He said "Go." So... it is 2.5 at x.com now',
            ['He said "Go".', "So...", "it is 2.5 at x.com now"],
        ),
        ("Ph.D. Acme Inc. pays, e.g. plan b. today", ["Ph.D. Acme Inc. pays, e.g. plan b. today"]),
        ("What?! ", ["What?", "!"]),
        ("", []),
    ],
)
def test_sentences_by_the_rules(text, cut):
    assert rule_sentences(text) == cut


def test_words_are_cut_as_in_the_penn_treebank():
    text = "\"I can't,\" he said: it's 1,000 o'clock (U.S. time) -- cannot wait..."
    wanted = "`` I ca n't , '' he said : it 's 1,000 o'clock ( U.S. time ) -- can not wait ..."
    assert sentence_tokens(text) == wanted.split()
    assert sentence_tokens("a 'bad' law") == ["a", "'", "bad", "'", "law"]
    assert tokens("So it is. Yes.") == ["So", "it", "is", ".", "Yes", "."]


ALL_CASES = CASES + LATER_CASES
JUNK = [
    "<",
    "[",
    "\n",
    "*",
    ". ",
    ".",
    "a ",
    "a",
    '"',
    "-",
    " \t",
    ".)",
    "a@",
    "Day 1 ",
    "<answer>",
]


def score_all(text: str):
    names, arguments = [c[0] for c in ALL_CASES], [c[1] for c in ALL_CASES]
    return instruct.verify(text, {"instruction_id_list": names, "kwargs": arguments})


@pytest.mark.parametrize("junk", JUNK)
def test_the_time_grows_no_faster_than_the_text(junk):
    """A quadratic checker would take 25 times as long."""
    used = []
    for length in (2_000, 10_000):
        start = time.process_time()
        assert score_all(junk * (length // len(junk)) + "x").status == Status.OK
        used.append(time.process_time() - start)
    assert used[1] < max(12 * used[0], 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("junk", JUNK)
def test_a_megabyte_takes_two_seconds_at_most_for_each_id(junk):
    text = junk * (1_000_000 // len(junk)) + "x"
    for name, arguments, _, _ in ALL_CASES:
        start = time.process_time()
        check(name, arguments, text)
        assert time.process_time() - start < 4.0, name  # 2 s on a machine without other work


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = [c[2] for c in ALL_CASES] + ["\ud800", "\x00", "İ", "\u2028", "ß", "…", "1", "'", " "]
    for _ in range(60):
        chosen = [rng.choice([rng.choice(pieces), chr(rng.randrange(0x11000))]) for _ in range(9)]
        assert score_all("".join(chosen)).status == Status.OK


@pytest.mark.parametrize("case", [case for case in ALL_CASES if case[1]])
def test_a_missing_argument_is_our_error_and_named(case):
    for key in case[1]:
        arguments = {**case[1], key: None}
        for text in (case[2], ""):
            verdict = instruct.verify(
                text, {"instruction_id_list": [case[0]], "kwargs": [arguments]}
            )
            if key != "spare":
                assert verdict.status == Status.ERROR
                assert case[0] in verdict.detail and key in verdict.detail


def test_the_answer_block_is_what_counts():
    reference = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert instruct.verify("a, b <answer>a b</answer>", reference).score == 1.0
    assert instruct.verify("a b <answer>a</answer> b, c", reference).score == 0.0
    assert instruct.verify("a, b <answer>a b", reference).score == 0.0  # not closed: all of it
    assert instruct.verify("a b <answer> </answer>", reference).detail == "empty response"


# The one verdict that no rule gives: the letter asked for is "#", which the official checker
# replaces by a letter drawn at random (its loose verdict on the same text is the opposite).
BY_CHANCE = {(1122, "keywords:letter_frequency")}


def test_published_strict_verdicts():
    """The official checker's verdicts on the published responses of GPT-4."""
    folder = os.environ.get("PROLONG_TEST_DATA")
    if not folder:
        pytest.skip("PROLONG_TEST_DATA is not set")
    inputs, responses, results = (
        [json.loads(line) for line in (Path(folder) / "ifeval" / name).read_text().splitlines()]
        for name in (
            "input_data_at_b7f222394_matches_gpt4.jsonl",
            "input_response_data_gpt4_20231107_145030.jsonl",
            "gpt4_official_checker_results_punkt_untrained.jsonl",
        )
    )
    text = {row["prompt"]: row["response"] for row in responses}
    strict = {row["key"]: row["strict"] for row in results}
    found, checked = set(), 0
    for row in inputs:
        parts = zip(row["instruction_id_list"], row["kwargs"], strict[row["key"]], strict=True)
        for name, arguments, wanted in parts:
            checked += 1
            if check(name, arguments, text[row["prompt"]]) != wanted:
                found.add((row["key"], name))
    assert checked == 834
    assert found == BY_CHANCE


@pytest.mark.parametrize("name", ["instruction_following", "ifbench"])
def test_published_rewards_of_nemo_gym(name):
    """The verdicts in the example rollouts; an instruction that is not covered is left out."""
    folder = os.environ.get("PROLONG_TEST_DATA")
    if not folder:
        pytest.skip("PROLONG_TEST_DATA is not set")
    path = Path(folder) / "nemo_gym" / f"{name}__example_rollouts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    checked, unknown = 0, set()
    for row in rows:
        text = row["response"]["output"][-1]["content"][0]["text"]
        unknown.update(instruct.unknown_ids(row))
        if not instruct.unknown_ids(row):
            assert instruct.verify(text, {**row, "mode": "all"}).score == row["reward"]
        parts = zip(
            row["instruction_id_list"], row["kwargs"], row["follow_instruction_list"], strict=True
        )
        for identity, arguments, followed in parts:
            if identity in instruct.COVERED:
                assert check(identity, arguments, text) == followed
                checked += 1
    assert (checked, unknown) == {
        "instruction_following": (13, set()),
        "ifbench": (4, {"words:start_verb"}),
    }[name]
