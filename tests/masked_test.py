"""Masked reductions, token log-probabilities and entropy against loops in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import masked, sequences
from prolong_jax.types import Mean

SEEDS = range(5)
# Rows with two responses each: the second starts at slot 3, behind it lies padding.
SEGMENTS_T = jnp.array([1, 1, 1, 2, 2, 2, 0])


def token_mean(x_BT, mask_BT):
    return masked.token_mean(x_BT, mask_BT)


def sequence_mean(x_BT, mask_BT):
    """One response per row where rows are short, else packed as SEGMENTS_T says."""
    length = x_BT.shape[1]
    segments_T = SEGMENTS_T if length == 7 else jnp.ones(length, dtype=jnp.int32)
    return sequences.sequence_mean(x_BT, mask_BT, jnp.broadcast_to(segments_T, x_BT.shape))


REDUCTIONS = [token_mean, sequence_mean]


def random_case(seed, num_rows=5):
    """Values, and a mask that has holes, a row without any token, and half a row."""
    rng = np.random.default_rng(seed)
    x_BT = rng.normal(size=(num_rows, 7)).astype(np.float32)
    mask_BT = rng.random((num_rows, 7)) < 0.6
    mask_BT[0], mask_BT[1, :3], mask_BT[1, 3], mask_BT[:, 6] = False, False, True, False
    return jnp.asarray(x_BT), jnp.asarray(mask_BT)


def loop_token_mean(x_BT, mask_BT):
    values = [float(x) for x, real in zip(x_BT.ravel(), mask_BT.ravel(), strict=True) if real]
    return sum(values), len(values)


def loop_sequence_mean(x_BT, mask_BT):
    means = []
    for b, start in np.ndindex(len(x_BT), 2):
        slots = range(3 * start, 3 * start + 3)
        values = [float(x_BT[b, t]) for t in slots if mask_BT[b, t]]
        if values:
            means.append(sum(values) / len(values))
    return sum(means), len(means)


chosen_logp, entropy = jax.jit(masked.chosen_logp), jax.jit(masked.entropy)
LOOPS = {token_mean: loop_token_mean, sequence_mean: loop_sequence_mean}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_reduction_equals_its_loop(reduction, seed):
    x_BT, mask_BT = random_case(seed)
    total, weight = LOOPS[reduction](np.asarray(x_BT), np.asarray(mask_BT))
    mean = reduction(x_BT, mask_BT)
    np.testing.assert_allclose(mean.total, total, rtol=1e-5, atol=1e-6)
    assert mean.weight == weight
    np.testing.assert_allclose(masked.divide(mean), total / weight, rtol=1e-5, atol=1e-6)


def test_long_responses_weigh_more_in_the_token_mean_only():
    x_BT = jnp.array([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    mask_BT = jnp.array([[True] * 4, [True, False, False, False]])
    assert masked.divide(token_mean(x_BT, mask_BT)) == pytest.approx(9 / 5)
    assert masked.divide(sequence_mean(x_BT, mask_BT)) == pytest.approx(3.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_add_up_to_the_whole(reduction):
    x_BT, mask_BT = random_case(0)
    mean = Mean(jnp.zeros(()), jnp.zeros(()))
    for rows in ([0], [1, 2, 3], [4]):
        mean = masked.add(mean, reduction(x_BT[jnp.array(rows)], mask_BT[jnp.array(rows)]))
    whole = reduction(x_BT, mask_BT)
    np.testing.assert_allclose(mean.total, whole.total, rtol=1e-6)
    assert mean.weight == whole.weight


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_values_reach_neither_value_nor_gradient(reduction, bad):
    x_BT, mask_BT = random_case(0)
    bad_BT = jnp.where(mask_BT, x_BT, bad)

    @jax.value_and_grad  # not compiled: XLA turns x * mask into a select and would hide 0 * inf
    def loss(x_BT):
        return masked.divide(reduction(x_BT, mask_BT))

    value, gradient_BT = loss(bad_BT)
    expected, expected_gradient_BT = loss(x_BT)
    assert value == expected
    np.testing.assert_array_equal(gradient_BT, expected_gradient_BT)
    assert not np.any(np.asarray(gradient_BT)[~np.asarray(mask_BT)])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_tokens_the_weight_and_the_mean_are_zero(reduction):
    x_BT = jnp.full((2, 3), jnp.nan)
    mask_BT = jnp.zeros((2, 3), dtype=bool)
    mean = reduction(x_BT, mask_BT)
    assert (mean.total, mean.weight) == (0.0, 0.0)
    value, gradient_BT = jax.value_and_grad(lambda x: masked.divide(reduction(x, mask_BT)))(x_BT)
    assert value == 0.0
    np.testing.assert_array_equal(gradient_BT, 0.0)


def test_divide_has_a_finite_gradient_at_weight_zero():
    gradient = jax.grad(masked.divide)(Mean(jnp.float32(3.0), jnp.float32(0.0)))
    assert (gradient.total, gradient.weight) == (0.0, 0.0)
    gradient = jax.grad(masked.divide)(Mean(jnp.float32(3.0), jnp.float32(2.0)))
    assert (gradient.total, gradient.weight) == (0.5, -0.75)


def test_reductions_of_bfloat16_are_done_in_float32():
    x_BT = jnp.full((8, 1000), 1.0, dtype=jnp.bfloat16)  # bfloat16 cannot hold 8 * 999
    mask_BT = jnp.ones((8, 1000), dtype=bool).at[:, 0].set(False)
    mean = masked.token_mean(x_BT, mask_BT)
    assert (mean.total, mean.weight) == (8 * 999, 8 * 999)
    assert mean.total.dtype == mean.weight.dtype == jnp.float32


def loop_logp(logits_BTV):
    """log softmax in float64, one position at a time."""
    logp_BTV = np.empty(logits_BTV.shape)
    for index in np.ndindex(logits_BTV.shape[:2]):
        logits = [float(x) for x in logits_BTV[index]]
        top = max(logits)
        log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
        logp_BTV[index] = [x - log_sum for x in logits]
    return logp_BTV


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_chosen_logp_and_entropy_equal_their_loops(scale):
    rng = np.random.default_rng(0)
    logits_BTV = (scale * rng.normal(size=(3, 4, 6))).astype(np.float32)
    tokens_BT = rng.integers(0, 6, size=(3, 4))
    logp_BTV = loop_logp(logits_BTV)
    actual_BT = chosen_logp(jnp.asarray(logits_BTV), jnp.asarray(tokens_BT))
    entropy_BT = entropy(jnp.asarray(logits_BTV))
    for b, t in np.ndindex(3, 4):
        logp_V = logp_BTV[b, t]
        np.testing.assert_allclose(actual_BT[b, t], logp_V[tokens_BT[b, t]], rtol=1e-5, atol=1e-5)
        expected = -sum(math.exp(logp) * logp for logp in logp_V)
        np.testing.assert_allclose(entropy_BT[b, t], expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_normalised_in_float32():
    logits_BTV = jnp.zeros((1, 1, 1000), dtype=jnp.bfloat16)
    logp_BT = chosen_logp(logits_BTV, jnp.zeros((1, 1), dtype=jnp.int32))
    assert logp_BT.dtype == entropy(logits_BTV).dtype == jnp.float32
    np.testing.assert_allclose(logp_BT, -math.log(1000), rtol=1e-6)
    np.testing.assert_allclose(entropy(logits_BTV), math.log(1000), rtol=1e-6)


def test_gradient_of_chosen_logp_is_one_hot_minus_probability():
    logits_BTV = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 5)), dtype=jnp.float32)
    tokens_BT = jnp.array([[3, 0]])
    gradient = jax.jit(jax.grad(lambda logits: chosen_logp(logits, tokens_BT).sum()))(logits_BTV)
    expected = jax.nn.one_hot(tokens_BT, 5) - np.exp(loop_logp(np.asarray(logits_BTV)))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_excluded_tokens_leave_entropy_and_gradients_finite():
    logits_BTV = jnp.array([[[1.0, 2.0, -jnp.inf, 0.5], [0.0, -jnp.inf, -jnp.inf, -jnp.inf]]])
    tokens_BT = jnp.array([[1, 0]])
    kept = loop_logp(np.array([[[1.0, 2.0, 0.5]]]))[0, 0]
    expected = [-np.sum(np.exp(kept) * kept), 0.0]
    np.testing.assert_allclose(entropy(logits_BTV)[0], expected, rtol=1e-6)
    for function in (entropy, lambda logits: chosen_logp(logits, tokens_BT)):
        gradient = jax.jit(jax.grad(lambda logits, f=function: f(logits).sum()))(logits_BTV)
        assert np.all(np.isfinite(gradient))
