"""The objective against loops in float64, by hand where the clip matters, and at its extremes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import losses, masked
from prolong_jax.types import Batch, Mean

SETTINGS = {"clip_low": 0.2, "clip_high": 0.4, "kl_coef": 0.05, "tis_cap": 1.1}
ESTIMATORS = list(losses.KL_ESTIMATORS)
LOGPS = ("old_logp", "ref_logp", "sampler_logp")
FIELDS = ("logp", *LOGPS, "advantage")


def random_case(seed, num_rows=4, length=5):
    """A policy's logp and a batch whose ratios fall on both sides of both clip bounds."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, length)
    logp_BT = -rng.exponential(size=shape)
    mask_BT = rng.random(shape) < np.linspace(0.4, 0.9, num_rows)[:, None]

    def noisy(scale):
        return jnp.asarray(logp_BT + scale * rng.normal(size=shape), dtype=jnp.float32)

    batch = Batch(
        tokens=jnp.zeros(shape, dtype=jnp.int32),
        positions=jnp.zeros(shape, dtype=jnp.int32),
        segments=jnp.ones(shape, dtype=jnp.int32),
        prompts=jnp.ones(shape, dtype=jnp.int32),
        mask=jnp.asarray(mask_BT),
        sampler_logp=noisy(0.5),
        old_logp=noisy(0.5),
        ref_logp=noisy(4.0),
        advantage=jnp.asarray(rng.normal(size=shape), dtype=jnp.float32),
    )
    return jnp.asarray(logp_BT, dtype=jnp.float32), batch


def on_masked(x_BT, mask_BT, value):
    return jnp.where(mask_BT, x_BT, value)


@functools.partial(jax.jit, static_argnames="kl_estimator")
def grpo_loss(logp_BT, batch, kl_estimator="k3"):
    return losses.grpo_loss(logp_BT, batch, kl_estimator=kl_estimator, **SETTINGS)


def objective(logp_BT, batch, kl_estimator="k3"):
    return masked.divide(grpo_loss(logp_BT, batch, kl_estimator)[0])


def total(logp_BT, batch):
    loss, _ = grpo_loss(logp_BT, batch)
    return loss.total, loss


total_gradient = jax.jit(jax.grad(total, has_aux=True))
objective_gradient = jax.jit(jax.grad(objective), static_argnames="kl_estimator")


def loop_kl(name, logp, ref_logp):
    """k2 and k3 with their tangents beyond the limit."""
    d, limit = ref_logp - logp, losses.KL_LIMIT
    if name == "k2":
        return d * d / 2 if abs(d) <= limit else limit * abs(d) - limit * limit / 2
    if d <= limit:
        return math.exp(d) - d - 1
    return math.exp(limit) - limit - 1 + (math.exp(limit) - 1) * (d - limit)


def loop_objective(logp_BT, batch, kl_estimator):
    """The formula, token by token in float64. Also returns the sums of the statistics."""
    fields = {name: np.asarray(getattr(batch, name), np.float64) for name in LOGPS}
    total, count, sums = 0.0, 0, dict.fromkeys(["clip_fraction_low", "clip_fraction_high"], 0.0)

    def record(**values):
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value

    for b, t in zip(*np.nonzero(np.asarray(batch.mask)), strict=True):
        logp, advantage = float(logp_BT[b, t]), float(batch.advantage[b, t])
        old_logp, ref_logp, sampler_logp = (fields[name][b, t] for name in LOGPS)
        ratio = math.exp(logp - old_logp)
        weight = min(math.exp(old_logp - sampler_logp), SETTINGS["tis_cap"])
        low, high = 1 - SETTINGS["clip_low"], 1 + SETTINGS["clip_high"]
        surrogate = min(ratio * advantage, max(low, min(ratio, high)) * advantage)
        kl_loss = SETTINGS["kl_coef"] * loop_kl(kl_estimator, logp, ref_logp)
        total += -weight * surrogate + kl_loss
        count += 1
        record(policy_loss=-weight * surrogate, kl_loss=kl_loss, tis_weight=weight, ratio=ratio)
        record(ratio_deviation=abs(ratio - 1), kl_ref=loop_kl("k3", logp, ref_logp))
        record(kl_old=ratio - 1 - math.log(ratio), tis_capped=weight == SETTINGS["tis_cap"])
        record(advantage=advantage, advantage_square=advantage**2)
        if ratio < low and advantage < 0:
            record(clip_fraction_low=1)
        if ratio > high and advantage > 0:
            record(clip_fraction_high=1)
    return total / count, count, sums


def difference_quotients(function, x, step=1e-6):
    """Central finite differences in float64, one coordinate at a time."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(4))
def test_loss_statistics_and_gradient_equal_the_loop(seed, kl_estimator):
    logp_BT, batch = random_case(seed)
    expected, count, sums = loop_objective(logp_BT, batch, kl_estimator)
    loss, statistics = grpo_loss(logp_BT, batch, kl_estimator)
    np.testing.assert_allclose(masked.divide(loss), expected, rtol=1e-4, atol=1e-5)
    assert statistics.keys() == sums.keys()
    for name, mean in statistics.items():
        np.testing.assert_allclose(mean.total, sums[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert mean.weight == count

    gradient_BT = objective_gradient(logp_BT, batch, kl_estimator)
    expected_BT = difference_quotients(
        lambda x_BT: loop_objective(x_BT, batch, kl_estimator)[0], logp_BT
    )
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-3, atol=1e-4)


def test_the_random_cases_reach_every_branch():
    seen = {name: 0.0 for name in ("clip_fraction_low", "clip_fraction_high")}
    num_capped = num_far = 0
    for seed in range(4):
        logp_BT, batch = random_case(seed)
        _, statistics = grpo_loss(logp_BT, batch)
        for name in seen:
            seen[name] += float(statistics[name].total)
        capped_BT = batch.old_logp - batch.sampler_logp > math.log(SETTINGS["tis_cap"])
        num_capped += int((capped_BT & batch.mask).sum())
        num_far += int(((batch.ref_logp - logp_BT > losses.KL_LIMIT) & batch.mask).sum())
    assert min(*seen.values(), num_capped, num_far) > 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),  # slope: derivative by logp
    [
        (1.3, 2.0, -2.6, -2.6),  # inside: 1.3 is above 1 + 0.2, below 1 + 0.4
        (1.5, 2.0, -2.8, 0.0),  # good token, already raised enough
        (1.5, -2.0, 3.0, 3.0),  # bad token that was raised: never clipped
        (0.7, -2.0, 1.6, 0.0),  # bad token, already lowered enough: 0.7 is below 1 - 0.2
        (0.7, 2.0, -1.4, -1.4),  # good token that was lowered: never clipped
        (0.9, -2.0, 1.8, 1.8),  # inside
        (1.0, 2.0, -2.0, -2.0),  # before the first update
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    def loss_of(logp):
        return losses.clipped_policy_loss(
            jnp.reshape(logp, (1, 1)),
            jnp.full((1, 1), -1.0),
            jnp.full((1, 1), advantage),
            clip_low=0.2,
            clip_high=0.4,
        )[0, 0]

    value, gradient = jax.value_and_grad(loss_of)(jnp.float32(math.log(ratio) - 1.0))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


def test_a_gradient_step_raises_good_tokens_and_lowers_bad_ones():
    _, batch = random_case(0)
    batch = dataclasses.replace(batch, ref_logp=batch.old_logp)  # no pull from the KL
    step_BT = -objective_gradient(batch.old_logp, batch)
    expected_BT = jnp.where(batch.mask, jnp.sign(batch.advantage), 0.0)
    np.testing.assert_array_equal(jnp.sign(step_BT), expected_BT)


def test_a_gradient_step_pulls_towards_the_reference():
    _, batch = random_case(0)
    batch = dataclasses.replace(batch, advantage=jnp.zeros_like(batch.advantage))
    for kl_estimator in ESTIMATORS:
        step_BT = -objective_gradient(batch.old_logp, batch, kl_estimator)
        expected_BT = jnp.where(batch.mask, jnp.sign(batch.ref_logp - batch.old_logp), 0.0)
        np.testing.assert_array_equal(jnp.sign(step_BT), expected_BT)


@pytest.mark.parametrize("value", [0.0, 500.0, -500.0, jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
def test_masked_positions_have_no_influence(kl_estimator, value):
    logp_BT, batch = random_case(1)
    assert not bool(batch.mask.all())
    expected = grpo_loss(logp_BT, batch, kl_estimator)
    expected_gradient_BT = objective_gradient(logp_BT, batch, kl_estimator)
    for names in (FIELDS, *([name] for name in FIELDS)):
        changed = {n: on_masked(getattr(batch, n), batch.mask, value) for n in names if n != "logp"}
        bad_batch = dataclasses.replace(batch, **changed)
        bad_logp_BT = on_masked(logp_BT, batch.mask, value) if "logp" in names else logp_BT
        actual = grpo_loss(bad_logp_BT, bad_batch, kl_estimator)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        gradient_BT = objective_gradient(bad_logp_BT, bad_batch, kl_estimator)
        np.testing.assert_array_equal(gradient_BT, expected_gradient_BT)


@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
def test_rows_of_padding_weigh_nothing_whatever_they_hold(kl_estimator):
    logp_BT, batch = random_case(2)
    batch = dataclasses.replace(
        batch, mask=jnp.zeros_like(batch.mask), advantage=jnp.full_like(logp_BT, jnp.nan)
    )
    loss, statistics = grpo_loss(logp_BT, batch, kl_estimator)
    for mean in (loss, *statistics.values()):
        assert (mean.total, mean.weight) == (0.0, 0.0)
        assert masked.divide(mean) == 0.0
    gradient_BT = objective_gradient(logp_BT, batch, kl_estimator)
    np.testing.assert_array_equal(gradient_BT, 0.0)


@pytest.mark.parametrize("field", ["logp", *LOGPS])
@pytest.mark.parametrize("logratio", [500.0, -500.0])
@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
def test_extreme_log_ratios_leave_loss_and_gradient_finite(kl_estimator, logratio, field):
    logp_BT, batch = random_case(3)
    if field == "logp":
        logp_BT = logp_BT + logratio
    else:
        batch = dataclasses.replace(batch, **{field: getattr(batch, field) + logratio})
    loss, statistics = grpo_loss(logp_BT, batch, kl_estimator)
    assert all(bool(jnp.isfinite(mean.total)) for mean in (loss, *statistics.values()))
    gradient_BT = objective_gradient(logp_BT, batch, kl_estimator)
    assert bool(jnp.isfinite(gradient_BT).all())


@pytest.mark.parametrize("pieces", [[[0, 1, 2], [3, 4, 5, 6]], [[0], [1, 2, 3], [4], [5, 6]]])
def test_micro_batches_add_up_to_the_whole_batch(pieces):
    logp_BT, batch = random_case(4, num_rows=7, length=6)
    whole = grpo_loss(logp_BT, batch)[0]
    whole_gradient_BT = objective_gradient(logp_BT, batch)

    summed, gradients = Mean(jnp.zeros(()), jnp.zeros(())), []
    for rows in pieces:
        piece = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], batch)
        gradient_BT, loss = total_gradient(np.asarray(logp_BT)[rows], piece)
        summed = masked.add(summed, loss)
        gradients.append(gradient_BT)
    assert len({int(np.asarray(batch.mask)[rows].sum()) for rows in pieces}) > 1  # unequal weights
    np.testing.assert_allclose(masked.divide(summed), masked.divide(whole), rtol=1e-6)
    gradient_BT = jnp.concatenate(gradients) / summed.weight
    np.testing.assert_allclose(gradient_BT, whole_gradient_BT, rtol=1e-5, atol=1e-7)


def test_before_the_first_update_the_ratio_is_exactly_one():
    _, batch = random_case(5)
    _, statistics = grpo_loss(batch.old_logp, batch)
    assert masked.divide(statistics["ratio"]) == 1.0
    for name in ("ratio_deviation", "kl_old", "clip_fraction_low", "clip_fraction_high"):
        assert statistics[name].total == 0.0


def test_only_logp_carries_gradient_and_only_through_the_loss():
    logp_BT, batch = random_case(6)

    def statistic(logp_BT, name):
        _, statistics = grpo_loss(logp_BT, batch)
        return statistics[name].total

    for name in grpo_loss(logp_BT, batch)[1]:
        np.testing.assert_array_equal(jax.grad(functools.partial(statistic, name=name))(logp_BT), 0)

    def weight_sum(old_logp_BT, sampler_logp_BT):
        return losses.truncated_importance_weight(old_logp_BT, sampler_logp_BT, cap=2.0).sum()

    for gradient in jax.grad(weight_sum, argnums=(0, 1))(batch.old_logp, batch.sampler_logp):
        np.testing.assert_array_equal(gradient, 0.0)


def test_truncated_importance_weight_by_hand():
    old_logp_BT, sampler_logp_BT = (
        jnp.log(jnp.array([[0.5, 0.2, 0.9]])),
        jnp.log(jnp.full((1, 3), 0.4)),
    )
    weight_BT = losses.truncated_importance_weight(old_logp_BT, sampler_logp_BT, cap=2.0)
    np.testing.assert_allclose(weight_BT[0], [1.25, 0.5, 2.0], rtol=1e-6)


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
    function = losses.KL_ESTIMATORS[name]
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
        return float(
            jax.grad(lambda x: losses.KL_ESTIMATORS[name](x, ref_logp_BT).sum())(logp_BT)[0, 0]
        )

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
    for estimator in losses.KL_ESTIMATORS.values():
        assert float(estimator(logp_BT, ref_logp_BT).min()) >= 0.0
