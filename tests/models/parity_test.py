"""The decoder against `transformers` (torch, float32): 24 random small models of three families."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax.models.attention import Packed, causal_mask, packed_mask
from prolong_jax.models.decoder import positions_of
from prolong_jax.models.hf import load_model, read_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # two test processes share the cores

FAMILIES = ("qwen2", "qwen3", "llama")
VOCAB, LEN = 101, 48
SCALINGS = (
    None,
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"type": "yarn", "factor": 4.0, "attention_factor": 0.8, "beta_fast": 16, "beta_slow": 2},
    {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
)


def raw_config(family, index):
    """The config.json of a model; the eight of a family differ in all that a checkpoint may."""
    heads, head_dim = (2, 4, 6)[index % 3], (8, 16, 32)[index // 3 % 3]
    divisors = [k for k in range(1, heads + 1) if heads % k == 0]
    theta = (10_000.0, 1_000_000.0, 500.0)[index % 3]
    raw = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": heads * (head_dim if index % 2 else 12),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": divisors[(index // 3 + FAMILIES.index(family)) % len(divisors)],
        "head_dim": head_dim,
        "intermediate_size": 56,
        "hidden_act": "silu",
        "rms_norm_eps": (1e-6, 1e-3)[index % 2],
        "tie_word_embeddings": index % 4 < 2,
        "max_position_embeddings": 128,
    }
    scaling = SCALINGS[(index + FAMILIES.index(family)) % len(SCALINGS)]
    if index < 4:  # the keys of transformers 4
        raw |= {"rope_theta": theta, "rope_scaling": scaling}
    else:
        raw["rope_parameters"] = {"rope_theta": theta} | (scaling or {"rope_type": "default"})
    if family != "qwen2":
        raw["attention_bias"] = index % 4 in (1, 2)
    if family == "llama":
        raw["mlp_bias"] = index % 4 in (2, 3)
    return raw


CASES = [(family, index) for family in FAMILIES for index in range(8)]


def test_the_cases_cover_what_a_checkpoint_may_differ_in():
    raws = [raw_config(*case) for case in CASES]
    for family in FAMILIES:
        of_family = [r for r in raws if r["model_type"] == family]
        kinds = {
            (r.get("rope_scaling") or r.get("rope_parameters") or {}).get("rope_type", "default")
            for r in of_family
        }
        assert kinds == {"default", "linear", "llama3", "yarn"}
        assert len({r["tie_word_embeddings"] for r in of_family}) == 2
        split = [r["head_dim"] * r["num_attention_heads"] == r["hidden_size"] for r in of_family]
        assert set(split) == {True, False}
    groups = {r["num_attention_heads"] // r["num_key_value_heads"] for r in raws}
    assert {1, 2, 4, 6} <= groups


def make_checkpoint(directory, family, index):
    """A checkpoint with random weights, written by `transformers`. Returns the torch model."""
    (directory / "config.json").write_text(json.dumps(raw_config(family, index)))
    shape = read_config(directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(1000 * FAMILIES.index(family) + index)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    assert read_config(directory) == shape  # as transformers writes it: with its own keys
    return model


@pytest.fixture
def loaded(request, tmp_path):
    torch_model = make_checkpoint(tmp_path, *request.param)
    return *load_model(tmp_path, jnp.dtype(jnp.float32)), torch_model


def torch_logits(model, tokens, valid=None):
    valid = np.ones(tokens.shape, bool) if valid is None else valid
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(valid.astype(np.int64)),
            position_ids=torch.tensor(
                np.asarray(positions_of(jnp.asarray(valid))).astype(np.int64)
            ),
        ).logits.numpy()


def forward(model):
    def logits(params, *inputs):
        return model.logits(params, model.hidden(params, *inputs)[0])

    return lambda *inputs: np.asarray(jax.jit(logits)(*inputs))


def packed_row(rng):
    """A prompt of 9 tokens with answers of 12 and 14, a prompt of 5 with one of 8."""
    lengths, prompts = (9, 12, 14, 5, 8), (1, 1, 1, 4, 4)
    segments = np.repeat(np.arange(1, 6), lengths)
    starts = [0 if n == p else lengths[p - 1] for n, p in zip(range(1, 6), prompts, strict=True)]
    positions = np.concatenate([s + np.arange(n) for s, n in zip(starts, lengths, strict=True)])
    tokens = rng.integers(0, VOCAB, LEN)
    return tokens, segments, np.repeat(prompts, lengths), positions


def expected_of_packed(model, tokens, segments, prompts):
    """Each answer alone behind its prompt."""
    logits = np.zeros((LEN, VOCAB), np.float32)
    for segment in range(1, 6):
        at = segments == segment
        prompt = prompts[at][0]
        before = tokens[segments == prompt] if prompt != segment else tokens[:0]
        alone = torch_logits(model, np.concatenate([before, tokens[at]])[None])[0]
        logits[at] = alone[len(before) :]
    return logits


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@pytest.mark.parametrize("loaded", CASES, indirect=True, ids=lambda c: f"{c[0]}-{c[1]}")
def test_logits_of_padded_and_packed_rows(loaded):
    model, params, torch_model = loaded
    rng = np.random.default_rng(0)
    lengths = np.array([[LEN], [30], [7]])
    right = np.arange(LEN)[None] < lengths
    left = np.arange(LEN)[None] >= LEN - lengths
    tokens, valid = rng.integers(0, VOCAB, (6, LEN)), np.concatenate([right, left])
    row, segments, prompts, positions = packed_row(rng)

    # One forward pass over all seven rows, so that each model is compiled once.
    real_BT = jnp.asarray(valid)
    packed = packed_mask(jnp.asarray(segments[None]), jnp.asarray(prompts[None]))
    mask = jnp.concatenate([causal_mask(real_BT), packed])
    all_tokens = np.concatenate([tokens, row[None]])
    all_positions = np.concatenate([positions_of(real_BT), positions[None]])
    logits = forward(model)(params, all_tokens, all_positions, mask)

    expected = np.concatenate(
        [
            torch_logits(torch_model, tokens, valid),
            expected_of_packed(torch_model, row, segments, prompts)[None],
        ]
    )
    real = np.concatenate([valid, np.ones((1, LEN), bool)])
    np.testing.assert_allclose(logits[real], expected[real], atol=2e-4, rtol=0)
    chosen = (rng.integers(0, VOCAB, real.sum())[:, None],)
    np.testing.assert_allclose(
        np.take_along_axis(log_softmax(logits[real]), *chosen, 1),
        np.take_along_axis(log_softmax(expected[real]), *chosen, 1),
        atol=2e-4,
        rtol=0,
    )
    assert np.abs(expected[real]).max() > 1  # not the near-zero logits of an untrained model


@pytest.mark.parametrize(
    "loaded",
    [(f, i) for f, i in CASES if i == FAMILIES.index(f) + 2],
    indirect=True,
    ids=lambda c: f"{c[0]}-{c[1]}",
)
def test_cached_greedy_decoding(loaded):
    """64 tokens are those of transformers.generate, their logits those of one full pass."""
    model, params, torch_model = loaded
    prompt, new = np.random.default_rng(1).integers(0, VOCAB, (1, 8)), 64
    total = prompt.shape[1] + new

    @jax.jit
    def step(params, token, cache, slot):
        mask = jnp.arange(total)[None, None] <= slot
        hidden, cache = model.hidden(params, token, slot[None, None], mask, cache, slot)
        return model.logits(params, hidden)[:, 0], cache

    everything = jnp.ones((1, total), bool)
    inputs = positions_of(everything), causal_mask(everything)
    _, shapes = jax.eval_shape(lambda: model.hidden(params, jnp.zeros((1, total), int), *inputs))
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sequence, steps = prompt, []
    for slot in range(total):
        logits, cache = step(params, sequence[:, slot : slot + 1], cache, np.int32(slot))
        steps.append(np.asarray(logits))
        if prompt.shape[1] <= slot + 1 < total:
            sequence = np.append(sequence, np.argmax(logits, axis=-1)[:, None], axis=1)
    top = np.sort(np.stack(steps[prompt.shape[1] - 1 : -1]), axis=-1)
    assert (top[..., -1] - top[..., -2]).min() > 1e-3  # no ties that rounding could turn

    full = forward(model)(params, sequence, *inputs)[0]
    np.testing.assert_allclose(np.concatenate(steps), full, atol=1e-4, rtol=0)
    generated = torch_model.generate(
        torch.tensor(prompt),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(sequence, generated.numpy())


@pytest.mark.parametrize(
    "loaded",
    [(f, i) for f, i in CASES if i == FAMILIES.index(f) + 5],
    indirect=True,
    ids=lambda c: f"{c[0]}-{c[1]}",
)
def test_packed_rows_as_the_update_scores_them(loaded):
    """Layers in one loop, log-probabilities in chunks."""
    model, params, torch_model = loaded
    model = replace(model, remat="layer")
    tokens, segments, prompts, positions = packed_row(np.random.default_rng(2))
    expected = log_softmax(expected_of_packed(torch_model, tokens, segments, prompts))
    mask = np.append(False, segments[1:] == segments[:-1])  # what the slot before predicts

    @jax.jit
    def score(params, tokens_BT, positions_BT, packed, mask_BT):
        hidden, _ = model.hidden(params, tokens_BT, positions_BT, packed)
        return model.token_logprobs(params, hidden, tokens_BT, mask_BT, 1.0)[0]

    packed = Packed(jnp.asarray(segments[None]), jnp.asarray(prompts[None]))
    found = score(params, tokens[None], positions[None], packed, mask[None])[0]
    chosen = np.append(0.0, expected[np.arange(LEN - 1), tokens[1:]])
    np.testing.assert_allclose(found, np.where(mask, chosen, 0.0), atol=2e-4, rtol=0)
