"""Training on one domain learns it. Apart from train_test.py, beside which it runs."""

import numpy as np

from prolong_jax import train
from prolong_jax.metrics import read_rows
from tests.train_test import arguments


def test_twenty_steps_on_one_domain_raise_its_reward(tmp_path):
    learn = {
        "total_steps": 20,
        "rollout__prompts_per_step": 8,
        "rollout__group_size": 8,
        "rollout__max_response_len": 64,
        "validation__every": 100,
        "stages": [{"mixture": {"math": 1.0}, "levels": {"easy": 1.0, "middle": 1.0}}],
    }
    assert train.main(arguments(tmp_path, **learn)) == 0
    rewards = [r["reward/math"] for r in read_rows(tmp_path / "metrics.jsonl")[1:]]
    early, late = np.mean(rewards[:4]), np.mean(rewards[-4:])
    assert late > early + 0.1, rewards
