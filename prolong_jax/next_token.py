"""How the next token is drawn: temperature, top-k, top-p, min-p, keys, and the draw itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from prolong_jax.types import Array


@dataclass(frozen=True)
class SamplingRule:
    """How the next token is drawn. Hashable: part of what is compiled."""

    stop_ids: tuple[int, ...]
    temperature: float = 1.0  # > 0
    top_k: int = 0  # keep so many of the most likely tokens; 0 keeps all
    top_p: float = 1.0  # in (0, 1]; 1 keeps all tokens
    min_p: float = 0.0  # in [0, 1); drop what is less likely than this share of the likeliest


def sampled_logits(logits_BV: Array, rule: SamplingRule) -> Array:
    """Logits f32 [B, V] of the distribution that is sampled; -inf at tokens that are dropped.

    Temperature first, then top-k, top-p and min-p, each on what the one before left. Top-p keeps
    the smallest set of most likely tokens whose probability reaches `top_p` (arXiv 1904.09751),
    min-p those of at least `min_p` times the highest probability (arXiv 2407.01082). Tokens as
    likely as the last one kept are kept too.
    """
    logits_BV = logits_BV.astype(jnp.float32) / rule.temperature
    lowest_B1 = jnp.full_like(logits_BV[:, :1], -jnp.inf)
    if 0 < rule.top_k < logits_BV.shape[-1] or rule.top_p < 1.0:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        if 0 < rule.top_k < logits_BV.shape[-1]:
            lowest_B1 = sorted_BV[:, rule.top_k - 1 : rule.top_k]
            sorted_BV = jnp.where(sorted_BV >= lowest_B1, sorted_BV, -jnp.inf)
        if rule.top_p < 1.0:
            p_BV = jax.nn.softmax(sorted_BV)
            is_kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < rule.top_p
            lowest_p_B1 = jnp.where(is_kept_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
            lowest_B1 = jnp.maximum(lowest_B1, lowest_p_B1)
    if rule.min_p > 0.0:
        top_B1 = logits_BV.max(axis=-1, keepdims=True)
        lowest_B1 = jnp.maximum(lowest_B1, top_B1 + np.log(rule.min_p))
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def draw(logits_BV: Array, uniform_B: Array) -> Array:
    """Inverts the cumulative distribution at `uniform_B` in [0, 1). Returns token ids i32 [B].

    Two levels, block sums first, because a cumulative sum over a whole vocabulary is slow.
    """
    B, V = logits_BV.shape
    size = int(np.ceil(np.sqrt(V)))
    blocks = -(-V // size)
    p_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
    p_BKC = jnp.pad(p_BV, ((0, 0), (0, blocks * size - V))).reshape(B, blocks, size)
    mass_BK = p_BKC.sum(axis=-1)
    target_B = uniform_B * mass_BK.sum(axis=-1)
    block_B1, before_B = _invert(mass_BK, target_B)
    inside_BC = jnp.take_along_axis(p_BKC, block_B1[:, :, None], axis=1)[:, 0]
    offset_B1, _ = _invert(inside_BC, jnp.maximum(target_B - before_B, 0.0))
    return (block_B1 * size + offset_B1)[:, 0].astype(jnp.int32)


def _invert(p_BX: Array, target_B: Array) -> tuple[Array, Array]:
    """The first index [B, 1] whose cumulative sum exceeds the target, and the sum before it [B].

    Rounding may put the target at the whole sum: then it is the last index of any probability.
    """
    ends_BX = jnp.cumsum(p_BX, axis=-1)
    last_B = p_BX.shape[-1] - 1 - jnp.argmax(p_BX[:, ::-1] > 0, axis=-1)
    index_B1 = jnp.minimum((ends_BX <= target_B[:, None]).sum(-1), last_B)[:, None]
    before_BX = ends_BX - p_BX
    return index_B1, jnp.take_along_axis(before_BX, index_B1, axis=-1)[:, 0]


def sample_keys(seed: int, step: int, prompt_numbers: Sequence[int], group_size: int) -> np.ndarray:
    """Key data u32 [P, G, 2], folded from (seed, step, prompt number, sample number)."""
    return np.asarray(_sample_keys(seed, step, np.asarray(prompt_numbers, np.uint32), group_size))


@partial(jax.jit, static_argnames="group_size")
def _sample_keys(seed: int, step: int, numbers_P: Array, group_size: int) -> Array:
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def group(number: Array) -> Array:
        prompt_key = jax.random.fold_in(step_key, number)
        return jax.vmap(partial(jax.random.fold_in, prompt_key))(jnp.arange(group_size))

    return jax.random.key_data(jax.vmap(group)(numbers_P))
