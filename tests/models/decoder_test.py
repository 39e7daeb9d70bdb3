import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax.config import TINY_BASE
from prolong_jax.models import decoder
from prolong_jax.models.attention import causal_mask
from prolong_jax.models.decoder import Model, positions_of
from prolong_jax.models.hf import load_params, read_config
from tests.tiny import MODEL, random_params


def logits(model, params, tokens_BT, valid_BT):
    hidden, _ = model.hidden(params, tokens_BT, positions_of(valid_BT), causal_mask(valid_BT))
    return np.asarray(model.logits(params, hidden))


def torch_logits(directory, tokens_BT, valid_BT):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    positions = np.asarray(positions_of(valid_BT))
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens_BT),
            attention_mask=torch.tensor(valid_BT.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


def left_padded(vocab_size, rng):
    tokens = rng.integers(0, vocab_size, (3, 17)).astype(np.int64)
    return tokens, np.arange(17)[None] >= np.array([[0], [5], [11]])


def test_padding_in_front_changes_nothing():
    params, rng = random_params(), np.random.default_rng(0)
    tokens, valid = left_padded(96, rng)
    padded = logits(MODEL, params, tokens, valid)
    for row, start in enumerate((0, 5, 11)):
        alone = logits(MODEL, params, tokens[row : row + 1, start:], valid[row : row + 1, start:])
        np.testing.assert_allclose(padded[row, start:], alone[0], atol=1e-5)


def test_cached_decoding_equals_the_whole_sequence():
    params, rng = random_params(), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 96, (2, 12)))
    whole = logits(MODEL, params, tokens, jnp.ones((2, 12), bool))
    valid = jnp.ones((2, 7), bool)
    hidden, cache = MODEL.hidden(params, tokens[:, :7], positions_of(valid), causal_mask(valid))
    cache = jax.tree.map(lambda x: x, tuple((grow(k, 3), grow(v, 2)) for k, v in cache))
    for slot in range(7, 12):
        mask = jnp.broadcast_to(jnp.arange(12) <= slot, (2, 1, 12))
        hidden, cache = MODEL.hidden(
            params, tokens[:, slot : slot + 1], jnp.full((2, 1), slot), mask, cache, slot
        )
        step = MODEL.logits(params, hidden)[:, 0]
        np.testing.assert_allclose(step, whole[:, slot], atol=1e-4)


def grow(x, axis):
    return jnp.pad(x, [(0, 5 if i == axis else 0) for i in range(4)])


def test_the_base_model_agrees_with_transformers():
    model = Model(read_config(TINY_BASE))
    params = load_params(TINY_BASE, model)
    tokens, valid = left_padded(model.config.vocab_size, np.random.default_rng(0))
    expected = torch_logits(TINY_BASE, tokens, valid)
    np.testing.assert_allclose(
        logits(model, params, tokens, valid)[valid], expected[valid], atol=2e-4, rtol=0
    )


def test_the_base_model_is_of_the_stated_size():
    import os

    model = Model(read_config(TINY_BASE))
    assert 1e6 <= sum(x.size for x in jax.tree.leaves(model.shapes())) <= 3e6
    assert 512 <= model.config.vocab_size <= 1024
    assert sum(entry.stat().st_size for entry in os.scandir(TINY_BASE)) <= 8 * 2**20


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize(
    ("ours", "plain", "shape"),
    [
        (decoder._matmul, jnp.matmul, (24, 40)),
        (decoder._matmul, jnp.matmul, (40, 24)),
        (lambda x, scale: decoder._rms_norm(x, scale, 1e-6), plain_rms_norm, (24,)),
    ],
)
def test_written_gradients_are_those_that_jax_derives(ours, plain, shape):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, weight = rng.normal(size=(2, 5, shape[0])), rng.normal(size=shape)
        out, pull = jax.vjp(ours, x, weight)
        expected, pull_expected = jax.vjp(plain, x, weight)
        np.testing.assert_allclose(out, expected, rtol=1e-12)
        d_out = rng.normal(size=out.shape)
        for found, right in zip(pull(d_out), pull_expected(d_out), strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-11, atol=1e-13)
