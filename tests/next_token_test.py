from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax.next_token import SamplingRule, draw, sampled_logits

RULE = SamplingRule(stop_ids=(0,))
RULES = [
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 7},
    {"top_k": 20, "top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 2.0, "top_k": 30, "top_p": 0.95, "min_p": 0.05},
    {"top_k": 100},
    {"top_k": 1},
]


def kept_probabilities(logits, rule):
    """By a slow loop, from the definitions, in float64."""
    p = np.exp(logits.astype(np.float64) / rule.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: rule.top_k] if rule.top_k else order
    total, reached, chosen = p[kept].sum(), 0.0, []
    for token in kept:
        if reached < rule.top_p * total:
            chosen.append(token)
            reached += p[token]
    chosen = [token for token in chosen if p[token] >= rule.min_p * p.max()]
    out = np.zeros_like(p)
    out[chosen] = p[chosen] / p[chosen].sum()
    return out


@pytest.mark.parametrize("changes", RULES, ids=str)
def test_draw_follows_the_distribution(changes):
    """Chi-square over 20,000 draws."""
    logits = np.random.default_rng(1).normal(size=(1, 50)).astype(np.float32) * 2
    rule, n = replace(RULE, **changes), 20_000
    shaped = sampled_logits(jnp.asarray(logits), rule)
    drawn = draw(jnp.repeat(shaped, n, 0), jax.random.uniform(jax.random.key(0), (n,)))
    p = kept_probabilities(logits[0], rule)
    np.testing.assert_allclose(jax.nn.softmax(shaped)[0], p, atol=1e-6)
    counts, kept = np.bincount(np.asarray(drawn), minlength=50), p > 0
    assert counts[~kept].sum() == 0
    chi2 = (((counts - n * p)[kept]) ** 2 / (n * p[kept])).sum()
    degrees = kept.sum() - 1
    assert chi2 <= degrees + 4 * np.sqrt(2 * degrees), (chi2, degrees)


def test_tokens_as_likely_as_the_last_one_are_kept():
    logits = jnp.array([[0.0, 1.0, 1.0, 1.0, -1.0]])
    found = sampled_logits(logits, replace(RULE, top_k=2))
    np.testing.assert_array_equal(jnp.isfinite(found)[0], [False, True, True, True, False])


def test_draw_never_picks_an_impossible_token():
    logits = jnp.full((1000, 10), -jnp.inf).at[:, 7].set(0.0)
    uniform = jnp.concatenate([jnp.linspace(0, 1, 999), jnp.array([1 - 1e-7])])
    assert (draw(logits, uniform) == 7).all()


def test_draw_at_the_borders_of_blocks():
    """Targets within rounding of a cumulative sum, with tokens of probability 0 all around."""
    rng = np.random.default_rng(0)
    p = np.zeros((2000, 30), np.float32)
    for row in p:
        row[rng.choice(30, 4, replace=False)] = rng.random(4) + 1e-3
    ends = np.cumsum(p, axis=1, dtype=np.float32)
    border = ends[np.arange(2000), rng.integers(0, 30, 2000)] / ends[:, -1]
    for near in (border, np.nextafter(border, 0), np.nextafter(border, 1)):
        uniform = np.clip(near, 0, np.nextafter(np.float32(1), np.float32(0)))
        drawn = np.asarray(draw(jnp.log(jnp.asarray(p)), jnp.asarray(uniform)))
        assert (p[np.arange(2000), drawn] > 0).all()
