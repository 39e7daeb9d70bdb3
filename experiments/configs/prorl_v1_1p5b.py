"""ProRL v1 (arXiv 2505.24864) at its size: DeepSeek-R1-Distill-Qwen-1.5B with 16k-token responses.

What is not set here is config.py's default, which is the paper's where it states one. Rows hold one
prompt with one response of the longest kind. Nobody has run this yet.

Hardware: 16 TPU v5e, 8 H100, or more. Does it fit?
Command: python -m prolong_jax.compile_check --config=experiments/configs/prorl_v1_1p5b.py
    --topology=v5e:4x4
"""

from ml_collections import ConfigDict

from prolong_jax.config import ASSETS


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
                "shape": str(ASSETS / "shapes" / "qwen2_1p5b_r1.json"),
            },
            "mesh": {"fsdp": 8},
            "rollout": {"max_prompt_len": 1024, "max_response_len": 15360, "sample_rows": 64},
            "update": {"row_len": 16384, "micro_batch_rows": 8},
        }
    )
