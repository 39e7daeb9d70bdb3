"""The embedded model for 1,500 steps in five stages, with resets by rule, by schedule and by stage.

Shows that a prolonged run goes on unattended: smaller steps than those of tiny.py, so that many fit
into an hour. All decoding is compiled ahead, so that no program, and no memory for one, comes late.
The stages follow the paper's run history (arXiv 2505.24864, appendix E) in kind: instruction
following joins late, then responses without an end are paid less, then groups grow, then the weak
domains come first. All numbers are ours.

Hardware: 2 CPU cores. Time: about 35 minutes.
Command: python -m prolong_jax.train --config=experiments/configs/tiny_prolonged.py
    --workdir=runs/tiny_prolonged
Expected: experiments/LOG.md has the resets, and the reward, entropy and KL around each.
"""

from ml_collections import ConfigDict

DOMAINS = ("math", "code", "stem", "logic", "instruct")


def get_config() -> ConfigDict:
    rules = {"plateau_window": 4, "plateau_gain": 0.0, "degradation": 0.05, "kl_spike": 5.0}
    rules |= {"min_entropy": 0.02, "max_unterminated": 0.3, "cooldown": 40}
    return ConfigDict(
        {
            "total_steps": 1500,
            "model": {"dtype": "float32", "remat": "none"},
            "rollout": {
                "prompts_per_step": 4,
                "group_size": 8,
                "temperature": 1.0,
                "max_prompt_len": 64,
                "max_response_len": 128,
                "sample_rows": 32,
                "cache_lens": 2,
                "compile_ahead": True,
                "max_sampling_rounds": 2,
            },
            "loss": {"kl_coef": 1e-3},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 8},
            "update": {"micro_batch_rows": 1, "row_len": 580, "num_minibatches": 2},
            "validation": {"every": 25, "prompts_per_level": 4, "temperature": 1.0, "top_p": 1.0},
            "checkpoint": {"every": 50, "keep_every": 400},
            "stages": [
                {
                    "name": "four domains",
                    "steps": 300,
                    "mixture": dict.fromkeys(DOMAINS[:-1], 1.0),
                    "reset": {**rules},
                },
                {
                    "name": "five domains",
                    "steps": 350,
                    "reset_at_start": True,
                    "reset": {**rules},
                },
                {
                    "name": "proper ends",
                    "steps": 300,
                    "reset": {**rules, "every": 75},
                    "overrides": {"shaping.stop_properly": 0.0},
                },
                {
                    "name": "larger groups",
                    "steps": 250,
                    "reset": {**rules},
                    "overrides": {"rollout.group_size": 16, "rollout.prompts_per_step": 2},
                },
                {
                    "name": "weak domains, reference alone",
                    "mixture": {
                        "math": 1.0,
                        "code": 1.0,
                        "stem": 2.0,
                        "logic": 2.0,
                        "instruct": 0.5,
                    },
                    "reset": {**rules, "every": 60, "optimizer": False},
                },
            ],
        }
    )
