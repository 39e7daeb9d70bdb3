"""Rotary position embedding (arXiv 2104.09864) with the scalings of published checkpoints."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from prolong_jax.types import Array


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are stretched. Field names are the keys of config.json."""

    rope_type: str = "default"  # default, linear, llama3 or yarn
    factor: float = 1.0  # all but default
    original_max_position_embeddings: int = 0  # llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole numbers as ends of the ramp
    attention_factor: float = 1.0  # yarn: on cosine and sine


DEFAULT = RopeScaling()


def rotate(
    x_BTHC: Array, positions_BT: Array, theta: float, scaling: RopeScaling = DEFAULT
) -> Array:
    """Turns the halves of each head against each other, by angles position * frequency."""
    frequency = frequencies(x_BTHC.shape[-1], theta, scaling)
    angle = (positions_BT[..., None] * frequency)[:, :, None, :]
    cos, sin = (f(angle) * scaling.attention_factor for f in (jnp.cos, jnp.sin))
    cos_BT1C, sin_BT1C = (jnp.concatenate([x, x], axis=-1) for x in (cos, sin))
    # (first, second) -> (-second, first), exact in any dtype; slicing halves is slower.
    half = np.eye(x_BTHC.shape[-1] // 2)
    turn_CC = np.block([[0 * half, half], [-half, 0 * half]])
    turned_BTHC = jnp.matmul(x_BTHC, turn_CC.astype(x_BTHC.dtype), precision="highest")
    return (x_BTHC * cos_BT1C + turned_BTHC * sin_BT1C).astype(x_BTHC.dtype)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling = DEFAULT) -> np.ndarray:
    """Radians per position f32 [head_dim / 2], rounded as `transformers` does."""
    base = np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    frequency = np.float32(1) / base
    kind = scaling.rope_type
    if kind == "linear":
        frequency = frequency / scaling.factor
    elif kind == "llama3":
        frequency = _llama3(frequency, scaling)
    elif kind == "yarn":
        frequency = _yarn(frequency, head_dim, theta, scaling)
    elif kind != "default":
        raise ValueError(f"rope_type: expected default, linear, llama3 or yarn, got {kind!r}.")
    return frequency.astype(np.float32)


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves are stretched by the factor, short ones kept, a ramp between (Llama 3.1)."""
    turns = scaling.original_max_position_embeddings * frequency / np.float32(2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def _yarn(frequency: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """As `_llama3`, with a ramp over the index of the frequency (arXiv 2309.00071)."""

    def index_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return frequency / scaling.factor * stretched + frequency * (1 - stretched)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """The attention factor of a yarn configuration that does not state it."""

    def log_scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return log_scale(mscale) / log_scale(mscale_all_dim)
    return log_scale(1.0)
