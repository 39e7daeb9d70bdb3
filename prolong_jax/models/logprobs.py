"""Log-probabilities of chosen tokens, without the logits of a whole row ever being in memory.

The vocabulary is walked in blocks and the response tokens in chunks, forward with a running softmax
and backward again from the hidden states, so that memory does not grow with the vocabulary. As in
Cut Cross-Entropy (arXiv 2411.09009), in plain XLA and with a sharded head.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prolong_jax.mesh import ROW_AXES, constrain
from prolong_jax.types import Array

VOCAB_BLOCK = 8192  # tokens of the vocabulary, on each shard of the head
TOKEN_CHUNK = 2048  # response tokens of each row
LOWEST = -1e30  # for -inf, where -inf - -inf would be NaN


def token_logprobs(
    hidden_BTD: Array,
    head_DV: Array,
    tokens_BT: Array,
    mask_BT: Array,
    temperature: float,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Log-probability of tokens 1 ... T - 1 under the slot before each, and the entropy there.

    logp[t] = l[token[t]] - logsumexp(l), l = hidden[t - 1] @ head / temperature.

    Args:
      hidden_BTD: final hidden states, in the dtype of the products; carries gradient.
      head_DV: output embedding, f32, cast block by block; carries gradient.
      tokens_BT: i32 in [0, V).
      mask_BT: bool, the tokens that count; false for the first of a row, which nothing predicts.
      temperature: > 0.
      mesh: that of the arrays; None on one device.

    Returns:
      f32 [B, T] nats and f32 [B, T] nats, both 0 where the mask is false. Products accumulate in
      float32, and so does the softmax.
    """
    found: Any = _token_logprobs(hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, mesh)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_logprobs(hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, mesh):
    return _forward(hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, mesh)[0]


class _Walk:
    """The loops over vocabulary blocks and token chunks; response tokens stand first in a row."""

    def __init__(self, hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, mesh):
        self.mesh, self.temperature = mesh, temperature
        T, (D, V) = tokens_BT.shape[1], head_DV.shape
        self.chunk = min(TOKEN_CHUNK, T)
        order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
        self.rank_BT = jnp.argsort(order_BT, axis=1)
        order_BT = jnp.pad(order_BT, ((0, 0), (0, -T % self.chunk)))
        before_BT1 = jnp.maximum(order_BT - 1, 0)[..., None]
        hidden_BTD = jnp.take_along_axis(hidden_BTD, before_BT1, axis=1)
        counts_BT1 = (jnp.arange(order_BT.shape[1]) < mask_BT.sum(1)[:, None])[..., None]
        self.hidden_BTD = self.by_rows(jnp.where(counts_BT1, hidden_BTD, 0))
        self.tokens_BT = jnp.take_along_axis(tokens_BT, order_BT, axis=1)
        self.num_chunks = -(-mask_BT.sum(1).max() // self.chunk)
        self.shards = 1 if mesh is None else mesh.shape["tensor"]
        self.shard_len = V // self.shards
        self.block = min(VOCAB_BLOCK, self.shard_len)
        # X: vocabulary of a shard, or of one block of it; S: shards
        self.head_DSX = constrain(
            head_DV.reshape(D, self.shards, self.shard_len), mesh, P("fsdp", "tensor")
        )

    def by_rows(self, x_BTD):
        return constrain(x_BTD, self.mesh, P(ROW_AXES))

    def over_blocks(self, step, carry):
        """carry = step(carry, start, block of the head, ids, which of them are new)."""

        def one(index, carry):
            start = jnp.minimum(index * self.block, self.shard_len - self.block)
            head_DSX = jax.lax.dynamic_slice_in_dim(self.head_DSX, start, self.block, 2)
            # Else the whole head is cast before the loop.
            head_DSX = jax.lax.optimization_barrier(head_DSX).astype(self.hidden_BTD.dtype)
            head_DSX = constrain(head_DSX, self.mesh, P(None, "tensor"))
            column_X = start + jnp.arange(self.block)
            ids_SX = self.shard_len * jnp.arange(self.shards)[:, None] + column_X
            return step(carry, start, head_DSX, ids_SX, column_X >= index * self.block)

        return jax.lax.fori_loop(0, -(-self.shard_len // self.block), one, carry)

    def over_chunks(self, step, carry):
        """carry = step(carry, cut, put): cut takes a chunk of an array, put writes it back."""

        def one(index, carry):
            at = index * self.chunk
            cut = partial(
                jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=self.chunk, axis=1
            )
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
            return step(carry, cut, put)

        return jax.lax.fori_loop(0, self.num_chunks, one, carry)

    def logits(self, cut, head_DSX, new_X):
        """f32 [B, T, S, X] of a chunk and a block."""
        out_BTSX = jnp.einsum(
            "btd,dsx->btsx", cut(self.hidden_BTD), head_DSX, preferred_element_type=jnp.float32
        )
        out_BTSX = constrain(out_BTSX / self.temperature, self.mesh, P(ROW_AXES, None, "tensor"))
        return jnp.where(new_X, out_BTSX, LOWEST)

    def back(self, x_BT, mask_BT):
        """From response tokens first to their slots."""
        return jnp.where(mask_BT, jnp.take_along_axis(x_BT, self.rank_BT, axis=1), 0.0)


def _forward(hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, mesh):
    walk = _Walk(hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, mesh)

    def block_step(carry, _, head_DSX, ids_SX, new_X):
        def chunk_step(carry, cut, put):
            top_BT, sum_BT, weighted_BT, chosen_BT = map(cut, carry)
            logits_BTSX = walk.logits(cut, head_DSX, new_X)
            higher_BT = jnp.maximum(top_BT, logits_BTSX.max((2, 3)))
            p_BTSX = jnp.exp(logits_BTSX - higher_BT[:, :, None, None])
            is_chosen = (cut(walk.tokens_BT)[:, :, None, None] == ids_SX) & new_X
            fade_BT = jnp.exp(top_BT - higher_BT)
            parts = (
                higher_BT,
                sum_BT * fade_BT + p_BTSX.sum((2, 3)),
                weighted_BT * fade_BT + (p_BTSX * logits_BTSX).sum((2, 3)),
                chosen_BT + jnp.where(is_chosen, logits_BTSX, 0.0).sum((2, 3)),
            )
            return tuple(map(put, carry, parts))

        return walk.over_chunks(chunk_step, carry)

    zero_BT = jnp.zeros(walk.tokens_BT.shape, jnp.float32)
    start = (zero_BT + LOWEST, zero_BT, zero_BT, zero_BT)
    top_BT, sum_BT, weighted_BT, chosen_BT = walk.over_blocks(block_step, start)
    sum_BT = jnp.maximum(sum_BT, jnp.finfo(jnp.float32).tiny)  # the chunks that were left out
    lse_BT = top_BT + jnp.log(sum_BT)
    entropy_BT = lse_BT - weighted_BT / sum_BT
    out = walk.back(chosen_BT - lse_BT, mask_BT), walk.back(entropy_BT, mask_BT)
    return out, (hidden_BTD, head_DV, tokens_BT, mask_BT, lse_BT, entropy_BT)


def _backward(temperature, mesh, saved, cotangents):
    hidden_BTD, head_DV, tokens_BT, mask_BT, lse_BT, entropy_BT = saved
    walk = _Walk(hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, mesh)
    T, pad = tokens_BT.shape[1], walk.tokens_BT.shape[1] - tokens_BT.shape[1]
    order_BT = jnp.argsort(walk.rank_BT, axis=1)
    d_logp_BT, d_entropy_BT = (
        jnp.pad(jnp.take_along_axis(jnp.where(mask_BT, x, 0.0), order_BT, 1), ((0, 0), (0, pad)))
        for x in cotangents
    )

    def block_step(carry, start, head_DSX, ids_SX, new_X):
        def chunk_step(carry, cut, put):
            d_hidden_BTD, d_block_DSX = carry
            logits_BTSX = walk.logits(cut, head_DSX, new_X)
            is_chosen = (cut(walk.tokens_BT)[:, :, None, None] == ids_SX) & new_X
            lse, entropy, d_logp, d_entropy = (
                cut(x)[:, :, None, None] for x in (lse_BT, entropy_BT, d_logp_BT, d_entropy_BT)
            )
            p_BTSX = jnp.exp(logits_BTSX - lse)
            d_logits_BTSX = d_logp * (is_chosen - p_BTSX)
            d_logits_BTSX -= d_entropy * p_BTSX * (logits_BTSX - lse + entropy)
            d_logits_BTSX = (d_logits_BTSX / temperature).astype(head_DSX.dtype)
            products = partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_chunk_BTD = walk.by_rows(products("btsx,dsx->btd", d_logits_BTSX, head_DSX))
            d_hidden_BTD = put(d_hidden_BTD, cut(d_hidden_BTD) + d_chunk_BTD)
            d_more_DSX = products("btsx,btd->dsx", d_logits_BTSX, cut(walk.hidden_BTD))
            d_more_DSX = constrain(d_more_DSX, mesh, P("fsdp", "tensor"))
            return d_hidden_BTD, d_block_DSX + d_more_DSX

        d_hidden_BTD, d_head_DSX = carry
        d_block_DSX = jnp.zeros((head_DV.shape[0], walk.shards, walk.block), jnp.float32)
        d_block_DSX = constrain(d_block_DSX, mesh, P("fsdp", "tensor"))
        d_hidden_BTD, d_block_DSX = walk.over_chunks(chunk_step, (d_hidden_BTD, d_block_DSX))
        d_block_DSX += jax.lax.dynamic_slice_in_dim(d_head_DSX, start, walk.block, 2)
        d_head_DSX = jax.lax.dynamic_update_slice_in_dim(d_head_DSX, d_block_DSX, start, 2)
        return d_hidden_BTD, d_head_DSX

    zeros = jnp.zeros_like(walk.hidden_BTD, jnp.float32), jnp.zeros_like(walk.head_DSX, jnp.float32)
    d_hidden_BTD, d_head_DSX = walk.over_blocks(block_step, zeros)
    # The hidden state of slot t predicts token t + 1.
    after_BT = jnp.minimum(jnp.arange(T) + 1, T - 1)
    d_hidden_BTD = jnp.take_along_axis(d_hidden_BTD, walk.rank_BT[:, after_BT][..., None], axis=1)
    predicts_BT = mask_BT[:, after_BT] & (jnp.arange(T) < T - 1)
    d_hidden_BTD = jnp.where(predicts_BT[..., None], d_hidden_BTD, 0.0).astype(hidden_BTD.dtype)
    d_head_DV = d_head_DSX.reshape(head_DV.shape).astype(head_DV.dtype)
    return walk.by_rows(d_hidden_BTD), d_head_DV, None, None


_token_logprobs.defvjp(_forward, _backward)


@jax.custom_vjp
def add_head_gradient(head_DV: Array, hidden_BTD: Array, grad_DV: Array) -> tuple[Array, Array]:
    """Head and hidden states as they are; the gradient of the head starts from `grad_DV`.

    Backward, the sum is ready before the layers have their turn. Added up outside, the gradient of
    this micro-batch would be kept beside the sum until all layers are done.
    """
    return head_DV, hidden_BTD


def _add_forward(head_DV, hidden_BTD, grad_DV):
    return (head_DV, hidden_BTD), grad_DV


def _add_backward(grad_DV, cotangents):
    d_head_DV, d_hidden_BTD = cotangents
    return *jax.lax.optimization_barrier((d_head_DV + grad_DV, d_hidden_BTD)), None


add_head_gradient.defvjp(_add_forward, _add_backward)
