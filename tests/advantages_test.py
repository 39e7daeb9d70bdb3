"""Advantages of all estimators, and dead groups."""

import math

import numpy as np
import pytest

from prolong_jax import advantages, config, shaping

LONE_SUCCESS = np.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])


def all_scored(reward):
    return np.ones(reward.shape, dtype=bool)


def loop_advantage(reward_G, scored_G):
    rewards = [float(r) for r, scored in zip(reward_G, scored_G, strict=True) if scored]
    if len(rewards) < 2:
        return [0.0] * len(reward_G)
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [
        (float(r) - mean) / (std + 1e-6) if scored else 0.0
        for r, scored in zip(reward_G, scored_G, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_advantages_equal_the_loop(seed):
    rng = np.random.default_rng(seed)
    reward_PG = rng.random((6, 8))
    scored_PG = rng.random((6, 8)) < 0.7
    scored_PG[0], scored_PG[1] = False, np.arange(8) == 5  # none scored, one scored
    actual_PG = advantages.group_advantage(reward_PG, scored_PG)
    for p in range(6):
        expected_G = loop_advantage(reward_PG[p], scored_PG[p])
        np.testing.assert_allclose(actual_PG[p], expected_G, rtol=1e-9, atol=1e-12)
        one_group_G = advantages.group_advantage(reward_PG[p], scored_PG[p])
        np.testing.assert_array_equal(one_group_G, actual_PG[p])


def test_the_standard_deviation_has_one_degree_of_freedom_less():
    advantage_G = advantages.group_advantage(np.array([0.0, 1.0]), np.array([True, True]))
    np.testing.assert_allclose(advantage_G, [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-5)


def test_a_lone_success_is_kept_and_every_response_learns_from_it():
    assert not advantages.is_dead(LONE_SUCCESS, all_scored(LONE_SUCCESS))
    advantage_G = advantages.group_advantage(LONE_SUCCESS, all_scored(LONE_SUCCESS))
    np.testing.assert_array_equal(advantage_G > 0, LONE_SUCCESS == 1.0)
    assert np.all(np.abs(advantage_G) > 0.3)
    np.testing.assert_allclose(advantage_G.sum(), 0.0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.1 + 0.2, 1.0])
def test_a_uniform_group_is_dead_at_any_value(value):
    reward_G = np.full(8, value)
    assert advantages.is_dead(reward_G, all_scored(reward_G))
    advantage_G = advantages.group_advantage(reward_G, all_scored(reward_G))
    np.testing.assert_allclose(advantage_G, 0.0, atol=1e-9)


def test_the_smallest_difference_keeps_a_group():
    reward_G = np.array([0.3, 0.3, np.nextafter(0.3, 1.0)])
    assert not advantages.is_dead(reward_G, all_scored(reward_G))


@pytest.mark.parametrize("num_scored", [0, 1])
def test_a_group_with_fewer_than_two_scored_is_dead_and_gets_no_advantage(num_scored):
    reward_G, scored_G = np.array([1.0, 0.0, 0.5]), np.arange(3) < num_scored
    assert advantages.is_dead(reward_G, scored_G)
    np.testing.assert_array_equal(advantages.group_advantage(reward_G, scored_G), 0.0)


@pytest.mark.parametrize("junk", [1.0, np.nan, np.inf])
def test_the_reward_of_an_unscored_response_is_never_looked_at(junk):
    scored_PG = np.array([[True, True, False]] * 2)
    reward_PG = np.array([[0.0, 0.0, junk], [0.0, 0.5, junk]])
    np.testing.assert_array_equal(advantages.is_dead(reward_PG, scored_PG), [True, False])
    advantage_PG = advantages.group_advantage(reward_PG, scored_PG)
    np.testing.assert_array_equal(advantage_PG[:, 2], 0.0)
    np.testing.assert_allclose(advantage_PG[1, :2], [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-5)


def test_dead_is_judged_on_the_raw_reward_because_shaping_revives_a_uniform_group():
    raw_G, finished_G = np.ones(4), np.array([True, True, True, False])
    shaped_G = shaping.stop_properly(raw_G, finished_G, coef=0.0)
    assert advantages.is_dead(raw_G, all_scored(raw_G))
    assert not advantages.is_dead(shaped_G, all_scored(raw_G))


def loop_estimate(name, reward_PG, scored_PG):
    """Every advantage from the definition, response by response."""
    everyone = [
        (float(r), p) for p, row in enumerate(reward_PG) for r in row[scored_PG[p]]
    ]  # fmt: skip

    def standardised(value, values):
        if len(values) < 2:
            return 0.0
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return (value - mean) / (std + 1e-6)

    def one(p, g):
        reward, group = float(reward_PG[p, g]), [float(r) for r in reward_PG[p][scored_PG[p]]]
        if name == "group":
            return standardised(reward, group)
        if name == "group_mean":
            return reward - sum(group) / len(group)
        if name == "leave_one_out":
            others = sum(group) - reward
            return reward - others / (len(group) - 1) if len(group) > 1 else 0.0
        if name == "batch":
            return standardised(reward, [r for r, _ in everyone])
        assert name == "group_mean_batch", f"write the loop of {name}"
        means = [
            sum(r := reward_PG[q][scored_PG[q]]) / max(len(r), 1) for q in range(len(scored_PG))
        ]
        return standardised(reward - means[p], [r - means[q] for r, q in everyone])

    return [
        [one(p, g) if scored_PG[p, g] else 0.0 for g in range(reward_PG.shape[1])]
        for p in range(len(reward_PG))
    ]


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_every_estimator_equals_its_loop(name, seed):
    rng = np.random.default_rng(seed)
    reward_PG, scored_PG = rng.random((6, 5)), rng.random((6, 5)) < 0.7
    scored_PG[0], scored_PG[1] = False, np.arange(5) == 3  # none scored, one scored
    with_junk_PG = np.where(scored_PG, reward_PG, np.nan)
    actual_PG = advantages.ESTIMATORS[name](with_junk_PG, scored_PG)
    expected_PG = loop_estimate(name, reward_PG, scored_PG)
    np.testing.assert_allclose(actual_PG, expected_PG, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_every_estimator_is_safe_with_equal_rewards_and_groups_of_one(name):
    noisy_PG = np.full((3, 4), 0.3) + np.array([0, 1, -1, 0]) * 1e-17  # rounds to equal
    noisy_PG[:, 0] = 0.1 + 0.2  # one unit in the last place away
    for reward_PG in (noisy_PG, np.ones((3, 4)), noisy_PG[:, :1]):
        advantage_PG = advantages.ESTIMATORS[name](reward_PG, all_scored(reward_PG))
        np.testing.assert_allclose(advantage_PG, 0.0, atol=1e-9)


def test_the_settings_know_every_estimator():
    assert tuple(advantages.ESTIMATORS) == config.ADVANTAGES


def test_boost_multiplies_what_is_wholly_right_and_better_than_its_group():
    advantage = np.array([2.0, 2.0, -1.0, -1.0])
    raw = np.array([1.0, 0.5, 1.0, 0.0])
    boosted = advantages.boost_correct(advantage, raw, factor=1.5)
    np.testing.assert_allclose(boosted, [3.0, 2.0, -1.0, -1.0])
