"""The KL estimators by hand, beyond their limit, and in expectation; the ratio at its extremes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import losses

ESTIMATORS = {"k2": losses.kl_k2, "k3": losses.kl_k3}  # as a loss


def loop_kl(name, logp, ref_logp):
    """k2 and k3 with their tangents beyond the limit."""
    d, limit = ref_logp - logp, losses.KL_LIMIT
    if name == "k2":
        return d * d / 2 if abs(d) <= limit else limit * abs(d) - limit * limit / 2
    if d <= limit:
        return math.exp(d) - d - 1
    return math.exp(limit) - limit - 1 + (math.exp(limit) - 1) * (d - limit)


def difference_quotients(function, x, step=1e-6):
    """Central finite differences in float64, one coordinate at a time."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    ("pi", "ref", "k1", "k2", "k3"),
    [(0.5, 0.4, 0.2231, 0.0249, 0.0231), (0.4, 0.5, -0.2231, 0.0249, 0.0269)],
)
def test_kl_estimators_by_hand(pi, ref, k1, k2, k3):
    logp_BT, ref_logp_BT = jnp.log(jnp.full((1, 1), pi)), jnp.log(jnp.full((1, 1), ref))
    for function, expected in ((losses.kl_k1, k1), (losses.kl_k2, k2), (losses.kl_k3, k3)):
        np.testing.assert_allclose(function(logp_BT, ref_logp_BT)[0, 0], expected, atol=5e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_kl_estimator_and_its_slope_equal_the_loop_beyond_the_limit_too(name):
    limit = losses.KL_LIMIT
    d = np.array(
        [-300.0, -20, -limit - 0.01, -limit + 0.01, -1, 0.5, limit - 0.01, limit + 0.01, 14, 300]
    )
    logp_BT = jnp.asarray(-d[None] - 1.0, dtype=jnp.float32)
    ref_logp_BT = jnp.full_like(logp_BT, -1.0)
    function = ESTIMATORS[name]
    expected_T = [loop_kl(name, float(logp), -1.0) for logp in logp_BT[0]]
    np.testing.assert_allclose(function(logp_BT, ref_logp_BT)[0], expected_T, rtol=1e-5)
    slope_T = jax.grad(lambda logp: function(logp, ref_logp_BT).sum())(logp_BT)[0]
    expected_slope_T = [
        difference_quotients(lambda x: loop_kl(name, float(x), -1.0), np.float64(logp))
        for logp in logp_BT[0]
    ]
    np.testing.assert_allclose(slope_T, expected_slope_T, rtol=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("odds", [1e-6, 0.05, 0.2, 5.0, 1e6])
def test_the_pull_of_the_kl_never_dies(name, odds):
    """Where pi / pi_ref = odds: at least as strong as at 0.2 (pushing up) or 5 (pushing down)."""

    def slope(odds):
        ref_logp_BT = jnp.full((1, 1), -20.0)
        logp_BT = ref_logp_BT + math.log(odds)
        return float(jax.grad(lambda x: ESTIMATORS[name](x, ref_logp_BT).sum())(logp_BT)[0, 0])

    assert slope(odds) * math.log(odds) > 0
    assert abs(slope(odds)) >= abs(slope(0.2 if odds < 1 else 5.0)) > 0.5


def expected_gradient(estimator, logits_V, ref_logp_V):
    """Exact expectation over tokens drawn from pi of the gradient of an estimator's value."""
    pi_V = jax.nn.softmax(logits_V)

    @jax.jit
    @jax.grad
    def gradient(logits_V):
        estimate_BT = estimator(jax.nn.log_softmax(logits_V)[None], ref_logp_V[None])
        return jnp.sum(jax.lax.stop_gradient(pi_V) * estimate_BT[0])

    return np.asarray(gradient(logits_V), np.float64)


@pytest.mark.parametrize("seed", range(3))
def test_k2_has_the_gradient_of_the_reverse_kl_k3_nearly_and_k1_none(seed):
    rng = np.random.default_rng(seed)
    logits_V = jnp.asarray(0.7 * rng.normal(size=6), dtype=jnp.float32)
    ref_logp_V = jax.nn.log_softmax(jnp.asarray(0.7 * rng.normal(size=6), dtype=jnp.float32))

    def reverse_kl(logits_V):
        logp_V = jax.nn.log_softmax(logits_V)
        return jnp.sum(jnp.exp(logp_V) * (logp_V - ref_logp_V))

    def cosine(x, y):
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    exact = np.asarray(jax.grad(reverse_kl)(logits_V), np.float64)
    k1, k2, k3 = (
        expected_gradient(estimator, logits_V, ref_logp_V)
        for estimator in (losses.kl_k1, losses.kl_k2, losses.kl_k3)
    )
    assert np.linalg.norm(exact) > 0.05
    np.testing.assert_allclose(k1, 0.0, atol=1e-6)
    np.testing.assert_allclose(k2, exact, rtol=1e-4, atol=1e-6)
    assert 0.9 < cosine(k3, exact) < 0.999


def test_the_value_of_k3_is_unbiased():
    logp_V = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.8, 0.0]))
    ref_logp_V = jax.nn.log_softmax(jnp.array([-0.5, 0.2, 0.4, 0.1]))
    exact = jnp.sum(jnp.exp(logp_V) * (logp_V - ref_logp_V))
    for estimator in (losses.kl_k1, losses.kl_k3):
        expectation = jnp.sum(jnp.exp(logp_V) * estimator(logp_V[None], ref_logp_V[None])[0])
        np.testing.assert_allclose(expectation, exact, rtol=1e-5)


def test_kl_estimators_are_never_negative_near_the_reference():
    logp_BT = jnp.full((1, 2001), -1.0)
    ref_logp_BT = logp_BT + jnp.linspace(-1e-3, 1e-3, 2001)[None]
    for estimator in ESTIMATORS.values():
        assert float(estimator(logp_BT, ref_logp_BT).min()) >= 0.0
