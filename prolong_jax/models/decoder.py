"""One decoder-only transformer (Qwen2, Qwen3, Llama 3), written in Flax NNX and used as pure functions.

`Model` splits the module once into a graph definition and a pytree of parameters, so that the rest
of the package only sees `model.hidden(params, ...)` and `model.logits(params, ...)`.
"""

from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import nnx

from prolong_jax.models.rope import RopeScaling, rotate
from prolong_jax.types import Array, PyTree

Cache = tuple[tuple[Array, Array], ...]  # per layer: keys [B, K, C, S], values [B, K, S, C]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a checkpoint. Field comments name the key of its config.json."""

    vocab_size: int  # vocab_size
    width: int  # hidden_size
    num_layers: int  # num_hidden_layers
    num_heads: int  # num_attention_heads
    num_kv_heads: int  # num_key_value_heads
    head_dim: int  # head_dim, or hidden_size / num_attention_heads
    ff_dim: int  # intermediate_size
    rope_theta: float  # rope_theta
    norm_eps: float  # rms_norm_eps
    tied_head: bool  # tie_word_embeddings
    max_positions: int  # max_position_embeddings
    qkv_bias: bool = True  # Qwen2: always; Qwen3 and Llama: attention_bias
    out_bias: bool = False  # Qwen3 and Llama: attention_bias
    mlp_bias: bool = False  # Llama: mlp_bias
    qk_norm: bool = False  # Qwen3: RMSNorm of each query and key head
    rope_scaling: RopeScaling = RopeScaling()  # rope_parameters or rope_scaling


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


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        D, C = config.width, config.head_dim

        def linear(inputs: int, outputs: int, bias: bool = False) -> nnx.Linear:
            init = nnx.initializers.normal(0.02)
            return nnx.Linear(
                inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs
            )

        self.attention_norm = nnx.RMSNorm(D, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.query = linear(D, config.num_heads * C, bias=config.qkv_bias)
        self.key = linear(D, config.num_kv_heads * C, bias=config.qkv_bias)
        self.value = linear(D, config.num_kv_heads * C, bias=config.qkv_bias)
        self.out = linear(config.num_heads * C, D, bias=config.out_bias)
        if config.qk_norm:
            self.query_norm = nnx.RMSNorm(C, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
            self.key_norm = nnx.RMSNorm(C, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(D, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.gate = linear(D, config.ff_dim, bias=config.mlp_bias)
        self.up = linear(D, config.ff_dim, bias=config.mlp_bias)
        self.down = linear(config.ff_dim, D, bias=config.mlp_bias)

    def __call__(self, x_BTD, positions_BT, mask_BTS, cache, slot):
        config = self.config
        y = self.attention_norm(x_BTD)
        heads = (*y.shape[:2], -1, config.head_dim)
        q_BTHC, k_BTKC = self.query(y).reshape(heads), self.key(y).reshape(heads)
        if config.qk_norm:
            q_BTHC, k_BTKC = self.query_norm(q_BTHC), self.key_norm(k_BTKC)
        q_BTHC = rotate(q_BTHC, positions_BT, config.rope_theta, config.rope_scaling)
        k_BTKC = rotate(k_BTKC, positions_BT, config.rope_theta, config.rope_scaling)
        k, v = k_BTKC.transpose(0, 2, 3, 1), self.value(y).reshape(heads).transpose(0, 2, 1, 3)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), slot, 3)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), slot, 2)
        attended = attend(q_BTHC, k, v, mask_BTS)
        x_BTD = x_BTD + self.out(attended.reshape(*y.shape[:2], -1))
        y = self.mlp_norm(x_BTD)
        return x_BTD + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), (k, v)


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(
            config.vocab_size, config.width, dtype=dtype, embedding_init=init, rngs=rngs
        )
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.tied_head = config.tied_head
        if not config.tied_head:
            self.head = nnx.Linear(
                config.width, config.vocab_size, use_bias=False, kernel_init=init, rngs=rngs
            )

    def hidden(self, tokens_BT, positions_BT, mask_BTS, cache, slot):
        x_BTD = self.embed(tokens_BT)
        caches = []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            x_BTD, layer_cache = layer(x_BTD, positions_BT, mask_BTS, layer_cache, slot)
            caches.append(layer_cache)
        return self.norm(x_BTD), tuple(caches)

    def logits(self, x_BTD):
        x_BTD = x_BTD.astype(jnp.float32)
        if self.tied_head:
            return x_BTD @ self.embed.embedding[...].astype(jnp.float32).T
        return self.head(x_BTD)


@dataclass(frozen=True)
class Model:
    """The decoder as pure functions of a plain nested dict of float32 parameters."""

    config: ModelConfig
    dtype: jnp.dtype = field(default=jnp.float32)  # of activations and matrix products

    @cached_property
    def _split(self):
        return nnx.split(nnx.eval_shape(lambda: Decoder(self.config, self.dtype, rngs=nnx.Rngs(0))))

    def init(self, key: Array) -> PyTree:
        """Random parameters."""
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, self.dtype, rngs=nnx.Rngs(key))))

    def shapes(self) -> PyTree:
        """The parameters as `jax.ShapeDtypeStruct`s."""
        return nnx.to_pure_dict(self._split[1])

    def _bind(self, params: PyTree) -> Decoder:
        graph, state = self._split
        state = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def hidden(
        self,
        params: PyTree,
        tokens_BT: Array,
        positions_BT: Array,
        mask_BTS: Array,
        cache: Cache | None = None,
        slot: Array | int = 0,
    ) -> tuple[Array, Cache]:
        """Final hidden states [B, T, D] and the keys and values of every layer.

        Args:
          params: parameters, as from `init`.
          tokens_BT: i32 token ids.
          positions_BT: i32 position of each token in its sequence, from 0; sets the rotation.
          mask_BTS: bool, true where token t may attend to slot s. Without a cache the slots are
            the T tokens themselves.
          cache: keys and values so far. The T tokens are written at slots `slot ... slot + T`.
          slot: i32 [], first slot to write.
        """
        return self._bind(params).hidden(tokens_BT, positions_BT, mask_BTS, cache, slot)

    def logits(self, params: PyTree, hidden_BTD: Array) -> Array:
        """Next-token logits f32 [B, T, V]."""
        return self._bind(params).logits(hidden_BTD)


def causal_mask(valid_BT: Array) -> Array:
    """bool [B, T, T]: each token attends to the real tokens up to and including itself.

    A padding token attends to itself, so that no softmax runs over an empty set.
    """
    T = valid_BT.shape[1]
    order = jnp.arange(T)
    causal = order[:, None] >= order[None, :]
    return (causal & valid_BT[:, None, :]) | jnp.eye(T, dtype=bool)


def packed_mask(segments_BT: Array, prompts_BT: Array) -> Array:
    """bool [B, T, T]: as `causal_mask`, within a segment of the row and from there to its prompt.

    Args:
      segments_BT: number of the token's segment in its row; 0 is padding.
      prompts_BT: number of the segment that holds the prompt of the token's segment.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    prompt_BTT = prompts_BT[:, :, None] == segments_BT[:, None, :]
    return causal_mask(segments_BT > 0) & (same_BTT | prompt_BTT)


def positions_of(valid_BT: Array) -> Array:
    """i32 [B, T]: index of each real token among the real tokens of its row."""
    return jnp.maximum(jnp.cumsum(valid_BT, axis=1) - 1, 0)
