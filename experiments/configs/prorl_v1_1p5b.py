"""ProRL v1 (arXiv 2505.24864) at its size: DeepSeek-R1-Distill-Qwen-1.5B, the eight runs of appendix E.

What is not set here is config.py's default, which is the paper's where it states one. From the
paper: what changes from run to run, n, temperature, clip, batch, learning rate, the sizes of the five
data sets, 8k tokens and 16k at the end, the last run's 200 steps. Ours, since no number is published:
the steps of the other runs, the limits of the reset rules, and the factor of 0 on the reward of
responses that do not end (runs 4 and later). The KL coefficient is from a secondary source.

The data sets are to be put into data/ (see the paths below), those of validation into
data/evaluation (data/evaluation_sets.py of the package says under which names); `python -m prolong_jax.data --config=...`
says what is missing. Nobody has run this yet.

Hardware: 16 TPU v5e, 8 H100, or more. Does it fit?
Command: python -m prolong_jax.compile_check --config=experiments/configs/prorl_v1_1p5b.py
    --topology=v5e:4x4
Training: python -m prolong_jax.train --config=experiments/configs/prorl_v1_1p5b.py --workdir=...
"""

from ml_collections import ConfigDict

from prolong_jax.config import ASSETS

FOUR = {"math": 40.0, "code": 24.0, "stem": 25.0, "logic": 37.0}  # thousands of prompts
FIVE = FOUR | {"instruct": 10.0}
SOURCES = {
    "deepscaler": {"path": "data/deepscaler.json", "domain": "math"},
    "eurus_code": {"path": "data/eurus2/train.parquet", "only": "code"},
    "scp116k": {"path": "data/scp116k.parquet", "domain": "stem"},
    "reasoning_gym": {"path": "data/reasoning_gym/train.jsonl", "domain": "logic"},
    "nemotron_if": {"path": "data/instruction_following.jsonl", "domain": "instruct"},
}
# The paper watches parts of these, of Reasoning Gym the task graph_color alone.
MONITOR = ("aime24", "codeforces", "gpqa_diamond", "ifeval", "reasoning_gym_test")
# The owner of a run watches and resets; these rules, whose numbers are ours, do it unattended.
RULES = {"plateau_window": 5, "plateau_gain": 0.0, "degradation": 0.03, "cooldown": 50}
STOP = {"shaping.stop_properly": 0.0}


def stage(name: str, steps: int, mixture: dict, overrides: dict, *, resets: bool) -> dict:
    return {
        "name": name,
        "steps": steps,
        "mixture": mixture,
        "overrides": overrides,
        "reset_at_start": resets,
        "reset": dict(RULES),
    }


def get_config() -> ConfigDict:
    wide = STOP | {"rollout.group_size": 32}
    long = STOP | {"rollout.max_response_len": 15360, "update.row_len": 16384}
    return ConfigDict(
        {
            "total_steps": 2000,
            "model": {
                "path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
                "shape": str(ASSETS / "shapes" / "qwen2_1p5b_r1.json"),
            },
            "mesh": {"fsdp": 8},
            "rollout": {"sample_rows": 64},
            "data": {"sources": SOURCES},
            "validation": {"sets": MONITOR, "directory": "data/evaluation"},
            "checkpoint": {"keep_every": 500},
            "stages": [
                stage("run 1: four domains", 250, FOUR, {}, resets=False),
                stage("run 2: reset", 250, FOUR, {}, resets=True),
                stage("run 3: instruction following", 300, FIVE, {}, resets=False),
                stage("run 4: proper ends", 250, FIVE, STOP, resets=False),
                stage("run 5: proper ends", 250, FIVE, STOP, resets=False),
                stage("run 6: 32 responses", 250, FIVE, wide, resets=True),
                stage("run 7: 32 responses", 250, FIVE, wide, resets=True),
                stage("run 8: 16k tokens", 200, FIVE, long, resets=False),
            ],
        }
    )
