import numpy as np

from prolong_jax.data.prompts import Prompt
from prolong_jax.evaluate import bootstrap_interval, summarise
from prolong_jax.groups import Group


def group(domain, level, scores, statuses=None):
    n = len(scores)
    prompt = Prompt(f"{domain}/{level}", domain, level, domain, (), {}, "test")
    return Group(prompt, [1], [[1]] * n, [[0.0]] * n, [True] * n, [""] * n, scores,
                 statuses or ["ok"] * n, [""] * n, 0)  # fmt: skip


def test_averages_and_pass_by_hand():
    table = summarise(
        [
            group("math", "easy", [1.0, 0.0, 0.0, 0.0]),
            group("math", "hard", [0.0, 0.0, 0.0, 0.0]),
            group("code", "middle", [0.5, 0.5, 1.0, 1.0]),  # binary at evaluation
            group("logic", "easy", [0.5, 0.5, 0.5, 0.5]),  # continuous
        ]
    )
    assert table["math"]["avg_at_k"] == 0.125 and table["math"]["pass_at_k"] == 0.5
    assert table["code"]["avg_at_k"] == 0.5 and table["code"]["pass_at_k"] == 1.0
    assert table["logic"]["avg_at_k"] == 0.5 and table["logic"]["pass_at_k"] == 0.0
    assert table["all"]["avg_at_k"] == (0.25 + 0 + 0.5 + 0.5) / 4
    assert np.isclose(table["easy_middle"]["avg_at_k"], (0.25 + 0.5 + 0.5) / 3)
    assert table["hard"]["avg_at_k"] == 0.0 and table["all"]["k"] == 4
    assert "instruct" not in table


def test_a_fault_of_the_verifier_does_not_count_as_a_wrong_answer():
    table = summarise([group("math", "easy", [1.0, 0.0], ["ok", "error"])])
    assert table["math"]["avg_at_k"] == 1.0


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval((rng.random(60) < 0.3).astype(float), 400)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199
    assert bootstrap_interval(np.full(10, 0.5)) == [0.5, 0.5]
