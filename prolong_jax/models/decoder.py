"""One decoder-only transformer (Qwen2, Qwen3, Llama 3), written in Flax NNX and used as pure functions.

`Model` splits the module once into a graph definition and a pytree of parameters, so that the rest
of the package only sees `model.hidden(params, ...)` and `model.logits(params, ...)`.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prolong_jax.config import ModelSettings
from prolong_jax.mesh import (
    ROW_AXES,
    constrain,
    gather,
    local_arrays,
    sampling_shardings,
    weight_spec,
)
from prolong_jax.models.attention import Layout, Packed, attend, attend_packed, backend_for
from prolong_jax.models.logprobs import add_head_gradient, token_logprobs
from prolong_jax.models.rope import RopeScaling, rotate
from prolong_jax.types import Array, PyTree

# What the backward pass keeps of a layer beside its input; "none": nothing is computed again.
REMAT = {
    "layer": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
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


@jax.custom_vjp
def _matmul(x_BTD, weight_DF):
    return jnp.matmul(x_BTD, weight_DF)


def _matmul_forward(x_BTD, weight_DF):
    return jnp.matmul(x_BTD, weight_DF), (x_BTD, weight_DF)


def _matmul_backward(saved, d_BTF):
    """As JAX would, but without transposing more than the narrower operand, slow on CPU."""
    x_BTD, weight_DF = saved
    d_BTD = jax.lax.dot_general(d_BTF, weight_DF, (((2,), (1,)), ((), ())))
    if x_BTD.shape[-1] > d_BTF.shape[-1]:
        return d_BTD, jax.lax.dot_general(d_BTF, x_BTD, (((0, 1), (0, 1)), ((), ()))).T
    return d_BTD, jax.lax.dot_general(x_BTD, d_BTF, (((0, 1), (0, 1)), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _sum_last(x):
    """Sum over the last axis, kept; on CPU XLA is faster at a product with ones."""
    ones = jnp.ones((x.shape[-1], 1), x.dtype)
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: jnp.matmul(x, ones, precision="highest"),
        default=lambda x: x.sum(axis=-1, keepdims=True),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale_D, epsilon):
    return _rms_norm_forward(x, scale_D, epsilon)[0]


def _rms_norm_forward(x, scale_D, epsilon):
    inverse = jax.lax.rsqrt(_sum_last(jnp.square(x)) / scale_D.size + epsilon)
    return x * inverse * scale_D, (x, inverse, scale_D)


def _rms_norm_backward(epsilon, saved, d):
    """As JAX would, but with `_sum_last`."""
    x, inverse, scale_D = saved
    normal, d_normal = x * inverse, d * scale_D
    d_x = inverse * (d_normal - normal * (_sum_last(normal * d_normal) / scale_D.size))
    return d_x, _sum_last((normal * d).reshape(-1, scale_D.size).T)[:, 0]


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x):
        normal = _rms_norm(x.astype(jnp.float32), self.scale[...], self.epsilon)
        return jnp.asarray(normal, self.dtype)


def _product(x_BTD, weight_DF, dimension_numbers, **_):
    return _matmul(x_BTD, weight_DF)


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        D, C = config.width, config.head_dim

        def linear(inputs: int, outputs: int, bias: bool = False) -> nnx.Linear:
            init = nnx.initializers.normal(0.02)
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                dtype=dtype,
                kernel_init=init,
                dot_general=_product,
                rngs=rngs,
            )

        self.attention_norm = RMSNorm(D, config.norm_eps, dtype)
        self.query = linear(D, config.num_heads * C, bias=config.qkv_bias)
        self.key = linear(D, config.num_kv_heads * C, bias=config.qkv_bias)
        self.value = linear(D, config.num_kv_heads * C, bias=config.qkv_bias)
        self.out = linear(config.num_heads * C, D, bias=config.out_bias)
        if config.qk_norm:
            self.query_norm = RMSNorm(C, config.norm_eps, dtype)
            self.key_norm = RMSNorm(C, config.norm_eps, dtype)
        self.mlp_norm = RMSNorm(D, config.norm_eps, dtype)
        self.gate = linear(D, config.ff_dim, bias=config.mlp_bias)
        self.up = linear(D, config.ff_dim, bias=config.mlp_bias)
        self.down = linear(config.ff_dim, D, bias=config.mlp_bias)

    def __call__(self, x_BTD, positions_BT, seen, cache, slot, model: "Model"):
        config = self.config
        y = self.attention_norm(x_BTD)
        heads = (*y.shape[:2], -1, config.head_dim)
        q_BTHC, k_BTKC = self.query(y).reshape(heads), self.key(y).reshape(heads)
        if config.qk_norm:
            q_BTHC, k_BTKC = self.query_norm(q_BTHC), self.key_norm(k_BTKC)
        q_BTHC = rotate(q_BTHC, positions_BT, config.rope_theta, config.rope_scaling)
        k_BTKC = rotate(k_BTKC, positions_BT, config.rope_theta, config.rope_scaling)
        v_BTKC = self.value(y).reshape(heads)
        if isinstance(seen, Packed):
            how = model.layout, model.attention, model.mesh
            cache, attended = None, attend_packed(q_BTHC, k_BTKC, v_BTKC, seen, *how)
        else:
            cache = _extended(
                cache, k_BTKC.transpose(0, 2, 3, 1), v_BTKC.transpose(0, 2, 1, 3), slot
            )
            attended = attend(q_BTHC, *cache, seen)
        x_BTD = x_BTD + self.out(attended.reshape(*y.shape[:2], -1))
        y = self.mlp_norm(x_BTD)
        return x_BTD + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), cache


def _extended(cache, k_BKCT, v_BKTC, slot):
    """The cache with new keys and values from `slot` on; these alone where there is none."""
    if cache is None:
        return k_BKCT, v_BKTC
    k_BKCS, v_BKSC = cache
    k_BKCS = jax.lax.dynamic_update_slice_in_dim(k_BKCS, k_BKCT.astype(k_BKCS.dtype), slot, 3)
    v_BKSC = jax.lax.dynamic_update_slice_in_dim(v_BKSC, v_BKTC.astype(v_BKSC.dtype), slot, 2)
    return k_BKCS, v_BKSC


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(
            config.vocab_size, config.width, dtype=dtype, embedding_init=init, rngs=rngs
        )
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.tied_head = config.tied_head
        if not config.tied_head:
            self.head = nnx.Linear(
                config.width, config.vocab_size, use_bias=False, kernel_init=init, rngs=rngs
            )

    def hidden(self, tokens_BT, positions_BT, seen, cache, slot, model: "Model"):
        x_BTD = self._embedded(tokens_BT, model)
        if isinstance(seen, Packed) and model.remat != "none":
            return self.norm(self._scanned(x_BTD, positions_BT, seen, model)), ()
        caches = []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            x_BTD, layer_cache = layer(x_BTD, positions_BT, seen, layer_cache, slot, model)
            caches.append(layer_cache)
        return self.norm(x_BTD), tuple(caches)

    def _scanned(self, x_BTD, positions_BT, packed, model: "Model"):
        """All layers in one loop, compiled once, over a stacked copy in the dtype of the products.

        A device gathers the weights of one layer at a time.
        """
        graph, state = nnx.split(self.layers[0])

        def stacked(path, *layers):
            layer, kind = path[-2].key, path[-1].key
            dtype = jnp.float32 if kind == "scale" else model.dtype
            whole = jnp.stack([x.astype(dtype) for x in layers])
            return constrain(whole, model.mesh, P(None, *weight_spec(layer, kind)))

        def gathered(path, x):
            return gather(x, model.mesh, weight_spec(path[-2].key, path[-1].key))

        @partial(jax.checkpoint, policy=REMAT[model.remat], prevent_cse=False)
        def one(x_BTD, params):
            layer = _bound(graph, state, jax.tree_util.tree_map_with_path(gathered, params))
            x_BTD = constrain(x_BTD, model.mesh, P(ROW_AXES))
            return layer(x_BTD, positions_BT, packed, None, 0, model)[0], None

        each = [nnx.to_pure_dict(nnx.state(layer)) for layer in self.layers]
        params = jax.tree_util.tree_map_with_path(stacked, *each)
        return jax.lax.scan(one, x_BTD, params)[0]

    def _embedded(self, tokens_BT, model: "Model"):
        """Every device looks up its part of the width for the rows of all, then they exchange.

        So the table, which grows with the vocabulary, stays where it is.
        """
        tokens_BT = constrain(tokens_BT, model.mesh, P("data"))
        x_BTD = jnp.take(self.embed.embedding[...], tokens_BT, axis=0).astype(model.dtype)
        x_BTD = constrain(x_BTD, model.mesh, P("data", None, "fsdp"))
        return constrain(x_BTD, model.mesh, P(ROW_AXES))

    def head_DV(self):
        return self.embed.embedding[...].T if self.tied_head else self.head.kernel[...]

    def logits(self, x_BTD):
        head_DV = self.head_DV().astype(x_BTD.dtype)
        return jnp.matmul(x_BTD, head_DV, preferred_element_type=jnp.float32)


def _bound(graph, state, params: PyTree):
    """The module of a graph definition, with these parameters."""
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@dataclass(frozen=True)
class Model:
    """The decoder as pure functions of a plain nested dict of float32 parameters."""

    config: ModelConfig
    dtype: jnp.dtype = field(default=jnp.float32)  # of activations and matrix products
    attention: str = "xla"  # of packed rows: xla, splash or cudnn
    layout: Layout = Layout()  # of packed rows
    remat: str = "none"  # "none" or a key of REMAT
    mesh: Mesh | None = None  # that packed rows are split over; None on one device

    @property
    def head_name(self) -> str:
        """Which of the parameters the output embedding is."""
        return "embed" if self.config.tied_head else "head"

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
        return _bound(*self._split, params)

    def hidden(
        self,
        params: PyTree,
        tokens_BT: Array,
        positions_BT: Array,
        seen: Array | Packed,
        cache: Cache | None = None,
        slot: Array | int = 0,
    ) -> tuple[Array, tuple]:
        """Final hidden states [B, T, D], and the keys and values of every layer.

        Args:
          params: parameters, as from `init`.
          tokens_BT: i32 token ids.
          positions_BT: i32 position of each token in its sequence, from 0; sets the rotation.
          seen: what token t may attend to. `Packed` segments, which leave no keys and values
            behind; or a mask [B, T, S], true where it may attend to slot s. Without a cache the
            slots are the T tokens themselves.
          cache: keys and values so far. The T tokens are written at slots `slot ... slot + T`.
          slot: i32 [], first slot to write.
        """
        module = self._bind(params)
        return module.hidden(tokens_BT, positions_BT, seen, cache, slot, self)

    def logits(self, params: PyTree, hidden_BTD: Array) -> Array:
        """Next-token logits f32 [B, T, V]."""
        return self._bind(params).logits(hidden_BTD)

    def token_logprobs(
        self,
        params: PyTree,
        hidden_BTD: Array,
        tokens_BT: Array,
        mask_BT: Array,
        temperature: float,
        grads: PyTree | None = None,
    ) -> tuple[Array, Array]:
        """Log-probability and entropy of tokens 1 ... T - 1; see `logprobs.token_logprobs`.

        The gradient of `params[head_name]` comes out with that in `grads` added to it, if given.
        """
        head_DV = self._bind(params).head_DV()
        if grads is not None:
            grad_DV = self._bind(grads).head_DV()
            head_DV, hidden_BTD = add_head_gradient(head_DV, hidden_BTD, grad_DV)
        return token_logprobs(hidden_BTD, head_DV, tokens_BT, mask_BT, temperature, self.mesh)


def for_training(
    model: Model, mesh: Mesh, settings: ModelSettings, row_layout: tuple[int, int] = Layout()
) -> Model:
    """The model as the update computes it: on the mesh, with the platform's attention.

    Rows have the layout, as from `config.row_layout`, where the attention can share prompts.

    Raises:
      ValueError: an attention backend that the platform does not have.
    """
    backend = backend_for(settings.attention, mesh.devices.flat[0].platform, model.dtype)
    layout = Layout() if backend == "splash" else Layout(*row_layout)
    return replace(model, attention=backend, layout=layout, remat=settings.remat, mesh=mesh)


def cast_for_sampling(model: Model, params: PyTree) -> PyTree:
    """The weights in the dtype of the products.

    Scales of norms stay in float32, as the trainer has them.
    """

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x if path[-1].key == "scale" else x.astype(model.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def sampling_copy(model: Model, mesh: Mesh, params: PyTree) -> PyTree:
    """The weights on the local devices in the dtype and layout of the sampler.

    Where all of them have both already, they are passed on, not copied.
    """
    shardings = sampling_shardings(mesh, params)
    is_right = jax.tree.map(
        lambda x, to: x.dtype == model.dtype and x.sharding.is_equivalent_to(to, x.ndim),
        params,
        shardings,
    )
    if not jax.tree.all(is_right):
        cast = jax.jit(cast_for_sampling, static_argnums=0, out_shardings=shardings)
        params = cast(model, params)
    return local_arrays(mesh, params)


def positions_of(valid_BT: Array) -> Array:
    """i32 [B, T]: index of each real token among the real tokens of its row."""
    return jnp.maximum(jnp.cumsum(valid_BT, axis=1) - 1, 0)
