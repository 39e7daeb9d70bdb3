"""ProRL v2 at its size: v1's model and data with a wider schedule of resets that keep the optimizer.

The objective is preset prorl_v2 (prolong_jax/presets.py): REINFORCE++ baseline, clip 0.2/0.28, a k2
estimate of the KL, no reward for responses that do not end, a length penalty in 100 of 600 steps. From
the authors' post: a reset of the reference alone every 200 to 500 steps, on a spike of the KL or when
validation stalls, 8k tokens, 3,000 steps. Ours: 300 steps between resets, the limits of the other rules,
and the size of the length penalty. Nobody has run this yet.

Hardware: 16 TPU v5e, 8 H100, or more.
Command: python -m prolong_jax.train --config=experiments/configs/prorl_v2_1p5b.py --workdir=...
"""

from ml_collections import ConfigDict

from experiments.configs.prorl_v1_1p5b import FIVE
from experiments.configs.prorl_v1_1p5b import get_config as v1


def get_config() -> ConfigDict:
    reset = {"every": 300, "plateau_window": 5, "plateau_gain": 0.0, "kl_spike": 3.0}
    reset |= {"cooldown": 100, "optimizer": False}
    config = v1()
    config.update(
        {
            "total_steps": 3000,
            "preset": "prorl_v2",
            "rollout": {"prompts_per_step": 512},  # as the baseline of BroRL, which continues v2
            "stages": [{"name": "five domains", "mixture": FIVE, "reset": reset}],
        }
    )
    return config
