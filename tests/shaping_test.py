"""What is added to a reward for length, ends and repetition: by hand, and against loops."""

import math

import numpy as np
import pytest

from prolong_jax import shaping
from prolong_jax.presets import PRESETS


@pytest.mark.parametrize(
    ("coef", "unfinished"),
    [(1.0, [0.8, 0.0]), (0.5, [0.4, 0.0]), (0.0, [0.0, 0.0]), (-0.5, [-0.5, -0.5])],
)
def test_stop_properly_scales_or_replaces_the_reward_of_unfinished_responses(coef, unfinished):
    reward = np.array([0.8, 0.0, 0.8, 0.0])
    finished = np.array([True, True, False, False])
    shaped = shaping.stop_properly(reward, finished, coef=coef)
    np.testing.assert_allclose(shaped, [0.8, 0.0, *unfinished])


@pytest.mark.parametrize("coef", [1.5, float("nan")])
def test_stop_properly_refuses_a_coefficient_above_one(coef):
    with pytest.raises(ValueError, match="coef must be at most 1"):
        shaping.stop_properly(np.ones(2), np.array([True, False]), coef=coef)


def test_soft_overlong_by_hand():
    """The numbers of DAPO: 20,480 tokens, of them 4,096 in which the penalty grows."""
    length = np.array([0, 16_384, 17_408, 18_432, 20_480, 30_000])
    penalty = shaping.soft_overlong(length, limit=20_480, buffer=0.2)
    np.testing.assert_allclose(penalty, [0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    np.testing.assert_array_equal(shaping.soft_overlong(length, limit=20_480, buffer=0.0), 0.0)


def test_soft_overlong_equals_the_formula_for_every_length():
    limit, buffer = 50, 0.3
    for length in range(60):
        if length <= limit - 15:
            expected = 0.0
        elif length <= limit:
            expected = ((limit - 15) - length) / 15
        else:
            expected = -1.0
        found = shaping.soft_overlong(np.array([length]), limit=limit, buffer=buffer)
        assert found[0] == pytest.approx(expected)


def test_cosine_length_goes_from_high_to_low():
    length = np.array([0, 25, 50, 100, 120])
    found = shaping.cosine_length(length, limit=100, low=-1.0, high=0.5)
    quarter = -1.0 + 0.75 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(found, [0.5, quarter, -0.25, -1.0, -1.0])
    assert (np.diff(shaping.cosine_length(np.arange(101), limit=100, low=0.0, high=1.0)) < 0).all()


def test_the_cycle_is_on_then_off():
    on = [step for step in range(1, 1301) if shaping.is_on(step, on=100, off=500)]
    assert on == [*range(1, 101), *range(601, 701), *range(1201, 1301)]
    assert all(shaping.is_on(step, on=0, off=0) for step in range(1, 9))


@pytest.mark.parametrize(
    ("tokens", "size", "share"),
    [
        ([1, 2, 3, 4], 2, 0.0),
        ([1, 1, 1, 1, 1], 1, 4 / 5),
        ([1, 2, 1, 2, 1, 2], 2, 3 / 5),  # 12 21 12 21 12
        ([1, 2, 3], 4, 0.0),  # too short
        ([], 2, 0.0),
    ],
)
def test_repetition_by_hand(tokens, size, share):
    assert shaping.repetition(tokens, size) == pytest.approx(share)


def test_dapo_prefers_the_right_to_the_wrong_and_the_short_to_the_long():
    """Right and short, right at the limit, wrong and short, wrong at the limit."""
    raw, length = np.array([1.0, 1.0, 0.0, 0.0]), np.array([1, 10, 1, 10])
    settings = PRESETS["dapo"]["shaping"]
    penalty = shaping.soft_overlong(length, limit=10, buffer=settings["overlong_buffer"])
    shaped = raw + settings["overlong_coef"] * penalty
    # DAPO's own: 1, 0, -1, -2, so in these units
    np.testing.assert_allclose(shaped, (np.array([1.0, 0.0, -1.0, -2.0]) + 1) / 2)
