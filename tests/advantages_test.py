"""Group advantages, dead groups and the penalty for not stopping."""

import math

import numpy as np
import pytest

from prolong_jax import advantages

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
    shaped_G = advantages.stop_properly(raw_G, finished_G, coef=0.0)
    assert advantages.is_dead(raw_G, all_scored(raw_G))
    assert not advantages.is_dead(shaped_G, all_scored(raw_G))


@pytest.mark.parametrize(
    ("coef", "unfinished"),
    [(1.0, [0.8, 0.0]), (0.5, [0.4, 0.0]), (0.0, [0.0, 0.0]), (-0.5, [-0.5, -0.5])],
)
def test_stop_properly_scales_or_replaces_the_reward_of_unfinished_responses(coef, unfinished):
    reward = np.array([0.8, 0.0, 0.8, 0.0])
    finished = np.array([True, True, False, False])
    shaped = advantages.stop_properly(reward, finished, coef=coef)
    np.testing.assert_allclose(shaped, [0.8, 0.0, *unfinished])


@pytest.mark.parametrize("coef", [1.5, float("nan")])
def test_stop_properly_refuses_a_coefficient_above_one(coef):
    with pytest.raises(ValueError, match="coef must be at most 1"):
        advantages.stop_properly(np.ones(2), np.array([True, False]), coef=coef)
