"""The embedded model on the embedded tasks: a prolonged run in miniature, in three stages.

Hardware: 2 CPU cores. Time: about 8 minutes.
Command: python -m prolong_jax.train --config=experiments/configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "total_steps": 100,
            "model": {"dtype": "float32"},
            "rollout": {
                "prompts_per_step": 24,
                "group_size": 8,
                "temperature": 1.0,
                "max_prompt_len": 64,
                "max_response_len": 128,
                "max_sampling_rounds": 3,
            },
            "loss": {"kl_coef": 1e-3},
            "optimizer": {"learning_rate": 2e-4},
            "update": {"micro_batch_rows": 4, "row_len": 192},
            "validation": {"every": 10, "temperature": 1.0, "top_p": 1.0},
            "stages": [
                {
                    "name": "four domains",
                    "steps": 30,
                    "mixture": {"math": 1.0, "code": 1.0, "stem": 1.0, "logic": 1.0},
                },
                {
                    "name": "five domains",
                    "steps": 40,
                    "reset_at_start": True,
                    "reset": {"plateau_window": 2},
                },
                {
                    "name": "harder",
                    "levels": {"easy": 0.5, "middle": 1.0, "hard": 2.0},
                    "reset": {"every": 20},
                },
            ],
        }
    )
