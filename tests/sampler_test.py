import itertools
from collections import deque
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import sampler
from prolong_jax.config import MeshSettings
from prolong_jax.mesh import make_mesh, sampling_shardings
from prolong_jax.models.attention import Layout
from prolong_jax.next_token import SamplingRule, sample_keys
from prolong_jax.packing import Conversation, pack
from prolong_jax.sampler import generate
from prolong_jax.slots import Request, Slots
from prolong_jax.tokenizer import stop_finder
from prolong_jax.types import TrainState
from prolong_jax.update import make_score
from tests.tiny import MODEL, random_params

RULE = SamplingRule(stop_ids=(3, 4))
GROUP, BUDGET = 6, 12
SLOTS = Slots(rows=8, max_prompt_len=8, max_response_len=16, cache_lens=2)
PROMPTS = [np.random.default_rng(0).integers(5, 96, n).tolist() for n in (3, 8, 5, 1, 4, 7, 2)]


@pytest.fixture(scope="module")
def params():
    return random_params()


def requests(prompts=PROMPTS, group=GROUP, budget=BUDGET, step=1):
    """One request for each prompt, numbered by its place in PROMPTS."""
    numbers = [PROMPTS.index(prompt) for prompt in prompts]
    keys = sample_keys(0, step, numbers, group)
    return [Request(*values, budget) for values in zip(numbers, prompts, keys, strict=True)]


def sample(params, asked, slots=SLOTS, rule=RULE, **kwargs):
    """Samples by (prompt, index); the requests come one at a time, as there is room."""
    left = iter(asked)
    found = generate(
        MODEL, params, lambda free: list(itertools.islice(left, 1)), rule, slots, **kwargs
    )
    return {(sample.id, sample.index): sample for sample in found}


@pytest.fixture(scope="module")
def alone(params):
    """Every response decoded with nothing beside it."""
    found = {}
    for request in requests():
        for index in range(GROUP):
            one = request._replace(keys=request.keys[index : index + 1])
            single = sample(params, [one], replace(SLOTS, rows=1))[request.id, 0]
            found[request.id, index] = single._replace(index=index)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_scorer(params, temperature):
    samples = sample(params, requests(), rule=replace(RULE, temperature=temperature))
    conversations = [
        Conversation(np.array(PROMPTS[s.id], np.int32), np.array(s.tokens), np.array(s.logp), 1.0)
        for s in samples.values()
    ]
    sizes = {"row_len": 24, "micro_batch_rows": 4, "micro_batches": 12, "layout": Layout(8)}
    batch, used = pack(conversations, **sizes)
    score = make_score(replace(MODEL, layout=Layout(8)), temperature)
    scored = np.asarray(score(TrainState(params, params, ()), batch, used).old_logp)
    assert batch.mask.sum() == sum(len(s.tokens) for s in samples.values())
    np.testing.assert_allclose(scored[batch.mask], batch.sampler_logp[batch.mask], atol=1e-4)


def is_close_call(params, request, index, one, other) -> bool:
    """Whether the random number is within 1e-4 of the border between the first differing tokens."""
    t = next(t for t, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    tokens = jnp.array([*request.prompt, *one[:t]])[None]
    mask = jnp.tril(jnp.ones((1, tokens.size, tokens.size), bool))
    hidden, _ = MODEL.hidden(params, tokens, jnp.arange(tokens.size)[None], mask)
    ends = np.cumsum(jax.nn.softmax(MODEL.logits(params, hidden)[0, -1].astype(jnp.float32)))
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(request.keys[index])), t)
    low, high = sorted((one[t], other[t]))
    uniform = float(jax.random.uniform(key))
    return bool(np.abs(ends[low:high] - uniform).max() < 1e-4)


def assert_same_tokens(params, found, expected, close_calls=2):
    asked = {request.id: request for request in requests()}
    assert found.keys() <= expected.keys() and found
    differing = [key for key in found if found[key].tokens != expected[key].tokens]
    assert len(differing) <= close_calls, differing
    for key in differing:
        pair = found[key].tokens, expected[key].tokens
        assert is_close_call(params, asked[key[0]], key[1], *pair), key
    for key in found.keys() - set(differing):
        np.testing.assert_allclose(found[key].logp, expected[key].logp, atol=1e-4)
        assert found[key].reason == expected[key].reason


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 7},  # groups of 6: slots are refilled
        {"rows": 64},  # none is
        {"chunk": 1},
        {"chunk": 5},
        {"cache_lens": 3},
        {"max_prompt_len": 11},
        {"max_response_len": 40},
    ],
    ids=str,
)
def test_a_sample_depends_on_its_prompt_and_key_alone(params, alone, changes):
    assert_same_tokens(params, sample(params, requests(), replace(SLOTS, **changes)), alone)


def test_prompt_order_and_group_do_not_matter(params, alone):
    assert_same_tokens(params, sample(params, requests(PROMPTS[::-1])), alone)
    assert_same_tokens(params, sample(params, requests(PROMPTS[2:3])), alone)
    fewer = [r._replace(keys=r.keys[:2]) for r in requests()]
    assert_same_tokens(params, sample(params, fewer), alone)


@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 2, 1), (1, 1, 2), (1, 2, 4)])
def test_devices_do_not_matter(params, alone, shape):
    """Data parallel, tensor parallel (4: more than there are kv heads), and both."""
    mesh = make_mesh(MeshSettings(*shape))
    placed = jax.device_put(params, sampling_shardings(mesh, params))
    found = sample(placed, requests(), replace(SLOTS, rows=16, mesh=mesh))
    assert_same_tokens(params, found, alone)


def test_prompts_are_read_once_for_their_group(params, monkeypatch):
    read = []
    prefill = sampler._prefill

    def counted(model, params, tokens, valid, count, columns):
        read.append(int(valid.any(-1).sum()))
        return prefill(model, params, tokens, valid, count, columns)

    monkeypatch.setattr(sampler, "_prefill", counted)
    sample(params, requests(PROMPTS[:3]), replace(SLOTS, rows=3 * GROUP))
    assert sum(read) == 3


def test_samples_of_a_group_and_of_two_steps_differ(params):
    first, later = (sample(params, requests(PROMPTS[:1], step=step)) for step in (1, 2))
    assert len({tuple(s.tokens) for s in first.values()}) > 1
    assert any(first[key].tokens != later[key].tokens for key in first)


def test_finish_reason_and_length(params):
    samples = sample(params, requests(group=20))
    assert {s.reason for s in samples.values()} == {"stop", "length"}
    for s in samples.values():
        assert not set(s.tokens[:-1]) & set(RULE.stop_ids)
        assert (s.tokens[-1] in RULE.stop_ids) == (s.reason == "stop")
        assert len(s.tokens) == BUDGET if s.reason == "length" else len(s.tokens) <= BUDGET
        assert len(s.logp) == len(s.tokens) and max(s.logp) < 0


def test_every_request_has_its_own_budget(params, alone):
    short = [r._replace(max_len=1 + r.id) for r in requests()]
    for key, found in sample(params, short).items():
        assert found.tokens == alone[key].tokens[: 1 + key[0]]


@pytest.mark.parametrize("chunk", [1, 64])
def test_a_stop_string_ends_a_response(params, alone, chunk):
    """Text is one letter per token; the string is one that some response has inside."""

    def decode(ids):
        return "".join(chr(0x4E00 + i) for i in ids)

    victim = next(key for key, s in alone.items() if len(s.tokens) > 6)
    string = decode(alone[victim].tokens[3:5])
    slots = replace(SLOTS, chunk=chunk)
    found = sample(params, requests(), slots, find_stop=stop_finder(decode, (string,)))
    assert found[victim].tokens == alone[victim].tokens[:5] and found[victim].reason == "string"
    assert len(found[victim].logp) == 5
    for key, s in found.items():
        assert (string in decode(alone[key].tokens)) == (s.reason == "string")


def test_unfit_requests_are_refused(params):
    with pytest.raises(ValueError, match="a prompt has 9 tokens; expected 1 to 8"):
        sample(params, [Request(0, [1] * 9, np.zeros((1, 2), np.uint32), 4)])
    with pytest.raises(ValueError, match="a prompt has 0 tokens; expected 1 to 8"):
        sample(params, [Request(0, [], np.zeros((1, 2), np.uint32), 4)])
    with pytest.raises(ValueError, match="the budget of a response has 17 tokens"):
        sample(params, [Request(0, [1], np.zeros((1, 2), np.uint32), 17)])


# --- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "rows", "group", "least"),
    [(1, 64, 16, 0.75), (8, 64, 16, 0.8), (8, 128, 16, 0.75), (4, 64, 4, 0.75), (1, 8, 16, 0.8)],
)
def test_slots_are_refilled_before_a_device_is_empty(devices, rows, group, least):
    """The share of decoded tokens that belong to a response, by playing the host's decisions."""
    mesh = make_mesh(MeshSettings(data=devices), jax.devices()[:devices])
    slots = Slots(rows, max_prompt_len=8, max_response_len=400, mesh=mesh)
    rng = np.random.default_rng(0)
    waiting, left, held, steps, useful = deque(), {}, [], 0, 0
    for number in range(1024 // group):
        request = Request(number, [1], np.zeros((group, 2), np.uint32), 400)
        waiting.extend(sampler._queued(request, slots))
    for live in waiting:
        left[id(live)] = int(min(400, rng.geometric(1 / 100)))
    while waiting:
        held = sampler._seated(held, waiting, slots)
        least_left = sampler._least(held, waiting, slots)
        now = sorted((left[id(x)] for x in held if x), reverse=True)
        count = min(slots.chunk, now[least_left] if least_left < len(now) else 1)
        steps += count
        for slot, live in enumerate(held):
            if live:
                useful += min(count, left[id(live)])
                left[id(live)] -= count
                held[slot] = live if left[id(live)] > 0 else None
    assert useful / (steps * rows) > least


def decoding(rows=16, columns=512):
    """Memory of a compiled decode program, and bytes of its cache."""
    cache = jax.eval_shape(
        lambda: ((jnp.zeros((rows, 2, 8, columns)), jnp.zeros((rows, 2, columns, 8))),) * 2
    )
    zero = jax.ShapeDtypeStruct((rows,), jnp.int32)
    key, done = jax.ShapeDtypeStruct((rows, 2), jnp.uint32), jax.ShapeDtypeStruct((rows,), bool)
    state = sampler._Rows(key, zero, zero, zero, zero, done)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = sampler._decode.lower(MODEL, MODEL.shapes(), cache, state, scalar, scalar, RULE, 4)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    memory: Any = lowered.compile().memory_analysis()
    return memory, size


def test_decoding_copies_neither_cache_nor_weights():
    memory, size = decoding()
    assert memory.alias_size_in_bytes >= size  # the cache that comes in is the one that goes out
    more = decoding(columns=1024)[0].temp_size_in_bytes
    assert more - memory.temp_size_in_bytes < 0.3 * size  # mask and scores, no second cache


def test_nothing_is_compiled_in_steps_of_random_lengths(params):
    """50 rounds after compiling ahead: only the small programs that move a cache come up."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(kwargs["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(note)
    slots = replace(SLOTS, rows=12, chunk=3, cache_lens=2)
    sampler.compile_ahead(MODEL, params, RULE, slots)
    sizes = len(slots.row_counts) * len(slots.all_cache_lens)
    assert compiled.count("jit(_decode)") == sizes <= 12 and "jit(_prefill)" in compiled
    compiled.clear()
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked = [
            Request(0, PROMPTS[n], np.array(rng.integers(0, 2**31, (2, 2)), np.uint32), int(length))
            for n, length in zip(rng.integers(0, 7, 9), rng.integers(1, 17, 9), strict=True)
        ]
        sample(params, asked, slots)
    assert set(compiled) <= {"jit(_arrange)"} and len(compiled) < 40, compiled
