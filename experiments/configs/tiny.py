"""The embedded model on the embedded tasks: a prolonged run in miniature, in three stages.

As in the paper's run history (arXiv 2505.24864, appendix E), instruction following joins late, and
the reference and the optimizer are reset when a stage begins, when validation stalls, and on a
schedule. Sizes, learning rate and KL coefficient are ours.

Hardware: 2 CPU cores. Time: about 8 minutes.
Command: python -m prolong_jax.train --config=experiments/configs/tiny.py --workdir=runs/tiny
Expected: the validation score on the easy and middle levels rises from 28% to about 82%;
experiments/LOG.md has the numbers of three seeds.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "total_steps": 100,
            "model": {"dtype": "float32", "remat": "none"},
            "rollout": {
                "prompts_per_step": 24,
                "group_size": 8,
                "temperature": 1.0,
                "max_prompt_len": 64,
                "max_response_len": 128,
                "sample_rows": 192,
                "cache_lens": 4,
                "compile_ahead": False,
                "max_sampling_rounds": 2,
            },
            "loss": {"kl_coef": 1e-3},
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 8},
            "update": {"micro_batch_rows": 1, "row_len": 580},
            "validation": {"every": 10, "temperature": 1.0, "top_p": 1.0},
            "stages": [
                {
                    "name": "four domains",
                    "steps": 30,
                    "mixture": {"math": 1.0, "code": 1.0, "stem": 1.0, "logic": 1.0},
                },
                {
                    "name": "five domains",
                    "steps": 50,
                    "end_on_plateau": True,
                    "reset_at_start": True,
                    "reset": {"plateau_window": 2, "plateau_gain": 0.05},
                },
                {
                    "name": "weak domains first",
                    "mixture": {"math": 1, "code": 1, "stem": 2, "logic": 2, "instruct": 0.5},
                    "reset": {"every": 15, "plateau_window": 2, "plateau_gain": 0.05},
                },
            ],
        }
    )
