"""Sampling with a KV cache and continuous batching: one process, its local devices.

Responses occupy slots, the rows of the cache. All rows write their newest token to the same column,
the clock, so a row's tokens lie in the columns [clock - position, clock). Decoding runs in chunks on
the devices; between chunks the host takes out what has finished, lets others in, and rearranges the
cache: to as many rows and columns as are needed, from a small set of sizes. A prompt is read once for
all responses of its group that come in together.

A sample is a function of (params, prompt, key): its random numbers come from its own key and the
index of the token, never from the batch around it.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prolong_jax.masked import chosen_logp
from prolong_jax.mesh import ROW_AXES, by_rows, cache_spec
from prolong_jax.models.attention import causal_mask
from prolong_jax.models.decoder import Cache, Model, positions_of
from prolong_jax.next_token import SamplingRule, draw, sampled_logits
from prolong_jax.slots import Request, Sample, Slots
from prolong_jax.types import Array, PyTree


@dataclass(eq=False)
class _Live:
    """A response that is being decoded, on the host."""

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    @property
    def newest(self) -> int:
        return self.tokens[-1] if self.tokens else self.request.prompt[-1]

    @property
    def position(self) -> int:
        """Of the newest token, which is not in the cache yet: so many of its tokens are."""
        return len(self.request.prompt) + len(self.tokens) - 1


class _Rows(NamedTuple):
    """What the devices know of each row."""

    key: Any  # u32 [B, 2] data of the response's key
    token: Any  # i32 [B] the newest token
    position: Any  # i32 [B] of it
    length: Any  # i32 [B] tokens of the response
    max_len: Any  # i32 [B]
    done: Any  # bool [B] finished, or an empty slot


# --- on the devices --------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("model", "columns"))
def _prefill(
    model: Model, params: PyTree, tokens_NPT: Array, valid_NPT: Array, count: Array, columns: int
) -> Cache:
    """Keys [N, P, K, C, columns] and values [N, P, K, columns, C] of left-padded prompts.

    Block after block: N of P prompts, `count` of these in use.
    """
    (N, P, T), config = tokens_NPT.shape, model.config

    def one(index: Array, cache: Cache) -> Cache:
        tokens_PT, valid_PT = tokens_NPT[index], valid_NPT[index]
        mask_PTS = causal_mask(valid_PT)
        _, read = model.hidden(params, tokens_PT, positions_of(valid_PT), mask_PTS)

        def put(old: Array, new: Array, axis: int) -> Array:
            widths = [(columns - T if i == axis else 0, 0) for i in range(4)]
            return jax.lax.dynamic_update_index_in_dim(old, jnp.pad(new, widths), index, 0)

        return tuple(
            (put(k, new_k, 3), put(v, new_v, 2))
            for (k, v), (new_k, new_v) in zip(cache, read, strict=True)
        )

    K, C = config.num_kv_heads, config.head_dim
    empty = jnp.zeros((N, P, K, C, columns), model.dtype)
    layer = empty, empty.swapaxes(3, 4)
    return jax.lax.fori_loop(0, count, one, (layer,) * config.num_layers)


@partial(jax.jit, static_argnames=("columns", "mesh"))
def _arrange(
    old: Any,
    prompts: Any,
    source_B: Array,
    is_new_B: Array,
    shift: Array,
    clock: Array,
    columns: int,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """A layer's cache with other rows and columns; every device has rows of its own.

    Args:
      old: keys [b, K, C, s] and values [b, K, s, C]; None where there are none.
      prompts: keys [n, p, K, C, t] and values of prompts; None where none come in.
      source_B: i32, of each new row: its old row or its prompt, by their number on the device.
      is_new_B: bool, whether a prompt comes in.
      shift: columns by which the old rows move to the front.
      clock: the column behind the newest one.
      columns: of the new cache.
    """

    def place(x: Array, start: Array, axis: int) -> Array:
        """Column `start` of x, which may be negative, becomes the first of `columns`."""
        widths = [(columns if i == axis else 0,) * 2 for i in range(4)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(x, widths), start + columns, columns, axis)

    def local(old, prompts, source_B, is_new_B, shift, clock):
        out = []
        for i, axis in enumerate((3, 2)):
            rows = None if old is None else place(old[i], shift, axis)[source_B]
            if prompts is not None:
                read = prompts[i].reshape(-1, *prompts[i].shape[2:])
                read = place(read, read.shape[axis] - clock, axis)[source_B]
                is_new = is_new_B[:, None, None, None]
                rows = read if rows is None else jnp.where(is_new, read, rows)
            out.append(rows)
        return tuple(out)

    if mesh is None:
        return local(old, prompts, source_B, is_new_B, shift, clock)
    heads = prompts[0].shape[2] if old is None else old[0].shape[1]
    layer, spec, whole = cache_spec(heads, mesh), PartitionSpec(ROW_AXES), PartitionSpec()
    in_specs = (layer, PartitionSpec(None, *layer), spec, spec, whole, whole)
    function = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=layer)
    return function(old, prompts, source_B, is_new_B, shift, clock)


@partial(jax.jit, static_argnames=("model", "rule", "chunk"), donate_argnums=(2,))
def _decode(
    model: Model,
    params: PyTree,
    cache: Cache,
    rows: _Rows,
    clock: Array,
    least: Array,
    rule: SamplingRule,
    chunk: int,
) -> tuple[Cache, Array, Array, Array]:
    """Decodes until the chunk or the cache is full, or at most `least` rows are unfinished.

    Returns:
      The cache; i32 and f32 [B, chunk]: the tokens drawn and their logp; i32 []: how many columns
      of these are in use. A finished row goes on with tokens that mean nothing.
    """
    B, S = rows.token.shape[0], cache[0][0].shape[3]
    slots, stops = jnp.arange(S), jnp.array(rule.stop_ids)
    start_B1 = (clock - rows.position)[:, None]
    keys_B = jax.random.wrap_key_data(rows.key)
    index_BT = rows.length[:, None] + jnp.arange(chunk)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    uniform_BT = jax.vmap(jax.vmap(jax.random.uniform))(fold(keys_B, index_BT))

    def unfinished(carry) -> Array:
        _, _, done, _, _, step = carry
        return (step < jnp.minimum(chunk, S - clock)) & ((~done).sum() > least)

    def one(carry):
        cache, token, done, tokens, logp, step = carry
        slot = clock + step
        mask_B1S = ((slots >= start_B1) & (slots <= slot))[:, None]
        position_B1 = (rows.position + step)[:, None]
        hidden_B1D, cache = model.hidden(params, token[:, None], position_B1, mask_B1S, cache, slot)
        logits_BV = sampled_logits(model.logits(params, hidden_B1D)[:, 0], rule)
        uniform_B = jax.lax.dynamic_index_in_dim(uniform_BT, step, 1, keepdims=False)
        token = draw(logits_BV, uniform_B)
        logp_B1 = chosen_logp(logits_BV[:, None], token[:, None])
        done = done | jnp.isin(token, stops) | (rows.length + step + 1 >= rows.max_len)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        logp = jax.lax.dynamic_update_slice(logp, logp_B1, (0, step))
        return cache, token, done, tokens, logp, step + 1

    empty = jnp.zeros((B, chunk), jnp.int32), jnp.zeros((B, chunk))
    begin = (cache, rows.token, rows.done, *empty, jnp.int32(0))
    cache, _, _, tokens, logp, step = jax.lax.while_loop(unfinished, one, begin)
    return cache, tokens, logp, step


# --- on the host -----------------------------------------------------------------------------------


def generate(
    model: Model,
    params: PyTree,
    ask: Callable[[int], Sequence[Request]],
    rule: SamplingRule,
    slots: Slots,
    find_stop: Callable[[list[int]], int | None] = lambda tokens: None,
) -> Iterator[Sample]:
    """Samples what is asked for, and yields each response when it is finished.

    Args:
      model: the decoder.
      params: its parameters, as from `decoder.sampling_copy`.
      ask: number of free slots -> more requests. Called when none waits for a slot, after the
        consumer has seen all samples but those of the newest chunk. Sampling ends where it
        returns nothing and nothing is left to decode.
      rule: how tokens are drawn.
      slots: sizes.
      find_stop: tokens of a response -> how many of them to keep, where a stop string ends it.

    Raises:
      ValueError: a prompt or budget that the slots cannot hold.
    """
    waiting: deque[_Live] = deque()
    held: list[_Live | None] = []  # by slot
    cache: list[Any] = []  # keys and values of each layer
    clock, finished = 0, []
    while True:
        if not waiting:
            free = slots.most * slots.devices - sum(map(bool, held))
            waiting.extend(x for request in ask(free) for x in _queued(request, slots))
        while (seats := _seated(held, waiting, slots)) != held or clock == _columns(cache):
            if not any(seats):
                break
            clock = _rearrange(model, params, cache, clock, held, seats, slots)
            held = seats
        if not any(seats):
            held, cache, clock = [], [], 0
            if not finished:
                return
            yield from finished
            finished = []
            continue
        rows = _put(_stacked(held), slots)
        least = np.int32(_least(held, waiting, slots))
        at = np.int32(clock)
        decoded, *out = _decode(model, params, tuple(cache), rows, at, least, rule, slots.chunk)
        cache = list(decoded)
        yield from finished  # the devices are at work meanwhile
        tokens, logp, steps = jax.device_get(out)
        clock += int(steps)
        finished = _harvested(held, tokens[:, :steps], logp[:, :steps], rule, find_stop)


def compile_ahead(model: Model, params: PyTree, rule: SamplingRule, slots: Slots) -> None:
    """Compiles the decoding of every size and the reading of prompts, so that no step has to.

    What is left are the programs that move a cache from one size to another, which are small.
    """
    prompts: list[dict[int, _Live]] = [{} for _ in range(slots.devices)]
    config, one_token = model.config, np.zeros((1, 2), np.uint32)
    for length in (1, slots.max_prompt_len):
        prompts[0] = {0: _Live(Request(0, [0] * length, one_token, 1), 0)}
        _read(model, params, prompts, slots)
    for rows, columns in itertools.product(slots.row_counts, slots.all_cache_lens):
        empty = [None] * (rows * slots.devices)
        state = _put(_stacked(empty), slots)
        shape = len(empty), config.num_kv_heads, config.head_dim, columns
        sharding = None
        if slots.mesh is not None:
            sharding = NamedSharding(slots.mesh, cache_spec(config.num_kv_heads, slots.mesh))
        zeros = partial(jnp.zeros, dtype=model.dtype, device=sharding)
        cache = tuple(
            (zeros(shape), zeros((*shape[:2], columns, config.head_dim)))
            for _ in range(config.num_layers)
        )
        _decode(model, params, cache, state, np.int32(0), np.int32(0), rule, slots.chunk)


def _queued(request: Request, slots: Slots) -> list[_Live]:
    for what, length, most in (
        ("a prompt", len(request.prompt), slots.max_prompt_len),
        ("the budget of a response", request.max_len, slots.max_response_len),
    ):
        if not 1 <= length <= most:
            raise ValueError(f"sampler: {what} has {length} tokens; expected 1 to {most}.")
    return [_Live(request, index) for index in range(len(request.keys))]


def _columns(cache: Sequence[tuple[Array, Array]]) -> int:
    return cache[0][0].shape[3] if cache else 0


def _put(values: PyTree, slots: Slots) -> PyTree:
    return jax.device_put(values, None if slots.mesh is None else by_rows(slots.mesh))


def _stacked(held: Sequence[_Live | None]) -> _Rows:
    rows = [_row(live) for live in held]
    return jax.tree.map(lambda *x: np.stack(x), rows[0], *rows[1:])


def _row(live: _Live | None) -> _Rows:
    if live is None:
        key, values, done = np.zeros(2, np.uint32), (0, 0, 0, 0), True
    else:
        key, done = live.request.keys[live.index], False
        values = live.newest, live.position, len(live.tokens), live.request.max_len
    token, position, length, max_len = (np.int32(value) for value in values)
    return _Rows(key, token, position, length, max_len, np.bool_(done))


def _seated(
    held: Sequence[_Live | None], waiting: deque[_Live], slots: Slots
) -> list[_Live | None]:
    """Who has which slot from now on: those that wait are let in, group by group, as room allows.

    `held` itself where nobody comes in and no fewer rows would do.
    """
    b = len(held) // slots.devices
    seats = [[x for x in held[d * b : (d + 1) * b] if x] for d in range(slots.devices)]
    new_prompts = [0] * slots.devices
    most_prompts = slots.prompt_block * slots.prompt_blocks
    while waiting:
        device = min(range(slots.devices), key=lambda d: len(seats[d]))
        free, request = slots.most - len(seats[device]), waiting[0].request
        group = sum(live.request is request for live in waiting)
        if free < min(group, slots.entry) or new_prompts[device] == most_prompts:
            break
        new_prompts[device] += 1
        seats[device] += [waiting.popleft() for _ in range(min(group, free))]
    rows = slots.row_count(max(map(len, seats)))
    if rows > b:
        rows = slots.most if b else rows
    elif rows < b and waiting:
        rows = b
    elif rows < b:  # step by step, so that there are few ways from one size to another
        rows = max(count for count in slots.row_counts if count < b)
    if rows == b and not any(new_prompts):
        return list(held)
    return [row for taken in seats for row in taken + [None] * (rows - len(taken))]


def _least(held: Sequence[_Live | None], waiting: Sequence[_Live], slots: Slots) -> int:
    """With how many unfinished rows the host wants to look again: fewer than there are now."""
    live, most = sum(map(bool, held)), slots.most * slots.devices
    if waiting:  # when it is certain that some device can let responses in
        entry = min(sum(x.request is waiting[0].request for x in waiting), slots.entry)
        return min(live - 1, most - slots.devices * (entry - 1) - 1)
    fewer = [count * slots.devices for count in slots.row_counts if count * slots.devices < live]
    return max(fewer, default=0)


def _rearrange(
    model: Model,
    params: PyTree,
    cache: list[Any],
    clock: int,
    held: Sequence[_Live | None],
    seats: Sequence[_Live | None],
    slots: Slots,
) -> int:
    """Makes the cache that of other seats, layer by layer. Returns its clock.

    Reads the prompts of those who come in.
    """
    old = {id(live): slot for slot, live in enumerate(held) if live}
    new = [live is not None and id(live) not in old for live in seats]
    b, rows = len(held) // slots.devices, len(seats) // slots.devices
    prompts: list[dict[int, _Live]] = [{} for _ in range(slots.devices)]  # by id of the request
    source = np.zeros(len(seats), np.int32)
    for slot, live in enumerate(seats):
        if live is not None and new[slot]:
            known = prompts[slot // rows]
            known.setdefault(id(live.request), live)
            source[slot] = list(known).index(id(live.request))
        elif live is not None:
            source[slot] = old[id(live)] - slot // rows * b
    lives = [live for live in seats if live]
    now = max(live.position for live in lives)
    room = min(slots.quantum // 2, max(x.request.max_len - len(x.tokens) for x in lives))
    columns, before = slots.cache_len(now + room), _columns(cache)
    columns = columns if 2 * columns <= before else max(columns, before)
    number = model.config.num_layers
    read: list[Any] = [None] * number
    if any(new):
        read = list(_read(model, params, prompts, slots))
    cache[:] = cache or [None] * number
    where = _put((source, np.array(new)), slots)
    at = np.int32(clock - now), np.int32(now)
    for n in range(number):
        cache[n] = _arrange(cache[n], read[n], *where, *at, columns, slots.mesh)
        read[n] = None
    return now


def _read(
    model: Model, params: PyTree, prompts: Sequence[dict[int, _Live]], slots: Slots
) -> Sequence[tuple[Array, Array]]:
    """Keys and values of each device's prompts, the last token of each left out."""
    ids = [[live.request.prompt[:-1] for live in known.values()] for known in prompts]
    longest, half = max(len(p) for known in ids for p in known), -(-slots.max_prompt_len // 2)
    length = half if longest <= half else slots.max_prompt_len
    N, P = slots.prompt_blocks, slots.prompt_block
    tokens = np.zeros((N, slots.devices, P, length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for device, known in enumerate(ids):
        for number, prompt in enumerate(known):
            at = number // P, device, number % P, slice(length - len(prompt), length)
            tokens[at], valid[at] = prompt, True
    blocks = [x.reshape(N, -1, length) for x in (tokens, valid)]
    if slots.mesh is not None:
        blocks = jax.device_put(blocks, NamedSharding(slots.mesh, PartitionSpec(None, ROW_AXES)))
    count = np.int32(-(-max(map(len, ids)) // P))
    return _prefill(model, params, *blocks, count, slots.max_prompt_len)


def _harvested(
    held: list[_Live | None],
    tokens: np.ndarray,
    logp: np.ndarray,
    rule: SamplingRule,
    find_stop: Callable[[list[int]], int | None],
) -> list[Sample]:
    """Gives the responses their new tokens; those that are finished leave their slots."""
    finished = []
    for slot, live in enumerate(held):
        if live is None:
            continue
        reason = _extend(live, tokens[slot], logp[slot], rule, find_stop)
        if reason:
            finished.append(Sample(live.request.id, live.index, live.tokens, live.logp, reason))
            held[slot] = None
    return finished


def _extend(
    live: _Live,
    tokens: np.ndarray,
    logp: np.ndarray,
    rule: SamplingRule,
    find_stop: Callable[[list[int]], int | None],
) -> str:
    """Adds newly decoded tokens to a response. Returns the reason if that ends it, else ""."""
    tokens = tokens[: live.request.max_len - len(live.tokens)]
    ends = np.flatnonzero(np.isin(tokens, rule.stop_ids))[:1] + 1
    count = int(ends[0]) if len(ends) else len(tokens)
    live.tokens += tokens[:count].tolist()
    live.logp += logp[:count].tolist()
    kept = find_stop(live.tokens)
    if kept is not None:
        del live.tokens[kept:], live.logp[kept:]
        return "string"
    if len(ends):
        return "stop"
    return "length" if len(live.tokens) == live.request.max_len else ""
