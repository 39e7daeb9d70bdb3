"""The attention backends against a numpy loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax.config import MeshSettings, ModelSettings
from prolong_jax.mesh import make_mesh
from prolong_jax.models import attention
from prolong_jax.models.attention import Layout, Packed, attend_packed, backend_for
from prolong_jax.models.decoder import Model, for_training
from tests.tiny import SHAPE

B, T, K, C = 2, 45, 2, 16
UNSHARED = Layout()


def rows(heads=4, shared=True, seed=0):
    """Queries, keys, values, and two rows with a prompt, its responses and padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, n, C)).astype(np.float32) for n in (heads, K, K))
    segments, prompts = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, lengths in enumerate([(9, 12, 7), (20, 5, 1, 11)]):
        start = 0
        for number, length in enumerate(lengths, 1):
            segments[row, start : start + length] = number
            prompts[row, start : start + length] = 1 if shared else number
            start += length
    return q, k, v, Packed(jnp.asarray(segments), jnp.asarray(prompts))


def loop(q, k, v, packed):
    """One token at a time; zero where the row is padding."""
    out, segments, prompts = np.zeros_like(q), *map(np.asarray, packed)
    for row, t, h in np.ndindex(B, T, q.shape[2]):
        own, prompt = segments[row, t], prompts[row, t]
        seen = [s for s in range(t + 1) if own and segments[row, s] in (own, prompt)]
        if seen:
            kv = h * K // q.shape[2]
            scores = q[row, t, h] @ k[row, seen, kv].T / np.sqrt(C)
            weights = np.exp(scores - scores.max())
            out[row, t, h] = weights @ v[row, seen, kv] / weights.sum()
    return out


def output(q, k, v, packed, backend="xla", mesh=None, layout=UNSHARED):
    run = jax.jit(attend_packed, static_argnums=(4, 5, 6))
    return np.asarray(run(q, k, v, packed, layout, backend, mesh))


def assert_equal_where_real(found, expected, packed, atol=2e-5):
    real = np.asarray(packed.segments > 0)
    np.testing.assert_allclose(found[real], expected[real], atol=atol)


@pytest.mark.parametrize("block", [512, 45, 44, 15, 8, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_plain_attention_is_that_of_the_loop(monkeypatch, block, shared):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    inputs = rows(shared=shared)
    assert_equal_where_real(output(*inputs), loop(*inputs), inputs[3])


@pytest.mark.parametrize("block", [512, 11, 4])
@pytest.mark.parametrize("layout", [Layout(9, 1), Layout(9, 3), Layout(12, 3)])
def test_lanes_leave_out_nothing_that_is_seen(monkeypatch, layout, block):
    """Two prompts in slots of their own; segments of both, and padding, in every lane."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, k, v, _ = rows()
    segments, prompts = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    segments[:, :5], segments[:, 5:8] = 1, 2
    prompts[:] = segments
    size, number = (T - layout.prompt_slots) // layout.lanes, 2
    for lane in range(layout.lanes):
        start = layout.prompt_slots + lane * size
        for prompt, length in ((1, size // 2), (2, size // 3)):
            number += 1
            segments[:, start : start + length] = number
            prompts[:, start : start + length] = prompt
            start += length
    packed = Packed(jnp.asarray(segments), jnp.asarray(prompts))
    found = output(q, k, v, packed, layout=layout)
    assert_equal_where_real(found, loop(q, k, v, packed), packed)
    np.testing.assert_allclose(found, output(q, k, v, packed), atol=2e-5)


@pytest.mark.parametrize("mesh", [None, (2, 1, 1), (1, 2, 2), (1, 2, 4)])
def test_splash_attention_is_that_of_the_loop(mesh):
    """Interpreted on CPU. Four tensor shards are more than there are kv heads."""
    inputs = rows(shared=False)
    placed = None if mesh is None else make_mesh(MeshSettings(*mesh))
    found = output(*inputs, backend="splash", mesh=placed)
    assert_equal_where_real(found, loop(*inputs), inputs[3])


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_gradients_are_those_of_plain_attention(monkeypatch, backend):
    q, k, v, packed = rows(shared=False)
    weights = jax.random.normal(jax.random.key(0), q.shape) * (packed.segments > 0)[..., None, None]

    def gradients(backend):
        def total(q, k, v):
            return (weights * attend_packed(q, k, v, packed, Layout(), backend, None)).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

    expected = gradients("xla")
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    for found, wanted in zip(gradients(backend), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-5)


def test_the_backend_follows_the_platform():
    assert backend_for("auto", "cpu", jnp.float32) == "xla"
    assert backend_for("auto", "tpu", jnp.bfloat16) == "splash"
    assert backend_for("auto", "gpu", jnp.bfloat16) == "cudnn"
    assert backend_for("auto", "gpu", jnp.float32) == "xla"
    assert backend_for("xla", "tpu", jnp.bfloat16) == "xla"
    with pytest.raises(ValueError, match="'model.attention' = 'cudnn' does not run on tpu"):
        backend_for("cudnn", "tpu", jnp.bfloat16)
    with pytest.raises(ValueError, match="does not run on gpu with float32; expected auto, xla."):
        backend_for("cudnn", "gpu", jnp.float32)
    model = for_training(Model(SHAPE), make_mesh(MeshSettings()), ModelSettings(attention="splash"))
    assert model.layout == Layout()
    plain = for_training(Model(SHAPE), make_mesh(MeshSettings()), ModelSettings(), (8, 2))
    assert plain.layout == Layout(8, 2) and plain.attention == "xla"


@pytest.mark.accelerator
def test_the_accelerators_backend_is_plain_attention():
    backend = backend_for("auto", jax.default_backend(), jnp.bfloat16)
    assert backend != "xla"
    *arrays, packed = rows(shared=backend != "splash")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    q32, k32, v32 = (np.asarray(x, np.float32) for x in (q, k, v))
    expected = loop(q32, k32, v32, packed)
    found = output(q, k, v, packed, backend).astype(np.float32)
    assert_equal_where_real(found, expected, packed, atol=3e-2)
