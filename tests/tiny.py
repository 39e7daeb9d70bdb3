"""Small models and conversations that several tests use."""

import jax
import numpy as np

from prolong_jax.models.decoder import Model, ModelConfig
from prolong_jax.packing import Conversation

SHAPE = ModelConfig(
    vocab_size=96,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ff_dim=48,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tied_head=True,
    max_positions=256,
)
MODEL = Model(SHAPE)


def random_params(seed: int = 0):
    """Weights large enough for distributions that are far from uniform."""
    params = MODEL.init(jax.random.key(seed))
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)


def random_conversations(count: int, seed: int = 0) -> list[Conversation]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, SHAPE.vocab_size, rng.integers(low, high)).astype(np.int32)

    prompts = [tokens(1, 7) for _ in range(-(-count // 3))]  # three responses to each
    return [
        Conversation(
            prompt=prompts[i // 3],
            response=response,
            sampler_logp=-rng.random(len(response), np.float32) - 3,
            advantage=float(rng.normal()),
        )
        for i, response in enumerate(tokens(1, 14) for _ in range(count))
    ]
