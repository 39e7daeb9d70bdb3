"""Ours against what public packages compute on the same inputs: values and gradients.

fixtures/losses.json was made by make_loss_fixtures.py from verl 0.9.1, OpenRLHF 0.11.2, TRL 1.16.0
and Tunix 0.1.7, as released. Where a definition differs, the conversion is in the code here.
"""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import advantages, losses, masked, objectives, shaping
from prolong_jax.presets import PRESETS

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "losses.json").read_text())
INPUTS = {name: np.asarray(value) for name, value in PUBLISHED["inputs"].items()}
LENGTHS = INPUTS["lengths"]
SHAPE = INPUTS["logp"].shape

PLAIN = PRESETS["dapo"]["loss"] | {"clip_low": 0.2, "clip_high": 0.4}
BY_RESPONSE = {"aggregation": "seq_mean_token_mean"}
NARROW = {"clip_low": 0.1, "clip_high": 0.15}
BY_CONSTANT = {"aggregation": "token_sum_over_constant", "token_constant": float(SHAPE[1])}
SETTINGS = {
    "dual_clip": {"policy_loss": "dual_clip", "dual_clip": 3.0},
    "ppo_clip_token_mean": {},
    "ppo_clip_seq_mean_token_mean": BY_RESPONSE,
    "ppo_clip_seq_mean_token_sum": {"aggregation": "seq_mean_token_sum"},
    "ppo_clip_token_sum_over_constant": BY_CONSTANT,
    "gspo": BY_RESPONSE | NARROW | {"policy_loss": "gspo"},
    "gspo_token": BY_RESPONSE | NARROW | {"policy_loss": "gspo_token"},
    "gmpo": BY_RESPONSE | {"policy_loss": "gmpo"},
    "cispo": {"policy_loss": "cispo"},
    # TRL's epsilon_high is the cap of the weight itself, here 1.4, and it has no lower bound.
    "cispo_upper_bound_only": {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 1.4 - 1.0},
    # verl and TRL aggregate SAPO by responses, whatever else is set.
    "sapo": BY_RESPONSE | {"policy_loss": "sapo"},
    "reinforce": {"policy_loss": "reinforce"},
    "tis": {"correction": "tis", "is_low": 0.0, "is_high": 2.0},
    "icepop": {"correction": "icepop", "is_low": 0.5, "is_high": 2.0},
    "seq_mask_tis": {"correction": "seq_mask_tis", "is_low": 0.85, "is_high": 1.15},
    "kl_in_loss": {"kl_coef": 0.1, "kl_estimator": "k3"},
    "kl_in_loss_and_entropy": {"kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.02},
    "kl_in_reward": {"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward"},
}
WITH_ONE_ADVANTAGE = ("gspo", "gmpo")  # per response; the others have one per token


def cases(part, names=None):
    return [
        pytest.param(package, name, id=f"{package}-{name}")
        for package, results in PUBLISHED[part].items()
        for name in results
        if names is None or name in names
    ]


def scored_like(reward):
    return np.ones(reward.shape, dtype=bool)


def advantage_BT(case):
    if case in WITH_ONE_ADVANTAGE:
        return np.broadcast_to(INPUTS["advantage"][:, None], SHAPE)
    if case == "kl_in_reward":  # the responses are two groups of four there
        reward_PG = INPUTS["reward"][:2]
        advantage_PG = advantages.leave_one_out_advantage(reward_PG, scored_like(reward_PG))
        return np.broadcast_to(advantage_PG.reshape(-1, 1), SHAPE)
    return INPUTS["token_advantage"]


def arrays_of(case, layout):
    """logp, entropy and batch: a row for a response, or all responses in one row."""
    fields = {name: INPUTS[name] for name in ("logp", "old_logp", "ref_logp", "sampler_logp")}
    fields |= {"entropy": INPUTS["entropy"], "advantage": advantage_BT(case)}
    fields["mask"] = np.arange(SHAPE[1]) < LENGTHS[:, None]
    fields["segments"] = np.ones(SHAPE, int)
    if layout == "packed":
        fields["segments"] = np.broadcast_to(np.arange(1, SHAPE[0] + 1)[:, None], SHAPE)
        fields = {name: x_BT.reshape(1, -1) for name, x_BT in fields.items()}
    x = {name: jnp.asarray(x_BT, jnp.float32) for name, x_BT in fields.items()}
    batch = objectives.batch_of(
        x["old_logp"],
        x["advantage"],
        x["mask"] > 0,
        ref_logp_BT=x["ref_logp"],
        sampler_logp_BT=x["sampler_logp"],
        segments_BT=x["segments"].astype(jnp.int32),
    )
    return x["logp"], x["entropy"], batch


def differentiated(function, logp_BT, mask_BT):
    """Value of a loss, and its gradient at the real tokens, in the order of the responses."""
    value, gradient_BT = jax.jit(jax.value_and_grad(function))(logp_BT)
    gradient_BT, mask_BT = np.asarray(gradient_BT), np.asarray(mask_BT)
    assert not gradient_BT[~mask_BT].any()
    return float(value), gradient_BT[mask_BT]


@functools.cache
def objective(case, layout):
    logp_BT, entropy_BT, batch = arrays_of(case, layout)
    function = objectives.make_objective(**PLAIN | SETTINGS[case])

    def loss(logp_BT):
        return masked.divide(function(logp_BT, entropy_BT, batch)[0])

    return differentiated(loss, logp_BT, batch.mask)


@functools.cache
def kl(name):
    logp_BT, _, batch = arrays_of(name, "padded")

    def loss(logp_BT):
        kl_BT = objectives.KL_ESTIMATORS[name](logp_BT, batch.ref_logp)
        return masked.divide(masked.token_mean(kl_BT, batch.mask))

    return differentiated(loss, logp_BT, batch.mask)


def assert_equal(ours, published):
    value, gradient_N = ours
    np.testing.assert_allclose(value, published["value"], rtol=1e-5)
    error = np.linalg.norm(gradient_N - published["gradient"])
    assert error <= 1e-5 * np.linalg.norm(published["gradient"])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("package", "case"), cases("losses", SETTINGS))
def test_objective(package, case, layout):
    assert_equal(objective(case, layout), PUBLISHED["losses"][package][case])


@pytest.mark.parametrize(("package", "name"), cases("losses", objectives.KL_ESTIMATORS))
def test_kl_estimator(package, name):
    assert_equal(kl(name), PUBLISHED["losses"][package][name])


def test_all_losses_are_compared_and_four_packages_agree_on_dual_clip():
    results = PUBLISHED["losses"]
    names = {name for package in results.values() for name in package}
    assert names == SETTINGS.keys() | objectives.KL_ESTIMATORS.keys()
    assert set(objectives.POLICY_LOSSES) <= {
        (PLAIN | settings)["policy_loss"] for settings in SETTINGS.values()
    }
    first, *others = (package["dual_clip"] for package in results.values())
    assert len(others) == 3
    for other in others:
        np.testing.assert_allclose(other["value"], first["value"], rtol=1e-6)
        np.testing.assert_allclose(other["gradient"], first["gradient"], rtol=1e-5, atol=1e-8)


def test_the_inputs_reach_every_branch():
    logp_BT, _, batch = arrays_of("dual_clip", "padded")
    mask_BT, good_BT, bad_BT = batch.mask, batch.advantage > 0, batch.advantage < 0
    ratio_BT = jnp.exp(logp_BT - batch.old_logp)
    is_ratio_BT = jnp.exp(batch.old_logp - batch.sampler_logp)
    d_BT = jnp.abs(logp_BT - batch.ref_logp)
    low_BT, high_BT = ratio_BT < 0.8, ratio_BT > 1.4
    branches = [good_BT & low_BT, good_BT & high_BT, bad_BT & low_BT, bad_BT & high_BT]
    branches += [bad_BT & (ratio_BT > 3), good_BT & ~low_BT & ~high_BT, bad_BT & ~low_BT & ~high_BT]
    branches += [is_ratio_BT < 0.5, is_ratio_BT > 2.0, (is_ratio_BT > 0.5) & (is_ratio_BT < 2.0)]
    for branch_BT in branches:
        assert (branch_BT & mask_BT).any()
    assert jnp.where(mask_BT, d_BT, 0).max() < losses.KL_LIMIT  # beyond it ours goes on linearly

    where = {"mask_BT": mask_BT, "segments_BT": batch.segments}
    sequence_B = objectives.sequence_ratio(logp_BT, batch.old_logp, **where)[:, 0]
    assert (sequence_B < 0.9).any() and (sequence_B > 1.15).any()
    assert ((sequence_B > 0.9) & (sequence_B < 1.15)).any()
    kept_B = objectives.sequence_ratio(batch.old_logp, batch.sampler_logp, **where)[:, 0]
    assert 0 < ((kept_B > 0.85) & (kept_B < 1.15)).sum() < len(kept_B)


# --- advantages and shaping ----------------------------------------------------------------------

# All divide by the standard deviation over tokens: verl with ddof 1, OpenRLHF with ddof 0.
DDOF = {"verl": 1, "openrlhf": 0}


def over_tokens(estimator, package, lengths):
    """The estimator on a batch in which a response appears once for each of its tokens."""
    reward_PG = INPUTS["reward"]
    if estimator == "group_mean_batch":
        reward_PG = advantages.group_mean_advantage(reward_PG, scored_like(reward_PG))
    token_N = np.repeat(reward_PG.ravel(), lengths)
    advantage_N = advantages.batch_advantage(token_N, scored_like(token_N))
    degrees = math.sqrt((len(token_N) - DDOF[package]) / (len(token_N) - 1))
    return degrees * advantage_N[np.cumsum(lengths) - lengths]


@pytest.mark.parametrize(("package", "case"), cases("advantages"))
def test_advantage(package, case):
    reward_PG = INPUTS["reward"]
    estimator = case.removesuffix("_by_tokens")
    if case.endswith("_by_tokens"):
        actual = over_tokens(estimator, package, INPUTS["grouped_lengths"])
    else:
        actual = advantages.ESTIMATORS[estimator](reward_PG, scored_like(reward_PG)).ravel()
    if case in (
        "batch",
        "group_mean_batch",
    ):  # ours over 12 responses, theirs over 5 tokens of each
        n, tokens = reward_PG.size, 5 * reward_PG.size
        actual = actual * math.sqrt((tokens - DDOF[package]) / tokens * n / (n - 1))
    expected = PUBLISHED["advantages"][package][case]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_all_advantages_are_compared():
    names = {name for package in PUBLISHED["advantages"].values() for name in package}
    assert names >= advantages.ESTIMATORS.keys()


@pytest.mark.parametrize(("package", "case"), cases("shaping"))
def test_shaping(package, case):
    reward, finished = np.full(INPUTS["finished"].shape, 0.8), INPUTS["finished"] > 0
    if case == "soft_overlong":  # their buffer counts tokens, ours is a share of the limit
        actual = reward + shaping.soft_overlong(
            INPUTS["response_length"], limit=100, buffer=20 / 100
        )
    else:
        coef = {"stop_properly_scaled": 0.3, "stop_properly_replaced": -0.5}[case]
        actual = shaping.stop_properly(reward, finished, coef=coef)
    np.testing.assert_allclose(actual, PUBLISHED["shaping"][package][case], rtol=1e-6, atol=1e-7)
