"""Prompts and responses as packed rows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from prolong_jax.models.attention import Layout
from prolong_jax.types import Batch


@dataclass(frozen=True)
class Conversation:
    """One prompt with one response to it, on the host."""

    prompt: np.ndarray  # i32 [prompt tokens]
    response: np.ndarray  # i32 [response tokens] stop token included
    sampler_logp: np.ndarray  # f32 [response tokens] nats
    advantage: float


def pack(
    conversations: Sequence[Conversation],
    *,
    row_len: int,
    micro_batch_rows: int,
    micro_batches: int,
    layout: Layout,
) -> tuple[Batch, int]:
    """Packs conversations into rows, longest response first.

    With slots for prompts, a prompt stands once in a row, without its last token; a response follows
    its own copy of that token, so that each of its tokens is predicted at the slot before it. A row
    that holds the prompt already is preferred, then the first with room. If that takes more rows
    than there are, each prompt gets rows of its own. Without such slots, every response keeps its
    prompt in its own segment.

    Args:
      conversations: in any order.
      row_len: T, tokens of a row.
      micro_batch_rows: R.
      micro_batches: M, room for micro-batches.
      layout: of a row.

    Returns:
      A host batch [M, R, T] with zero logprobs of policy and reference, and the number of
      micro-batches in use.

    Raises:
      ValueError: a conversation is longer than a row, or the rows do not suffice.
    """
    lane_len = (row_len - layout.prompt_slots) // layout.lanes
    for item in conversations:
        if _lane_cost(item, layout) > lane_len or _slots_cost(item, layout) > layout.prompt_slots:
            raise ValueError(
                f"update.row_len: {row_len} tokens cannot hold a prompt of {len(item.prompt)} "
                f"tokens and a response of {len(item.response)}."
            )
    rows = _rows_of(conversations, layout, lane_len)
    if -(-len(rows) // micro_batch_rows) > micro_batches:
        by_prompt: dict[bytes, list[Conversation]] = {}
        for item in conversations:
            by_prompt.setdefault(item.prompt.tobytes(), []).append(item)
        rows = [row for items in by_prompt.values() for row in _rows_of(items, layout, lane_len)]
    used = -(-len(rows) // micro_batch_rows)
    if used > micro_batches:
        raise ValueError(f"update: {len(rows)} rows do not fit in {micro_batches} micro-batches.")
    batch = _empty_batch((micro_batches * micro_batch_rows, row_len))
    for index, row in enumerate(rows):
        view = jax.tree.map(lambda x, index=index: x[index], batch)
        _write(view, row, layout, lane_len)
    shape = (micro_batches, micro_batch_rows, row_len)
    return jax.tree.map(lambda x: x.reshape(shape), batch), used


@dataclass
class _Row:
    prompts: dict[bytes, np.ndarray] = field(default_factory=dict)  # those in their own slots
    free_slots: int = 0
    lanes: list[list[Conversation]] = field(default_factory=list)
    free: list[int] = field(default_factory=list)  # tokens, by lane


def _lane_cost(item: Conversation, layout: Layout) -> int:
    return len(item.response) + (1 if layout.prompt_slots else len(item.prompt))


def _slots_cost(item: Conversation, layout: Layout) -> int:
    return len(item.prompt) - 1 if layout.prompt_slots else 0


def _rows_of(
    conversations: Sequence[Conversation], layout: Layout, lane_len: int
) -> Sequence[_Row]:
    """First fit, the rows that hold the prompt first."""
    rows: list[_Row] = []
    for item in sorted(conversations, key=lambda c: -_lane_cost(c, layout)):
        key, cost = item.prompt.tobytes(), _lane_cost(item, layout)
        slots = _slots_cost(item, layout)
        fitting = [
            row
            for row in rows
            if max(row.free) >= cost and (key in row.prompts or row.free_slots >= slots)
        ]
        if not fitting:
            lanes = [[] for _ in range(layout.lanes)]
            fitting = [_Row({}, layout.prompt_slots, lanes, [lane_len] * layout.lanes)]
            rows += fitting
        row = next((row for row in fitting if key in row.prompts), fitting[0])
        if layout.prompt_slots and key not in row.prompts:
            row.prompts[key], row.free_slots = item.prompt, row.free_slots - slots
        lane = next(n for n, free in enumerate(row.free) if free >= cost)
        row.lanes[lane].append(item)
        row.free[lane] -= cost
    return rows


def _empty_batch(shape: tuple[int, int]) -> Batch:
    def zeros(dtype: type) -> Any:
        return np.zeros(shape, dtype)

    ints, floats = (lambda: zeros(np.int32)), (lambda: zeros(np.float32))
    return Batch(
        tokens=ints(),
        positions=ints(),
        segments=ints(),
        prompts=ints(),
        mask=zeros(bool),
        sampler_logp=floats(),
        old_logp=floats(),
        ref_logp=floats(),
        advantage=floats(),
    )


def _write(batch: Batch, row: _Row, layout: Layout, lane_len: int) -> None:
    """Writes a row into its view [T] of a host batch."""
    segment = 0

    def put(start: int, tokens: np.ndarray, first_position: int, prompt: int) -> int:
        at = slice(start, start + len(tokens))
        batch.tokens[at] = tokens
        batch.positions[at] = first_position + np.arange(len(tokens))
        batch.segments[at], batch.prompts[at] = segment, prompt
        return at.stop

    start, number = 0, {}  # of each prompt's segment
    for key, prompt in row.prompts.items():
        segment += 1
        number[key] = segment
        start = put(start, prompt[:-1], 0, segment)
    for lane, items in enumerate(row.lanes):
        start = layout.prompt_slots + lane * lane_len
        for item in items:
            segment += 1
            shared = _slots_cost(item, layout)
            opening = put(
                start, item.prompt[shared:], shared, number.get(item.prompt.tobytes(), segment)
            )
            start = put(opening, item.response, len(item.prompt), int(batch.prompts[opening - 1]))
            response = slice(opening, start)
            batch.mask[response] = True
            batch.sampler_logp[response] = item.sampler_logp
            batch.advantage[response] = item.advantage
