"""BroRL (arXiv 2510.01180) at its size: 512 responses to each of 128 prompts, after 3,000 steps of v2.

From the paper: 512 responses, 128 prompts, 16k tokens, mini-batches per step as in v2, a learning rate
that grows with the square root of the batch (65,536 responses against 8,192: a factor of 2.83). Ours:
the base rate, v1's 2e-6, since it is not published.

`model.path` is where `python -m prolong_jax.export` wrote the policy of the v2 run. Nobody has run
this yet.

Hardware: the authors used 64 H100.
Command: python -m prolong_jax.train --config=experiments/configs/brorl_1p5b.py --workdir=...
    --config.model.path=DIR
"""

from ml_collections import ConfigDict

from experiments.configs.prorl_v2_1p5b import get_config as v2

ROOT_OF_BATCH = (128 * 512 / (512 * 16)) ** 0.5


def get_config() -> ConfigDict:
    config = v2()
    config.update(
        {
            "total_steps": 200,
            "rollout": {"prompts_per_step": 128, "group_size": 512, "max_response_len": 15360},
            "update": {"row_len": 16384},
            "optimizer": {"learning_rate": 2e-6 * ROOT_OF_BATCH},
        }
    )
    return config
