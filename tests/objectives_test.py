"""Every member of the family against a slow loop in float64, at its extremes, and however arranged."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prolong_jax import config, losses, masked, objectives
from prolong_jax.presets import PRESETS
from prolong_jax.types import Mean

SETTINGS = {
    "policy_loss": "ppo_clip",
    "clip_low": 0.2,
    "clip_high": 0.4,
    "dual_clip": 3.0,
    "kl_coef": 0.05,
    "kl_estimator": "k3",
    "kl_in": "loss",
    "correction": "tis",
    "is_low": 0.7,
    "is_high": 1.3,
    "aggregation": "token_mean",
    "token_constant": 11.0,
    "entropy_coef": 0.02,
    "entropy_target": 0.0,
    "entropy_step": 0.0,
}
# One setting after the other is another member. What the tables gain is tested without a line here.
FAMILY = [
    *({"policy_loss": name} for name in objectives.POLICY_LOSSES),
    *({"correction": name} for name in objectives.CORRECTIONS),
    *({"aggregation": name} for name in objectives.AGGREGATIONS),
    *({"kl_estimator": name} for name in objectives.KL_ESTIMATORS if name != "k1"),
    *({"kl_estimator": name, "kl_in": "reward"} for name in objectives.KL_ESTIMATORS),
    {"policy_loss": "gspo", "aggregation": "seq_mean_token_mean"},
    {"policy_loss": "gspo_token", "kl_in": "reward", "aggregation": "seq_mean_token_sum"},
]
PRESET_LOSSES = [preset["loss"] | {"token_constant": 11.0} for preset in PRESETS.values()]
ARRAYS = ("logp", "entropy", "old_logp", "ref_logp", "sampler_logp", "advantage")
SEGMENTS_T = np.array([1, 1, 1, 1, 2, 2, 2, 0])  # two responses and padding
SHAPE = (8, 12)  # that all cases are padded to, so that a member is compiled once


def name_of(settings):
    return "-".join(map(str, settings.values())) if len(settings) < 4 else settings["policy_loss"]


def random_case(seed, num_rows=4, spread=1.0) -> tuple[dict[str, Any], Any, Any]:
    """Arrays f64 [B, T] by name, mask and segments of packed rows; ratios on both sides of all bounds.

    The last row is empty, and one response has a hole.
    """
    rng = np.random.default_rng(seed)
    shape = (num_rows, len(SEGMENTS_T))
    segments_BT = np.tile(SEGMENTS_T, (num_rows, 1))
    mask_BT = (segments_BT > 0) & (np.arange(num_rows) < num_rows - 1)[:, None]
    mask_BT[0, 2] = False
    logp_BT = -rng.exponential(size=shape) - 0.1
    advantage_BT = np.take_along_axis(rng.normal(size=(num_rows, 3)), segments_BT, 1)
    case = {
        "logp": logp_BT,
        "entropy": rng.exponential(size=shape),
        "old_logp": logp_BT + spread * rng.normal(size=shape) * rng.choice([0.2, 1.6], shape),
        "ref_logp": logp_BT + 3 * spread * rng.normal(size=shape),
        "advantage": advantage_BT + 0.3 * rng.normal(size=shape),  # by token
    }
    case["sampler_logp"] = case["old_logp"] + 0.3 * spread * rng.normal(size=shape)
    return {k: np.float64(np.float32(x)) for k, x in case.items()}, mask_BT, segments_BT


def padded(x, value=0):
    return np.pad(
        x, [(0, a - b) for a, b in zip(SHAPE, x.shape, strict=True)], constant_values=value
    )


def on_device(case, mask_BT, segments_BT, dtype=jnp.float32):
    arrays = {name: jnp.asarray(padded(x, 7), dtype) for name, x in case.items()}
    mask_BT, segments_BT = padded(mask_BT), padded(segments_BT)
    batch = objectives.batch_of(
        arrays["old_logp"],
        arrays["advantage"],
        jnp.asarray(mask_BT),
        ref_logp_BT=arrays["ref_logp"],
        sampler_logp_BT=arrays["sampler_logp"],
        segments_BT=jnp.asarray(segments_BT),
    )
    return arrays["logp"], arrays["entropy"], batch


@functools.cache
def compiled(settings):
    objective = objectives.make_objective(**dict(settings))

    def divided(logp_BT, entropy_BT, batch):
        mean, statistics = objective(logp_BT, entropy_BT, batch)
        return masked.divide(mean), (mean, statistics)

    fast = {"xla_backend_optimization_level": 0}  # most of the time goes into compilation
    gradient = jax.value_and_grad(divided, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient, compiler_options=fast)


def value_and_gradients(settings, *arrays):
    """((value, (Mean, statistics)), (gradient by logp, gradient by entropy))"""
    return compiled(tuple((SETTINGS | settings).items()))(*arrays)


# --- the loop ------------------------------------------------------------------------------------


def clamp(x, low, high):
    return max(low, min(high, x))


def loop_kl(name, logp, ref_logp):
    d, limit = ref_logp - logp, losses.KL_LIMIT
    if name == "k1":
        return -d
    if name == "k2":
        return d * d / 2 if abs(d) <= limit else limit * abs(d) - limit * limit / 2
    if d <= limit:
        return math.exp(d) - d - 1
    return math.exp(limit) - limit - 1 + (math.exp(limit) - 1) * (d - limit)


def surrogate(ratio, advantage, low, high):
    return -min(ratio * advantage, clamp(ratio, 1 - low, 1 + high) * advantage)


def loop_policy_loss(s, now, frozen, old, advantages, t):
    """Loss of token t of a response; `frozen` is `now` as a constant, lists are over its tokens."""
    low, high, advantage = s["clip_low"], s["clip_high"], advantages[t]
    ratio, fixed = math.exp(now[t] - old[t]), math.exp(frozen[t] - old[t])
    mean = sum(a - b for a, b in zip(now, old, strict=True)) / len(now)
    fixed_mean = sum(a - b for a, b in zip(frozen, old, strict=True)) / len(now)
    name = s["policy_loss"]
    if name == "ppo_clip":
        return surrogate(ratio, advantage, low, high)
    if name == "dual_clip":
        loss = surrogate(ratio, advantage, low, high)
        return min(loss, -s["dual_clip"] * advantage) if advantage < 0 else loss
    if name == "gspo":
        return surrogate(math.exp(mean), advantage, low, high)
    if name == "gspo_token":
        return surrogate(math.exp(fixed_mean + now[t] - frozen[t]), advantage, low, high)
    if name == "gmpo":
        logratios = [a - b for a, b in zip(now, old, strict=True)]
        clipped = [
            min(x, high) if a > 0 else max(x, -low)
            for x, a in zip(logratios, advantages, strict=True)
        ]
        return -advantage * math.exp(sum(clipped) / len(clipped))
    if name == "cispo":
        return -clamp(fixed, 1 - low, 1 + high) * advantage * now[t]
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return -advantage * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    assert name == "reinforce", f"write the loop of {name}"
    return -fixed * advantage * now[t]


def loop_weight(s, old, sampler, t):
    ratio = math.exp(old[t] - sampler[t])
    mean = math.exp(sum(a - b for a, b in zip(old, sampler, strict=True)) / len(old))
    low, high, name = s["is_low"], s["is_high"], s["correction"]
    if name == "none":
        return 1.0
    if name == "tis":
        return clamp(ratio, low, high)
    if name == "icepop":
        return ratio if low <= ratio <= high else 0.0
    assert name == "seq_mask_tis", f"write the loop of {name}"
    return ratio if low <= mean <= high else 0.0


def loop_response(s, case, frozen_BT, b, slots):
    """Losses of the tokens of one response."""
    now, entropy, old, ref, sampler, advantages = (
        [float(case[name][b, t]) for t in slots] for name in ARRAYS
    )
    frozen = [float(frozen_BT[b, t]) for t in slots]
    in_reward = s["kl_in"] == "reward"
    if in_reward:
        kls = [loop_kl(s["kl_estimator"], o, r) for o, r in zip(old, ref, strict=True)]
        advantages = [a - s["kl_coef"] * sum(kls[i:]) for i, a in enumerate(advantages)]
    found = []
    for t in range(len(slots)):
        loss = loop_weight(s, old, sampler, t)
        loss *= loop_policy_loss(s, now, frozen, old, advantages, t)
        if not in_reward:
            loss += s["kl_coef"] * loop_kl(s["kl_estimator"], now[t], ref[t])
        found.append(loss - s["entropy_coef"] * entropy[t])
    return found


def loop_objective(settings, case, mask_BT, segments_BT, frozen_BT):
    s, responses = SETTINGS | settings, []
    for b in range(len(mask_BT)):
        for number in sorted(set(segments_BT[b])):
            slots = [t for t in np.flatnonzero(segments_BT[b] == number) if mask_BT[b, t]]
            if slots:
                responses.append(loop_response(s, case, frozen_BT, b, slots))
    count = len(responses)
    if s["aggregation"] == "token_mean":
        return sum(map(sum, responses)) / sum(map(len, responses))
    if s["aggregation"] == "seq_mean_token_mean":
        return sum(sum(r) / len(r) for r in responses) / count
    if s["aggregation"] == "seq_mean_token_sum":
        return sum(map(sum, responses)) / count
    assert s["aggregation"] == "token_sum_over_constant", f"write the loop of {s['aggregation']}"
    return sum(map(sum, responses)) / count / s["token_constant"]


@pytest.mark.parametrize("settings", [*FAMILY, *PRESET_LOSSES], ids=name_of)
def test_value_and_gradients_equal_the_loop(settings):
    for seed in range(3):
        case, mask_BT, segments_BT = random_case(seed)
        where = mask_BT, segments_BT, case["logp"]
        (value, _), gradients = value_and_gradients(settings, *on_device(case, *where[:2]))
        np.testing.assert_allclose(value, loop_objective(settings, case, *where), rtol=2e-5)
    for name, gradient_BT in zip(("logp", "entropy"), gradients, strict=True):
        slope_BT = np.zeros(mask_BT.shape)
        for at in np.argwhere(mask_BT):
            ends = []
            for shift in (1e-6, -1e-6):
                moved = {k: x.copy() for k, x in case.items()}
                moved[name][*at] += shift
                ends.append(loop_objective(settings, moved, *where))
            slope_BT[*at] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(gradient_BT, padded(slope_BT), rtol=1e-3, atol=2e-6)


def test_the_random_cases_reach_every_branch():
    seen = {}
    for settings in ({}, {"policy_loss": "gspo"}, {"correction": "seq_mask_tis"}):
        for seed in range(3):
            (_, (_, statistics)), _ = value_and_gradients(settings, *on_device(*random_case(seed)))
            for name in ("clip_fraction_low", "clip_fraction_high", "is_clipped"):
                key = (*settings.values(), name)
                seen[key] = seen.get(key, 0) + float(statistics[name].total)
    assert min(seen.values()) > 0, seen
    num_dual = num_far = 0
    for seed in range(3):
        case, mask_BT, _ = random_case(seed)
        high_BT = case["logp"] - case["old_logp"] > math.log(SETTINGS["dual_clip"])
        num_dual += (high_BT & mask_BT & (case["advantage"] < 0)).sum()
        num_far += (np.abs(case["ref_logp"] - case["logp"]) > losses.KL_LIMIT)[mask_BT].sum()
    assert num_dual > 0 and num_far > 0


def test_settings_and_tables_have_the_same_names():
    assert tuple(objectives.POLICY_LOSSES) == config.POLICY_LOSSES
    assert tuple(objectives.KL_ESTIMATORS) == config.KL_ESTIMATORS
    assert tuple(objectives.CORRECTIONS) == config.CORRECTIONS
    assert tuple(objectives.AGGREGATIONS) == config.AGGREGATIONS
    assert {f.name for f in dataclasses.fields(config.LossSettings)} == set(SETTINGS)
    assert set(objectives.SETTINGS) == set(SETTINGS)


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "loss", "slope"),  # slope: derivative by logp
    [
        ("ppo_clip", 1.3, 2.0, -2.6, -2.6),  # inside: 1.3 is above 1 + 0.2, below 1 + 0.4
        ("ppo_clip", 1.5, 2.0, -2.8, 0.0),  # good token, already raised enough
        ("ppo_clip", 1.5, -2.0, 3.0, 3.0),  # bad token that was raised: never clipped
        (
            "ppo_clip",
            0.7,
            -2.0,
            1.6,
            0.0,
        ),  # bad token, already lowered enough: 0.7 is below 1 - 0.2
        ("ppo_clip", 0.7, 2.0, -1.4, -1.4),  # good token that was lowered: never clipped
        ("ppo_clip", 0.9, -2.0, 1.8, 1.8),  # inside
        ("ppo_clip", 1.0, 2.0, -2.0, -2.0),  # before the first update
        ("dual_clip", 2.5, -2.0, 5.0, 5.0),  # below the bound of 3
        ("dual_clip", 4.0, -2.0, 6.0, 0.0),  # beyond it
        ("dual_clip", 4.0, 2.0, -2.8, 0.0),  # not for good tokens
        ("cispo", 2.0, 1.0, 1.4, -1.4),  # the weight is capped, the gradient stays; logp is -1
        ("cispo", 0.5, -1.0, -0.8, 0.8),
        ("reinforce", 2.0, 1.0, 2.0, -2.0),
        ("sapo", 1.0, 2.0, -4.0, -2.0),  # at ratio 1 the slope is that of PPO
        ("gmpo", math.exp(0.5), 1.0, -math.exp(0.4), 0.0),  # nats: clipped at 0.4
        ("gmpo", math.exp(-0.5), -1.0, math.exp(-0.2), 0.0),
        ("gmpo", math.exp(0.3), 1.0, -math.exp(0.3), -math.exp(0.3)),
        ("gspo", 1.3, 2.0, -2.6, -2.6),  # one token: its own ratio
        ("gspo_token", 1.5, 2.0, -2.8, 0.0),
    ],
)
def test_policy_losses_by_hand(name, ratio, advantage, loss, slope):
    settings = SETTINGS | {"policy_loss": name, "kl_coef": 0.0, "entropy_coef": 0.0}
    objective = objectives.make_objective(**settings | {"correction": "none"})
    batch = objectives.batch_of(
        jnp.full((1, 1), -1.0 - math.log(ratio)), jnp.full((1, 1), advantage)
    )
    value, gradient_BT = jax.value_and_grad(
        lambda logp_BT: masked.divide(objective(logp_BT, 0 * logp_BT, batch)[0])
    )(jnp.full((1, 1), -1.0))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(gradient_BT[0, 0], slope, rtol=1e-5, atol=1e-7)


def test_aggregations_by_hand():
    """A response of one token that loses 4, one of four tokens that lose 1 each."""
    x_BT = jnp.array([[4.0, 1.0, 1.0, 1.0, 1.0]])
    where = jnp.ones((1, 5), bool), jnp.array([[1, 2, 2, 2, 2]])
    arrays = dict(zip(("mask_BT", "segments_BT"), where, strict=True))
    expected = {"token_mean": 8 / 5, "seq_mean_token_mean": 5 / 2, "seq_mean_token_sum": 8 / 2}
    expected["token_sum_over_constant"] = 8 / 2 / 10
    assert expected.keys() == objectives.AGGREGATIONS.keys()
    for name, value in expected.items():
        call = objectives._asking(objectives.AGGREGATIONS[name], {"token_constant": 10.0})
        assert masked.divide(call(x_BT=x_BT, **arrays)) == pytest.approx(value)


def test_corrections_by_hand():
    old_logp_BT = jnp.log(jnp.array([[0.5, 0.2, 0.9, 0.3]]))
    sampler_logp_BT = jnp.log(jnp.full((1, 4), 0.4))
    where = {"mask_BT": jnp.ones((1, 4), bool), "segments_BT": jnp.array([[1, 1, 2, 2]])}
    expected = {
        "none": [1, 1, 1, 1],
        "tis": [1.25, 0.6, 2.0, 0.75],
        "icepop": [1.25, 0.0, 0.0, 0.75],  # 0.5 and 2.25 are out of [0.6, 2]
        "seq_mask_tis": [1.25, 0.5, 2.25, 0.75],  # geometric means 0.79 and 1.3 are inside
    }
    assert expected.keys() == objectives.CORRECTIONS.keys()
    for name, weights in expected.items():
        call = objectives._asking(objectives.CORRECTIONS[name], {"is_low": 0.6, "is_high": 2.0})
        found_BT = call(old_logp_BT=old_logp_BT, sampler_logp_BT=sampler_logp_BT, **where)
        np.testing.assert_allclose(found_BT[0], weights, rtol=1e-5)
    outside = objectives.seq_mask_tis(
        old_logp_BT, sampler_logp_BT, **where, is_low=0.999, is_high=1.4
    )
    np.testing.assert_allclose(outside[0], [0, 0, 2.25, 0.75], rtol=1e-5)


def test_gspo_and_gspo_token_agree_where_a_response_has_one_advantage():
    case, mask_BT, segments_BT = random_case(0)
    case["advantage"] = np.where(segments_BT == 1, 0.7, -1.2)
    arrays = on_device(case, mask_BT, segments_BT)
    settings = {"correction": "none", "aggregation": "seq_mean_token_mean"}
    plain, by_token = (
        value_and_gradients(settings | {"policy_loss": p}, *arrays) for p in ("gspo", "gspo_token")
    )
    np.testing.assert_allclose(plain[0][0], by_token[0][0], rtol=1e-6)
    np.testing.assert_allclose(plain[1][0], by_token[1][0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", objectives.POLICY_LOSSES)
def test_a_gradient_step_raises_good_tokens_and_lowers_bad_ones(name):
    case, mask_BT, segments_BT = random_case(0)
    case |= {"logp": case["old_logp"], "advantage": np.where(segments_BT == 1, 0.7, -1.2)}
    settings = {"policy_loss": name, "correction": "none", "kl_coef": 0.0}
    _, (gradient_BT, _) = value_and_gradients(settings, *on_device(case, mask_BT, segments_BT))
    expected_BT = np.where(mask_BT, np.sign(case["advantage"]), 0.0)
    np.testing.assert_array_equal(np.sign(-gradient_BT), padded(expected_BT))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_gradient_step_pulls_towards_the_reference(estimator):
    case, mask_BT, segments_BT = random_case(0)
    case["advantage"] = np.zeros(mask_BT.shape)
    settings = {"kl_estimator": estimator}
    _, (gradient_BT, _) = value_and_gradients(settings, *on_device(case, mask_BT, segments_BT))
    expected_BT = np.where(mask_BT, np.sign(case["ref_logp"] - case["logp"]), 0.0)
    np.testing.assert_array_equal(np.sign(-gradient_BT), padded(expected_BT))


def test_statistics_and_constants_carry_no_gradient():
    logp_BT, entropy_BT, batch = on_device(*random_case(6))
    for settings in ({}, {"policy_loss": "gspo"}, {"correction": "seq_mask_tis"}):
        objective = objectives.make_objective(**SETTINGS | settings)

        def told(logp_BT, objective=objective):
            sums = objective(logp_BT, entropy_BT, batch)[1]
            return sum(mean.total.sum() for mean in sums.values())

        np.testing.assert_array_equal(jax.grad(told)(logp_BT), 0.0)

        def weighted(sampler_logp_BT, objective=objective):
            rows = dataclasses.replace(batch, sampler_logp=sampler_logp_BT)
            return objective(logp_BT, entropy_BT, rows)[0].total

        np.testing.assert_array_equal(jax.grad(weighted)(batch.sampler_logp), 0.0)


# --- safety --------------------------------------------------------------------------------------


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("settings", [*FAMILY, *PRESET_LOSSES], ids=name_of)
def test_every_member_is_safe(settings):
    """Log-ratios of +-500, -inf and NaN under the mask, empty rows, nothing but masked."""
    case, mask_BT, segments_BT = random_case(3)
    for name in ("logp", "old_logp", "ref_logp", "sampler_logp"):
        for shift in (500.0, -500.0):
            arrays = on_device(case | {name: case[name] + shift}, mask_BT, segments_BT)
            assert finite(value_and_gradients(settings, *arrays)), (name, shift)
    arrays = on_device(case, mask_BT, segments_BT)
    expected = value_and_gradients(settings, *arrays)
    for junk in (-jnp.inf, jnp.inf, jnp.nan, 500.0):
        spoiled = {k: np.where(mask_BT, x, junk) for k, x in case.items()}
        found = value_and_gradients(settings, *on_device(spoiled, mask_BT, segments_BT))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    nothing = on_device(case, np.zeros_like(mask_BT), segments_BT)
    (value, (mean, statistics)), gradients = value_and_gradients(settings, *nothing)
    assert value == 0 and mean.weight == 0
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves((statistics, gradients)))


@pytest.mark.parametrize("name", objectives.POLICY_LOSSES)
def test_bfloat16_inputs_are_computed_on_in_float32(name):
    settings, (case, mask_BT, segments_BT) = {"policy_loss": name}, random_case(4)
    case = {
        k: np.float64(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for k, x in case.items()
    }
    narrow, wide = (
        value_and_gradients(settings, *on_device(case, mask_BT, segments_BT, dtype))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_allclose(narrow[0][0], wide[0][0], rtol=1e-6)
    np.testing.assert_allclose(narrow[1][0].astype(jnp.float32), wide[1][0], rtol=1e-2, atol=1e-6)
    for shift in (500.0, -500.0):
        extreme = case | {"logp": case["logp"] + shift, "ref_logp": case["ref_logp"] - shift}
        arrays = on_device(extreme, mask_BT, segments_BT, jnp.bfloat16)
        assert finite(value_and_gradients(settings, *arrays))


# --- however arranged ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FAMILY, ids=name_of)
def test_padding_packing_and_order_change_nothing(settings):
    case, mask_BT, segments_BT = random_case(5)
    (value, _), (gradient_BT, _) = value_and_gradients(
        settings, *on_device(case, mask_BT, segments_BT)
    )

    def arranged(index):  # of slots [rows, T] in the flattened arrays, -1 for padding
        moved = {k: np.where(index < 0, 7.0, x.ravel()[index]) for k, x in case.items()}
        where = mask_BT.ravel()[index] & (index >= 0), np.maximum(index >= 0, 0) * segments
        (other, _), (other_BT, _) = value_and_gradients(settings, *on_device(moved, *where))
        np.testing.assert_allclose(other, value, rtol=1e-5)
        back = np.zeros(mask_BT.size)
        rows, columns = index.shape
        back[index[index >= 0]] = np.asarray(other_BT)[:rows, :columns][index >= 0]
        expected_BT = np.asarray(gradient_BT)[:4, :8]
        np.testing.assert_allclose(back, expected_BT.ravel(), rtol=1e-4, atol=1e-7)

    slots = np.arange(mask_BT.size).reshape(mask_BT.shape)
    first, second, none = slots[:, :4], slots[:, 4:7], np.full((4, 3), -1)
    segments = np.ones((8, 4), int)
    arranged(np.concatenate([first, np.pad(second, ((0, 0), (0, 1)), constant_values=-1)]))
    segments = np.tile([1, 1, 1, 0, 0, 0, 3, 3, 3, 3], (4, 1))
    arranged(np.concatenate([second, none, first], axis=1)[::-1])


def test_micro_batches_and_a_mesh_change_nothing():
    case, mask_BT, segments_BT = random_case(6, num_rows=8)
    arrays = on_device(case, mask_BT, segments_BT)
    for settings in ({}, {"policy_loss": "gspo", "aggregation": "seq_mean_token_mean"}):
        objective = objectives.make_objective(**SETTINGS | settings)
        (value, (whole, statistics)), _ = value_and_gradients(settings, *arrays)
        summed = Mean(jnp.zeros(()), jnp.zeros(()))
        for rows in ([0], [1, 2, 3], [4, 5, 6, 7]):
            piece = jax.tree.map(lambda x, rows=rows: x[jnp.array(rows)], arrays)
            summed = masked.add(summed, objective(*piece)[0])
        np.testing.assert_allclose(masked.divide(summed), value, rtol=1e-5)
        for devices in (2, 8):
            mesh = Mesh(np.array(jax.devices()[:devices]), "data")

            def on_mesh(*arrays, objective=objective):
                return jax.lax.psum(objective(*arrays), "data")

            split = jax.shard_map(on_mesh, mesh=mesh, in_specs=P("data"), out_specs=P())
            total, sums = jax.jit(split)(*arrays)
            np.testing.assert_allclose(masked.divide(total), value, rtol=1e-5)
            np.testing.assert_allclose(
                sums["is_logratio_below"].total, statistics["is_logratio_below"].total
            )


def test_an_objective_works_without_jit_and_under_vmap():
    case, mask_BT, segments_BT = random_case(7)
    arrays = on_device(case, mask_BT, segments_BT)
    objective = objectives.make_objective(**SETTINGS)
    (value, _), _ = value_and_gradients({}, *arrays)
    np.testing.assert_allclose(masked.divide(objective(*arrays)[0]), value, rtol=1e-6)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    means, _ = jax.vmap(objective)(*both)
    np.testing.assert_allclose(means.total / means.weight, [value, value], rtol=1e-6)


# --- the KL in the reward, and the entropy -------------------------------------------------------


def test_the_kl_in_the_reward_has_the_gradient_of_the_kl_of_whole_responses():
    """Two tokens, all responses by enumeration: the expected gradient is kl_coef times the exact."""
    rng = np.random.default_rng(0)
    V = 3
    theta = jnp.asarray(rng.normal(size=(1 + V, V)), jnp.float32)  # first token, then by the first
    ref = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1 + V, V)), jnp.float32))
    firsts, seconds = (x.ravel() for x in np.meshgrid(np.arange(V), np.arange(V), indexing="ij"))

    def both(logp):
        return jnp.stack([logp[0, firsts], logp[1 + firsts, seconds]], axis=1)  # [V * V, 2]

    def kl(theta):
        logp_BT = both(jax.nn.log_softmax(theta))
        return (jnp.exp(logp_BT.sum(1)) * (logp_BT - both(ref)).sum(1)).sum()

    settings = SETTINGS | {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.3}
    settings |= {"entropy_coef": 0.0, "policy_loss": "reinforce"}
    objective = objectives.make_objective(**settings)
    old_BT = both(jax.nn.log_softmax(theta))
    batch = objectives.batch_of(old_BT, jnp.zeros_like(old_BT), ref_logp_BT=both(ref))
    weight_B = jnp.exp(old_BT.sum(1))

    def expected(theta):
        logp_BT = both(jax.nn.log_softmax(theta))
        one = jax.tree.map(lambda x: x[:, None], (logp_BT, 0 * logp_BT, batch))
        means, _ = jax.vmap(objective)(*one)
        return (weight_B * means.total).sum()

    np.testing.assert_allclose(
        jax.grad(expected)(theta), 0.3 * jax.grad(kl)(theta), rtol=1e-4, atol=1e-6
    )


def test_k1_as_a_loss_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="k1 has no expected gradient as a loss; use k2 or k3"):
        objectives.make_objective(**SETTINGS | {"kl_estimator": "k1"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_loss": "ppo"}, "policy_loss: expected one of ppo_clip, dual_clip"),
        ({"correction": "is"}, "correction: expected one of none, tis"),
        ({"aggregation": "mean"}, "aggregation: expected one of token_mean"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3"),
        ({"kl_estimator": "k1", "kl_in": "Reward"}, "kl_in: expected loss or reward, got 'Reward'"),
        ({"clip_hgh": 9}, r"expected the settings policy_loss.*see \['clip_hgh'\]"),
        (
            {"aggregation": "token_sum_over_constant", "token_constant": 0.0},
            "token_constant: must be above 0 with token_sum_over_constant, got 0.0",
        ),
    ],
)
def test_names_that_are_not_known_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        objectives.make_objective(**SETTINGS | settings)


def test_the_coefficient_of_the_entropy_adapts():
    shift, seen = 0.0, []
    for entropy in (0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.1):
        settings = {"coef": 0.01, "target": 0.2}
        shift = objectives.adapted_entropy_shift(shift, entropy, **settings, step=0.01)
        seen.append(objectives.adapted_entropy_coef(shift, entropy, **settings))
    assert objectives.adapted_entropy_coef(-0.1, 0.0, coef=0.01, target=0.2) == 0  # never a penalty
    # Up twice from 0.01; off while the entropy is above the target, down to 0 meanwhile; up again.
    np.testing.assert_allclose(seen, [0.02, 0.03, 0.0, 0.0, 0.0, 0.0, 0.01], atol=1e-12)


# --- what is told --------------------------------------------------------------------------------


def clipped_by_hand(name, ratio, advantage):
    """Tokens that the lower and the upper bound clip, from the gradient that is left."""
    good, bad = advantage > 0, advantage < 0
    low, high = (math.exp(-0.2), math.exp(0.4)) if name == "gmpo" else (0.8, 1.4)
    if name in ("sapo", "reinforce"):
        return 0 * ratio, 0 * ratio
    if name == "cispo":
        return ratio < low, ratio > high
    dual = (ratio > 3.0) & bad if name == "dual_clip" else False
    return (ratio < low) & bad, ((ratio > high) & good) | dual


@pytest.mark.parametrize("name", objectives.POLICY_LOSSES)
def test_statistics_equal_the_loop(name):
    case, mask_BT, segments_BT = random_case(8)
    settings = {"policy_loss": name}
    (_, (_, statistics)), _ = value_and_gradients(settings, *on_device(case, mask_BT, segments_BT))
    now, old, ref, sampler, advantage, entropy = (
        case[k][mask_BT]
        for k in ("logp", "old_logp", "ref_logp", "sampler_logp", "advantage", "entropy")
    )
    ratio, raw = np.exp(now - old), np.exp(old - sampler)
    if name in objectives.RATIOS:
        rows, numbers = np.nonzero(mask_BT)[0], segments_BT[mask_BT]
        logratio, where = now - old, list(zip(rows, numbers, strict=True))
        ratio = np.array(
            [
                np.exp(np.mean([x for x, w in zip(logratio, where, strict=True) if w == at]))
                for at in where
            ]
        )
    weight = np.clip(raw, 0.7, 1.3)
    low, high = clipped_by_hand(name, ratio, advantage)
    k3 = [loop_kl("k3", a, b) for a, b in zip(now, ref, strict=True)]
    expected = {
        "kl_loss": 0.05 * np.array(k3),
        "kl_ref": k3,
        "kl_ref_k1": now - ref,
        "kl_old": [loop_kl("k3", a, b) for a, b in zip(old, now, strict=True)],
        "entropy": entropy,
        "is_weight": weight,
        "is_weight_square": weight**2,
        "is_clipped": weight != raw,
        "advantage": advantage,
        "advantage_square": advantage**2,
        "ratio": ratio,
        "ratio_deviation": np.abs(ratio - 1),
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "is_logratio_below": (old - sampler)[:, None] <= objectives.EDGES,
    }
    assert statistics.keys() - {"policy_loss"} == expected.keys()
    for key, values in expected.items():
        assert statistics[key].weight == mask_BT.sum()
        np.testing.assert_allclose(
            statistics[key].total, np.sum(values, axis=0), rtol=1e-4, atol=1e-5, err_msg=key
        )
    means = {k: float(masked.divide(statistics[k])) for k in ("policy_loss", "kl_loss", "entropy")}
    loss = loop_objective(settings, case, mask_BT, segments_BT, case["logp"])
    told = means["policy_loss"] + means["kl_loss"] - 0.02 * means["entropy"]
    np.testing.assert_allclose(told, loss, rtol=1e-4, atol=1e-5)


def test_weights_count_as_clipped_only_where_a_bound_changed_them():
    arrays = on_device(*random_case(8))
    for settings in ({"correction": "none"}, {"is_low": 0.0, "is_high": 1e9}):
        (_, (_, statistics)), _ = value_and_gradients(settings, *arrays)
        assert statistics["is_clipped"].total == 0, settings


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.99])
def test_quantiles_read_off_the_distribution_are_close(share):
    logratio = np.random.default_rng(0).normal(0.02, 0.3, 200_000)
    below_K = jnp.asarray((logratio[:, None] <= objectives.EDGES).mean(0))
    exact = np.exp(np.quantile(logratio, share))
    np.testing.assert_allclose(objectives.quantile(below_K, share), exact, rtol=0.02)


def test_before_the_first_update_nothing_is_clipped():
    case, mask_BT, segments_BT = random_case(9)
    case["logp"] = case["old_logp"]
    (_, (_, statistics)), _ = value_and_gradients({}, *on_device(case, mask_BT, segments_BT))
    assert masked.divide(statistics["ratio"]) == 1.0
    for name in ("ratio_deviation", "kl_old", "clip_fraction_low", "clip_fraction_high"):
        assert statistics[name].total == 0.0
