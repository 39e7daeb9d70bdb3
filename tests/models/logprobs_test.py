"""The chunked log-probabilities against the plain formula on whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax.config import MeshSettings
from prolong_jax.masked import chosen_logp, entropy
from prolong_jax.mesh import make_mesh
from prolong_jax.models import logprobs
from prolong_jax.models.logprobs import token_logprobs

B, T, V, D = 8, 21, 40, 16


def inputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, V, (B, T)))
    mask = rng.random((B, T)) < 0.6
    mask[:, 0], mask[1] = False, False  # one row has no response token
    return hidden, head, tokens, jnp.asarray(mask)


def plain(hidden, head, tokens, mask, temperature, mesh=None):
    logits = hidden[:, :-1].astype(jnp.float32) @ head / temperature
    pad = ((0, 0), (1, 0))
    logp = jnp.pad(chosen_logp(logits, tokens[:, 1:]), pad)
    return jnp.where(mask, logp, 0.0), jnp.where(mask, jnp.pad(entropy(logits), pad), 0.0)


def values_and_gradients(function, hidden, head, tokens, mask, mesh=None):
    weights = jax.random.normal(jax.random.key(1), (2, *mask.shape))

    def total(hidden, head):
        logp, entropy = function(hidden, head, tokens, mask, 0.7, mesh)
        return (weights[0] * logp).sum() + (weights[1] * entropy).sum(), (logp, entropy)

    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    return jax.device_get((values, gradients))


def assert_close(left, right, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), left, right)


@pytest.mark.parametrize("block, chunk", [(64, 64), (40, 21), (16, 5), (7, 8), (13, 4)])
def test_blocks_and_chunks_do_not_change_values_or_gradients(monkeypatch, block, chunk):
    monkeypatch.setattr(logprobs, "VOCAB_BLOCK", block)
    monkeypatch.setattr(logprobs, "TOKEN_CHUNK", chunk)
    expected = values_and_gradients(plain, *inputs())
    assert_close(values_and_gradients(token_logprobs, *inputs()), expected)


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (1, 8, 1), (4, 2, 1), (2, 1, 4), (1, 2, 4), (1, 4, 2)]
)
def test_meshes_do_not_change_values_or_gradients(monkeypatch, shape):
    monkeypatch.setattr(logprobs, "VOCAB_BLOCK", 7)
    monkeypatch.setattr(logprobs, "TOKEN_CHUNK", 8)
    found = values_and_gradients(token_logprobs, *inputs(), mesh=make_mesh(MeshSettings(*shape)))
    assert_close(found, values_and_gradients(plain, *inputs()))


def test_masked_slots_have_no_influence():
    hidden, head, tokens, mask = inputs()
    read = jnp.roll(mask, -1, axis=1)  # the slots whose next token counts
    spoilt = jnp.where(read[..., None], hidden, jnp.nan)
    found = values_and_gradients(token_logprobs, spoilt, head, tokens, mask)
    assert_close(found, values_and_gradients(plain, hidden, head, tokens, mask))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_extreme_logits_stay_finite(scale):
    hidden, head, tokens, mask = inputs()
    found = values_and_gradients(token_logprobs, scale * hidden, head, tokens, mask)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert_close(found[0], plain(scale * hidden, head, tokens, mask, 0.7), atol=1e-2 * scale)


def test_half_precision_products_accumulate_in_float32():
    """Against the same rounded inputs in float64, the error is that of float32 sums."""
    hidden, head, tokens, mask = inputs(dtype=jnp.bfloat16)
    head = head.astype(jnp.bfloat16).astype(jnp.float32)
    found = jax.device_get(token_logprobs(hidden, head, tokens, mask, 1.0, None))[0]
    logits = np.asarray(hidden, np.float64)[:, :-1] @ np.asarray(head, np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    exact = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(found[:, 1:], np.where(mask[:, 1:], exact, 0.0), atol=2e-5)


def test_memory_does_not_grow_with_the_vocabulary():
    def temporary_bytes(vocab_size):
        shapes = (
            jax.ShapeDtypeStruct((2, 512, 64), jnp.float32),
            jax.ShapeDtypeStruct((64, vocab_size), jnp.float32),
            jax.ShapeDtypeStruct((2, 512), jnp.int32),
            jax.ShapeDtypeStruct((2, 512), bool),
        )

        def total(hidden, head, tokens, mask):
            logp, _ = token_logprobs(hidden, head, tokens, mask, 1.0, None)
            return logp.sum()

        compiled = jax.jit(jax.grad(total)).lower(*shapes).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, large = temporary_bytes(32_768), temporary_bytes(65_536)
    head_bytes = 4 * 64 * 32_768  # the products of one block are larger
    assert large - small <= 2 * head_bytes < 0.2 * small, (small, large)
