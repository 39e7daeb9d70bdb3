"""Sampling with a KV cache: each prompt is read once for its group, finished rows leave the batch.

A sample is a pure function of (params, prompt, key): its random numbers come from its own key and
the index of the token, never from the batch around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prolong_jax.masked import chosen_logp
from prolong_jax.models.attention import causal_mask
from prolong_jax.models.decoder import Cache, Model, positions_of
from prolong_jax.types import Array, PyTree


@dataclass(frozen=True)
class SamplingRule:
    """How the next token is drawn. Hashable: part of what is compiled."""

    max_len: int  # tokens of a response, at most
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0  # > 0
    top_p: float = 1.0  # in (0, 1]; 1 keeps all tokens


class Samples(NamedTuple):
    """Responses on the host, right-padded."""

    tokens: np.ndarray  # i32 [B, T] stop token included
    logp: np.ndarray  # f32 [B, T] nats, under the distribution that was sampled; 0 past the end
    lengths: np.ndarray  # i32 [B] tokens, stop token included
    stopped: np.ndarray  # bool [B] true where a stop token ended it, false where the budget did


class _Rows(NamedTuple):
    """The responses that are being decoded, on the device."""

    key: Array  # [B] random key of the response
    prompt_len: Array  # i32 [B]
    valid: Array  # bool [B, S] true at the slots of the prompt's real tokens
    token: Array  # i32 [B] the newest token
    done: Array  # bool [B]
    tokens: Array  # i32 [B, T]
    logp: Array  # f32 [B, T]
    cache: Cache


def sampled_logits(logits_BV: Array, rule: SamplingRule) -> Array:
    """Logits f32 [B, V] of the distribution that is sampled: temperature first, then top-p.

    Top-p keeps the smallest set of most likely tokens whose probability reaches `top_p`
    (arXiv 1904.09751).
    """
    logits_BV = logits_BV.astype(jnp.float32) / rule.temperature
    if rule.top_p >= 1.0:
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    rank_BV = jnp.argsort(order_BV, axis=-1)
    dropped_BV = jnp.take_along_axis(before_BV >= rule.top_p, rank_BV, axis=-1)
    return jnp.where(dropped_BV, -jnp.inf, logits_BV)


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


def _record(
    model: Model, params: PyTree, rows: _Rows, hidden_BD: Array, step: Array, rule: SamplingRule
) -> _Rows:
    """Draws token number `step` of each row from its newest hidden state."""
    logits_BV = sampled_logits(model.logits(params, hidden_BD[:, None])[:, 0], rule)
    uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(rows.key)
    token_B = jnp.where(rows.done, rule.pad_id, draw(logits_BV, uniform_B))
    logp_B1 = chosen_logp(logits_BV[:, None], token_B[:, None])
    logp_B1 = jnp.where(rows.done[:, None], 0.0, logp_B1)
    return rows._replace(
        token=token_B,
        done=rows.done | jnp.isin(token_B, jnp.array(rule.stop_ids)),
        tokens=jax.lax.dynamic_update_slice(rows.tokens, token_B[:, None], (0, step)),
        logp=jax.lax.dynamic_update_slice(rows.logp, logp_B1, (0, step)),
    )


@partial(jax.jit, static_argnames=("model", "rule"))
def _prefill(
    model: Model,
    params: PyTree,
    prompt_PS: Array,
    valid_PS: Array,
    keys_PG: Array,
    rule: SamplingRule,
) -> _Rows:
    """Reads each prompt once, shares it with its group, and draws the first tokens."""
    (P, G), T = keys_PG.shape, rule.max_len
    hidden_PSD, cache = model.hidden(
        params, prompt_PS, positions_of(valid_PS), causal_mask(valid_PS)
    )

    def share(x: Array, axis: int) -> Array:
        """One row per response, with room for it along `axis`."""
        widths = [(0, T if i == axis else 0) for i in range(x.ndim)]
        return jnp.repeat(jnp.pad(x, widths), G, axis=0)

    rows = _Rows(
        key=keys_PG.reshape(-1),
        prompt_len=jnp.repeat(valid_PS.sum(-1), G),
        valid=share(valid_PS, 1),
        token=jnp.zeros(P * G, jnp.int32),
        done=jnp.zeros(P * G, bool),
        tokens=jnp.full((P * G, T), rule.pad_id, jnp.int32),
        logp=jnp.zeros((P * G, T)),
        cache=tuple((share(k, 3), share(v, 2)) for k, v in cache),
    )
    hidden_BD = jnp.repeat(hidden_PSD[:, -1], G, axis=0)
    return _record(model, params, rows, hidden_BD, jnp.int32(0), rule)


@partial(jax.jit, static_argnames=("model", "rule"), donate_argnums=(2,))
def _decode(
    model: Model, params: PyTree, rows: _Rows, step: Array, least: int, rule: SamplingRule
) -> tuple[_Rows, Array]:
    """Decodes from token `step` on until at most `least` rows are unfinished or T is reached."""
    S, T = rows.valid.shape[1] - rule.max_len, rule.max_len
    slots = jnp.arange(S + T)

    def unfinished(carry: tuple[_Rows, Array]) -> Array:
        return (carry[1] < T) & ((~carry[0].done).sum() > least)

    def one(carry: tuple[_Rows, Array]) -> tuple[_Rows, Array]:
        rows, step = carry
        slot = S + step - 1  # of the newest token
        mask_B1S = (rows.valid | ((slots >= S) & (slots <= slot)))[:, None]
        position_B1, token_B1 = (rows.prompt_len + step - 1)[:, None], rows.token[:, None]
        hidden_B1D, cache = model.hidden(params, token_B1, position_B1, mask_B1S, rows.cache, slot)
        rows = rows._replace(cache=cache)
        return _record(model, params, rows, hidden_B1D[:, 0], step, rule), step + 1

    return jax.lax.while_loop(unfinished, one, (rows, step))


@jax.jit
def _keep(rows: _Rows, index: Array) -> _Rows:
    return jax.tree.map(lambda x: x[index], rows)


def generate(
    model: Model,
    params: PyTree,
    prompt_PS: Array | np.ndarray,
    valid_PS: Array | np.ndarray,
    keys_PG: Array,
    rule: SamplingRule,
) -> Samples:
    """Samples G responses to each of P prompts, in the order prompt 0's group, prompt 1's, ...

    Whenever half of the rows are finished they leave the batch, down to an eighth of it.

    Args:
      model: the decoder.
      params: its parameters.
      prompt_PS: i32 prompt tokens, left-padded.
      valid_PS: bool, true at real tokens.
      keys_PG: one random key per response.
      rule: how tokens are drawn.

    Returns:
      B = P * G samples of up to `rule.max_len` tokens.
    """
    rows = _prefill(model, params, prompt_PS, valid_PS, keys_PG, rule)
    size, T, step = keys_PG.size, rule.max_len, jnp.int32(1)
    tokens, logp = np.zeros((size, T), np.int32), np.zeros((size, T), np.float32)
    done, held, smallest = np.zeros(size, bool), np.arange(size), size // 8
    while True:
        least = size // 2 if size // 2 >= smallest and size % 2 == 0 else 0
        rows, step = _decode(model, params, rows, step, least, rule)
        tokens[held], logp[held], done[held] = jax.device_get((rows.tokens, rows.logp, rows.done))
        if done[held].all() or step == T:
            break
        size = least
        kept = np.argsort(done[held], kind="stable")[:size]  # the unfinished ones first
        rows, held = _keep(rows, kept), held[kept]
    is_stop_BT = np.isin(tokens, rule.stop_ids) & done[:, None]
    return Samples(tokens, logp, np.where(done, is_stop_BT.argmax(-1) + 1, T), done)


def sample_keys(seed: int, step: int, prompt_numbers: Sequence[int], group_size: int) -> Array:
    """Keys [P, G], folded from (seed, step, prompt number, sample number)."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def group(number: Array) -> Array:
        prompt_key = jax.random.fold_in(step_key, number)
        return jax.vmap(partial(jax.random.fold_in, prompt_key))(jnp.arange(group_size))

    return jax.vmap(group)(jnp.asarray(prompt_numbers, jnp.uint32))


def left_pad(
    prompts: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids i32 [P, S] and their validity bool [P, S].

    Raises:
      ValueError: a prompt has more than `length` tokens.
    """
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        if len(prompt) > length:
            raise ValueError(
                f"rollout.max_prompt_len: a prompt has {len(prompt)} tokens, at most {length} fit; "
                "raise the limit or drop the prompt."
            )
        tokens[row, length - len(prompt) :] = prompt
        valid[row, length - len(prompt) :] = True
    return tokens, valid
