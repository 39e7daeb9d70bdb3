"""Attention, by backend: plain XLA anywhere, splash attention on TPU, cuDNN on GPU.

With a KV cache attention is always plain XLA; the backends are for whole packed rows, where they
save the memory of T x T weights.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prolong_jax.mesh import ROW_AXES
from prolong_jax.types import Array

BACKENDS = {"tpu": "splash", "gpu": "cudnn"}  # by platform; others have plain XLA
QUERY_BLOCK = 512  # queries whose weights plain XLA holds at once; longer rows are walked
SPLASH_BLOCK = 512  # queries and keys that splash attention multiplies at once
SPLASH_READ = 2048  # keys that it reads at once; its backward has a copy of dq for each such block


class Packed(NamedTuple):
    """Which tokens of a packed row see each other: `causal_mask` within segment and prompt."""

    segments: Array  # i32 [B, T] number of the token's segment in its row; 0 is padding
    prompts: Array  # i32 [B, T] number of the segment that holds the segment's prompt


class Layout(NamedTuple):
    """The parts of a packed row: slots for shared prompts, then lanes of responses.

    A segment lies in one part, and tokens of a lane see that lane and the prompts alone.
    """

    prompt_slots: int = 0  # 0: no such slots, each response has its prompt in its own segment
    lanes: int = 1  # of equal length


def backend_for(setting: str, platform: str, dtype: jnp.dtype) -> str:
    """The backend of a setting, "auto" resolved by the platform of the devices.

    cuDNN has kernels for 16-bit types alone.

    Raises:
      ValueError: a backend that the platform does not have.
    """
    best = BACKENDS.get(platform, "xla")
    if best == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        best = "xla"
    if setting not in ("auto", "xla", best) and (platform, setting) != ("cpu", "splash"):
        raise ValueError(
            f"config: 'model.attention' = {setting!r} does not run on {platform} with "
            f"{jnp.dtype(dtype).name}; expected auto, xla{'' if best == 'xla' else ' or ' + best}."
        )
    return best if setting == "auto" else setting


def attend(q_BTHC: Array, k_BKCS: Array, v_BKSC: Array, mask_BTS: Array) -> Array:
    """Grouped-query attention in plain XLA; softmax in float32. Returns [B, T, H, C]."""
    (B, T, H, C), (K, S) = q_BTHC.shape, (k_BKCS.shape[1], k_BKCS.shape[3])
    G = H // K  # query heads that share a kv head
    q_BKXC = q_BTHC.reshape(B, T, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, C)
    scores = jnp.matmul(q_BKXC * C**-0.5, k_BKCS, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores.reshape(B, K, G, T, S), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSC.dtype)
    out_BKXC = jnp.matmul(weights.reshape(B, K, G * T, S), v_BKSC)
    return out_BKXC.reshape(B, K, G, T, C).transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def attend_packed(
    q_BTHC: Array,
    k_BTKC: Array,
    v_BTKC: Array,
    packed: Packed,
    layout: Layout,
    backend: str,
    mesh: Mesh | None,
) -> Array:
    """Attention within packed rows. Returns [B, T, H, C].

    Args:
      q_BTHC, k_BTKC, v_BTKC: rotated queries and keys, and values.
      packed: who sees whom. "splash" wants every prompt in its response's own segment.
      layout: of the rows; lets plain XLA leave out what cannot see each other.
      backend: "xla", "splash" or "cudnn".
      mesh: over which rows and heads are split; None on one device.
    """
    if backend == "splash":
        return _splash(q_BTHC, k_BTKC, v_BTKC, packed.segments, mesh)
    if backend == "cudnn":
        return _cudnn(q_BTHC, k_BTKC, v_BTKC, packed, mesh)
    start, lanes = layout
    if not start:
        return _attend_part(q_BTHC, k_BTKC, v_BTKC, packed)

    def prompts(x: Array) -> Array:
        return x[:, :start]

    def by_lane(x: Array) -> Array:
        return x[:, start:].reshape(-1, (x.shape[1] - start) // lanes, *x.shape[2:])

    def seen(x: Array) -> Array:
        return jnp.concatenate([jnp.repeat(prompts(x), lanes, axis=0), by_lane(x)], axis=1)

    first = _attend_part(
        prompts(q_BTHC), prompts(k_BTKC), prompts(v_BTKC), Packed(*map(prompts, packed))
    )
    rest = _attend_part(by_lane(q_BTHC), seen(k_BTKC), seen(v_BTKC), Packed(*map(seen, packed)))
    return jnp.concatenate([first, rest.reshape(-1, *q_BTHC[:, start:].shape[1:])], axis=1)


def _attend_part(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, packed: Packed) -> Array:
    """Plain XLA; the queries are the last T of the S tokens."""
    k_BKCS, v_BKSC = k_BSKC.transpose(0, 2, 3, 1), v_BSKC.transpose(0, 2, 1, 3)
    (B, T, H, C), S = q_BTHC.shape, k_BSKC.shape[1]
    if T <= QUERY_BLOCK:
        return attend(q_BTHC, k_BKCS, v_BKSC, packed_mask(*packed, S - T, T))

    @jax.checkpoint
    def block(start: Array) -> Array:
        queries = jax.lax.dynamic_slice_in_dim(q_BTHC, start, QUERY_BLOCK, 1)
        return attend(queries, k_BKCS, v_BKSC, packed_mask(*packed, S - T + start, QUERY_BLOCK))

    starts = jnp.minimum(jnp.arange(0, T, QUERY_BLOCK), T - QUERY_BLOCK)
    blocks = jax.lax.map(block, starts)  # the last one overlaps where T is no multiple
    whole, rest = blocks[:-1], blocks[-1][:, -((T - 1) % QUERY_BLOCK + 1) :]
    whole = whole.transpose(1, 0, 2, 3, 4).reshape(B, -1, H, C)
    return jnp.concatenate([whole, rest], axis=1)


def _per_device(function, mesh: Mesh | None, q_BTHC, k_BTKC, v_BTKC, *by_row):
    """Runs a kernel that is not split by XLA on the rows and heads of each device."""
    if mesh is None:
        return function(q_BTHC, k_BTKC, v_BTKC, *by_row)
    tensor, K = mesh.shape["tensor"], k_BTKC.shape[2]
    if K % tensor:  # a device has query heads of one kv head at most: give each its own copy
        repeats = q_BTHC.shape[2] // K
        k_BTKC, v_BTKC = jnp.repeat(k_BTKC, repeats, 2), jnp.repeat(v_BTKC, repeats, 2)
    heads, rows = P(ROW_AXES, None, "tensor"), P(ROW_AXES)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(heads, heads, heads, *[rows for _ in by_row]),
        out_specs=heads,
        check_vma=False,  # the kernels do not say over which axes their results vary
    )(q_BTHC, k_BTKC, v_BTKC, *by_row)


def _splash(q_BTHC, k_BTKC, v_BTKC, segments_BT, mesh):
    """Pallas kernel for TPU, interpreted on CPU; skips blocks above the diagonal."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    T, C = q_BTHC.shape[1], q_BTHC.shape[3]
    size = min(SPLASH_BLOCK, -(-T // 128) * 128)
    pad, padded = -T % size, T + -T % size
    read = next(n for n in range(SPLASH_READ // size * size, 0, -size) if padded % n == 0)
    blocks = BlockSizes(
        block_q=size,
        block_kv=read,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=read,
        block_kv_dkv_compute=size,
        use_fused_bwd_kernel=True,
    )
    on_cpu = (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "cpu"

    def local(q_BTHC, k_BTKC, v_BTKC, segments_BT):
        kernel = make_splash_mha(
            MultiHeadMask([CausalMask((padded, padded))] * q_BTHC.shape[2]),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            interpret=on_cpu,
        )
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
            for x in (q_BTHC * C**-0.5, k_BTKC, v_BTKC)
        )
        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, pad)))
        out_BHTC: Any = jax.vmap(kernel)(q, k, v, SegmentIds(segments_BT, segments_BT))
        return out_BHTC.transpose(0, 2, 1, 3)[:, :T]

    return _per_device(local, mesh, q_BTHC, k_BTKC, v_BTKC, segments_BT)


def _cudnn(q_BTHC, k_BTKC, v_BTKC, packed, mesh):
    """cuDNN's fused attention; the mask alone has T x T entries."""

    def local(q_BTHC, k_BTKC, v_BTKC, segments_BT, prompts_BT):
        mask_B1TS = packed_mask(segments_BT, prompts_BT)[:, None]
        attention = partial(jax.nn.dot_product_attention, implementation="cudnn")
        return attention(q_BTHC, k_BTKC, v_BTKC, mask=mask_B1TS)

    return _per_device(local, mesh, q_BTHC, k_BTKC, v_BTKC, *packed)


def causal_mask(valid_BT: Array) -> Array:
    """bool [B, T, T]: each token attends to the real tokens up to and including itself.

    A padding token attends to itself, so that no softmax runs over an empty set.
    """
    T = valid_BT.shape[1]
    order = jnp.arange(T)
    causal = order[:, None] >= order[None, :]
    return (causal & valid_BT[:, None, :]) | jnp.eye(T, dtype=bool)


def packed_mask(
    segments_BT: Array, prompts_BT: Array, start: Array | int = 0, length: int | None = None
) -> Array:
    """bool [B, length, T]: as `causal_mask`, within a segment of the row and on to its prompt.

    Args:
      segments_BT: number of the token's segment in its row; 0 is padding.
      prompts_BT: number of the segment that holds the prompt of the token's segment.
      start: first attending token.
      length: how many attend; None for all T.
    """
    T = segments_BT.shape[1]
    length = T if length is None else length
    rows = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=1)
    order, own = jnp.arange(T), start + jnp.arange(length)[:, None]
    same = rows(segments_BT)[:, :, None] == segments_BT[:, None, :]
    prompt = rows(prompts_BT)[:, :, None] == segments_BT[:, None, :]
    visible = (order <= own) & (segments_BT > 0)[:, None, :]
    return (visible & (same | prompt)) | (order == own)
