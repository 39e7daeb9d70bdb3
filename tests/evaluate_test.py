import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from prolong_jax.config import TINY_BASE, RunConfig, SourceSettings, ValidationSettings, build
from prolong_jax.data.prompts import Prompt
from prolong_jax.evaluate import held_out_prompts, main, records, validation_metrics
from prolong_jax.groups import Group
from prolong_jax.outcomes import outcomes, read_outcomes, summarise, vote_of
from prolong_jax.scores import (
    bootstrap_interval,
    maj_at_k,
    paired_difference,
    pass_at_k,
    powers_of_two,
)
from prolong_jax.tokenizer import ChatTokenizer

TINY = "experiments/configs/tiny.py"
TOKENIZER = ChatTokenizer(TINY_BASE)


def group(domain, level, scores, statuses=None, texts=None, source="procedural", **reference):
    n = len(scores)
    prompt = Prompt(f"{domain}/{level}/{source}", domain, level, domain,
                    ({"role": "user", "content": "?"},), reference, source)  # fmt: skip
    return Group(prompt, [1], [[1, 2]] * n, [[-0.5, -1.5]] * n, [True] * n, texts or [""] * n,
                 scores, statuses or ["ok"] * n, [""] * n, 0)  # fmt: skip


def table_of(*groups):
    return summarise(list(outcomes(records(groups, TOKENIZER))))


# --- estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [i < c for i in range(n)]
        expected = np.mean([any(subset) for subset in itertools.combinations(samples, k)])
        assert pass_at_k(c, n, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    from fractions import Fraction
    from math import comb

    for c, n, k in ((1, 4000, 256), (40, 4000, 256), (2000, 4096, 2), (3, 512, 256), (0, 512, 9)):
        exact = 1 - Fraction(comb(n - c, k), comb(n, k))
        assert pass_at_k(c, n, k) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("c_n_k", [(3, 2, 1), (0, 4, 5), (0, 4, 0), (-1, 4, 2)])
def test_pass_at_k_out_of_range_is_refused(c_n_k):
    with pytest.raises(ValueError, match="pass@k: expected"):
        pass_at_k(*c_n_k)


def test_pass_at_k_is_shown_for_powers_of_two_and_all():
    assert powers_of_two(1) == [1]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["7", "7", "3"], [1, 1, 0], 1.0),
        (["3", "3", "7"], [0, 0, 1], 0.0),
        (["3", "7"], [0, 1], 0.5),  # a tie is shared
        (["3", "7", "8", "7", "3"], [0, 1, 0, 1, 0], 0.5),
        ([None, None, None, "7"], [0, 0, 0, 1], 1.0),  # no answer, no vote
        ([None, None], [0, 0], 0.0),
        (["a", "a", "b"], [0.4, 0.6, 1.0], 0.5),  # continuous: the mean of the elected answer
    ],
)
def test_maj_at_k_by_hand(answers, scores, expected):
    assert maj_at_k(answers, scores) == expected


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval((rng.random(60) < 0.3).astype(float), 400)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199
    assert bootstrap_interval(np.full(10, 0.5)) == [0.5, 0.5]


def test_interval_is_that_of_all_resamples():
    """Three prompts have 27 resamples, each as likely: their quantiles, by enumeration."""
    values = np.array([0.0, 0.3, 1.0])
    means = np.mean(list(itertools.product(values, repeat=3)), axis=1)
    found = bootstrap_interval(values, 100_000)
    expected = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_paired_difference_does_not_see_how_hard_the_prompts_are():
    before = np.linspace(0, 0.9, 50)
    difference, (low, high) = paired_difference(before, before + 0.1)
    assert difference == pytest.approx(0.1) and high - low < 1e-12
    difference, (low, high) = paired_difference(before, before[::-1])
    assert difference == pytest.approx(0) and low < -0.1 and high > 0.1


# --- tables --------------------------------------------------------------------------------------


def test_averages_and_pass_by_hand():
    table = table_of(
        group("math", "easy", [1.0, 0.0, 0.0, 0.0]),
        group("math", "hard", [0.0, 0.0, 0.0, 0.0]),
        group("code", "middle", [0.5, 0.5, 1.0, 1.0]),  # binary at evaluation
        group("logic", "easy", [0.5, 0.5, 0.5, 0.5]),  # continuous
    )
    assert table["math"]["avg_at_k"] == 0.125 and table["math"]["pass_at_k"] == 0.5
    assert table["code"]["avg_at_k"] == 0.5 and table["code"]["pass_at_k"] == 1.0
    assert table["logic"]["avg_at_k"] == 0.5 and table["logic"]["pass_at_k"] == 0.0
    assert table["all"]["avg_at_k"] == (0.25 + 0 + 0.5 + 0.5) / 4
    assert np.isclose(table["easy_middle"]["avg_at_k"], (0.25 + 0.5 + 0.5) / 3)
    assert table["hard"]["avg_at_k"] == 0.0 and table["all"]["k"] == 4
    assert "instruct" not in table and "source/procedural" not in table
    assert table["math"]["pass_at"] == pytest.approx({"1": 0.125, "2": 0.25, "4": 0.5})
    assert table["code"]["pass_at"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0})
    assert table["all"]["len_mean"] == 2 and table["all"]["sampled_nll"] == 1.0
    metrics = validation_metrics(table)
    assert metrics["validation/code/pass@2"] == pytest.approx(5 / 6)
    assert metrics["validation/math/avg"] == 0.125 and metrics["validation/math/k"] == 4
    assert "validation/math/maj" in metrics and "validation/code/maj" not in metrics


def test_a_fault_of_the_verifier_does_not_count_as_a_wrong_answer():
    table = table_of(group("math", "easy", [1.0, 0.0, 0.0], ["ok", "error", "ok"]))
    assert table["math"]["avg_at_k"] == 0.5 and table["math"]["pass_at"]["2"] == 1.0
    assert table_of(group("math", "easy", [0.0], ["error"])) == {}


def test_majority_of_responses():
    right, wrong = r"so</think>\boxed{1/2}", r"</think>\boxed{3}"
    table = table_of(
        group("math", "", [1, 1, 0, 0, 0], texts=[right, r"</think>\boxed{0.5}", wrong, "", ""])
    )
    assert table["math"]["maj_at_k"] == 1.0 and table["math"]["avg_at_k"] == pytest.approx(0.4)
    mixed = table_of(group("math", "", [1.0], texts=[right]), group("code", "", [1.0]))
    assert mixed["math"]["maj_at_k"] == 1.0
    assert "maj_at_k" not in mixed["code"] and "maj_at_k" not in mixed["all"]


@pytest.mark.parametrize(
    ("verifier", "response", "expected"),
    [
        ("math", r"a</think>\boxed{1{,}000 }", "1000"),
        ("math", r"\boxed{1,000}", "1000"),
        ("math", r"\boxed{ 2/4 }", "1/2"),
        ("math", r"\boxed{1/0}", "1/0"),
        ("math", r"\boxed{x + 1}", "x+1"),
        ("math", r"<think>\boxed{5}", None),  # still thinking
        ("math", "5", None),
        ("stem", r"\boxed{84 m}", "84m"),
        ("logic", "<answer>[1, 2]\n</answer>", "[1,2]"),
        ("logic", "<answer></answer>", None),
        ("code", "```python\n```", None),
        ("instruct", "text", None),
    ],
)
def test_what_a_response_votes_for(verifier, response, expected):
    assert vote_of(verifier, {}, response) == expected


def test_a_choice_votes_for_its_letter():
    assert vote_of("stem", {"options": ["x", "y"]}, r"\boxed{\text{B}}") == "B"
    assert vote_of("stem", {"options": ["x", "y"]}, r"\boxed{B or A}") is None
