"""Scoring and the optimizer step, on packed rows, micro-batch by micro-batch.

Device arrays are [M, R, T]: M micro-batches of R rows of T tokens. How many of the M are in use is
an argument of the compiled programs, so that one compilation serves every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prolong_jax.config import LossSettings
from prolong_jax.losses import grpo_loss
from prolong_jax.masked import divide, token_mean
from prolong_jax.mesh import ROW_AXES, ROWS, put
from prolong_jax.models.attention import Packed
from prolong_jax.models.decoder import Model
from prolong_jax.types import Array, Batch, Mean, PyTree, TrainState


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
    share_prompts: bool = True,
) -> tuple[Batch, int]:
    """Packs conversations into rows, longest first; in a row, a shared prompt stands once.

    A response follows its own copy of the last prompt token, so that each of its tokens is
    predicted at the slot before it. A row that holds the prompt already is preferred, then the
    first with room.

    Args:
      conversations: in any order.
      row_len: T, tokens of a row.
      micro_batch_rows: R.
      micro_batches: M, room for micro-batches.
      share_prompts: false where every response keeps its prompt in its own segment.

    Returns:
      A host batch [M, R, T] with zero logprobs of policy and reference, and the number of
      micro-batches in use.

    Raises:
      ValueError: a conversation is longer than a row, or the rows do not suffice.
    """
    rows: list[_Row] = []
    for item in sorted(conversations, key=lambda c: -(len(c.prompt) + len(c.response))):
        length = len(item.prompt) + len(item.response)
        if length > row_len:
            raise ValueError(
                f"update.row_len: {row_len} tokens cannot hold a sequence of {length}."
            )
        fitting = [row for row in rows if row.added_len(item) <= row_len - row.length]
        if not fitting:
            rows.append(_Row(share_prompts))
            fitting = rows[-1:]
        row = next((row for row in fitting if row.has_prompt(item)), fitting[0])
        row.length += row.added_len(item)
        row.groups.setdefault(row.key(item), []).append(item)
    used = -(-len(rows) // micro_batch_rows)
    if used > micro_batches:
        raise ValueError(f"update: {len(rows)} rows do not fit in {micro_batches} micro-batches.")
    batch = _empty_batch((micro_batches * micro_batch_rows, row_len))
    for index, row in enumerate(rows):
        _write(jax.tree.map(lambda x, index=index: x[index], batch), row)
    shape = (micro_batches, micro_batch_rows, row_len)
    return jax.tree.map(lambda x: x.reshape(shape), batch), used


@dataclass
class _Row:
    share_prompts: bool
    groups: dict[Any, list[Conversation]] = field(default_factory=dict)  # by shared prompt
    length: int = 0  # tokens

    def key(self, item: Conversation) -> Any:
        return item.prompt.tobytes() if self.share_prompts else len(self.groups)

    def has_prompt(self, item: Conversation) -> bool:
        return self.key(item) in self.groups

    def added_len(self, item: Conversation) -> int:
        shared = 0 if self.has_prompt(item) else len(item.prompt) - 1
        return shared + 1 + len(item.response)


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


def _write(batch: Batch, row: _Row) -> None:
    """Writes a row into its view [T] of a host batch."""
    start, segment = 0, 0

    def put(tokens: np.ndarray, first_position: int, prompt: int) -> slice:
        at = slice(start, start + len(tokens))
        batch.tokens[at] = tokens
        batch.positions[at] = first_position + np.arange(len(tokens))
        batch.segments[at], batch.prompts[at] = segment, prompt
        return at

    for items in row.groups.values():
        segment, prompt, shared_len = segment + 1, segment + 1, len(items[0].prompt) - 1
        start = put(items[0].prompt[:-1], 0, prompt).stop
        for item in items:
            segment += row.share_prompts
            at = put(np.append(item.prompt[-1:], item.response), shared_len, prompt)
            response = slice(at.start + 1, at.stop)
            batch.mask[response] = True
            batch.sampler_logp[response] = item.sampler_logp
            batch.advantage[response] = item.advantage
            start = at.stop


def put_rows(mesh: Mesh, batch: Batch) -> Batch:
    """A host batch [M, R, T] on the devices, rows split over them."""
    return put(batch, NamedSharding(mesh, P(None, ROW_AXES)))


def token_logprobs(
    model: Model, params: PyTree, rows: Batch, temperature: float, grads: PyTree | None = None
) -> tuple[Array, Array]:
    """Log-probability and entropy f32 [B, T] of the response tokens, at the sampler's temperature."""
    seen = Packed(rows.segments, rows.prompts)
    hidden_BTD, _ = model.hidden(params, rows.tokens, rows.positions, seen)
    return model.token_logprobs(params, hidden_BTD, rows.tokens, rows.mask, temperature, grads)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _micro_batch(batch: Batch, index: Array) -> Batch:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)


def make_score(model: Model, temperature: float) -> Callable[[TrainState, Batch, int], Batch]:
    """A compiled function that fills `old_logp` and `ref_logp` of a batch [M, R, T]."""

    @jax.jit
    def score(state: TrainState, batch: Batch, num_micro_batches: Array) -> Batch:
        def one(index, filled):
            rows = _micro_batch(batch, index)
            for_both = []
            for params, out in zip((state.params, state.ref_params), filled, strict=True):
                logp_BT, _ = token_logprobs(model, params, rows, temperature)
                for_both.append(jax.lax.dynamic_update_index_in_dim(out, logp_BT, index, 0))
            return tuple(for_both)

        empty = (jnp.zeros_like(batch.old_logp), jnp.zeros_like(batch.ref_logp))
        old_logp, ref_logp = jax.lax.fori_loop(0, num_micro_batches, one, empty)
        return replace(batch, old_logp=old_logp, ref_logp=ref_logp)

    return score


def make_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    loss: LossSettings,
    temperature: float,
) -> Callable[[TrainState, Batch, int], tuple[TrainState, dict[str, Array]]]:
    """A compiled optimizer step over a batch [M, R, T]; the state that comes in is donated.

    The gradient is that of the token mean over the whole batch: micro-batches and devices add up
    totals and weights, and the sum is divided once. An update whose gradient is not finite is
    skipped and counted in `update/skipped_nonfinite`.
    """

    def local_sums(logp_BT: Array, entropy_BT: Array, rows: Batch) -> tuple[Mean, dict[str, Mean]]:
        total, statistics = grpo_loss(
            logp_BT,
            rows,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            kl_coef=loss.kl_coef,
            kl_estimator=loss.kl_estimator,
            tis_cap=loss.tis_cap,
        )
        statistics["entropy"] = token_mean(entropy_BT, rows.mask)
        return jax.lax.psum((total, statistics), ROW_AXES)

    global_sums = jax.shard_map(local_sums, mesh=mesh, in_specs=ROWS, out_specs=P())

    def objective(params: PyTree, rows: Batch, grads: PyTree):
        logp_BT, entropy_BT = token_logprobs(model, params, rows, temperature, grads)
        total, statistics = global_sums(logp_BT, jax.lax.stop_gradient(entropy_BT), rows)
        return total.total, (total, statistics)

    gradient = jax.grad(objective, has_aux=True)

    def update(state: TrainState, batch: Batch, num_micro_batches: Array):
        def added(index, sums):
            grads, means = sums
            found = gradient(state.params, _micro_batch(batch, index), grads)
            grads = grads | {model.head_name: _zeros(grads[model.head_name])}  # in `found` already
            return jax.tree.map(jnp.add, (grads, means), found)

        first = _micro_batch(batch, jnp.int32(0))
        start = _zeros(jax.eval_shape(gradient, state.params, first, state.params))
        grads, (total, statistics) = jax.lax.fori_loop(0, num_micro_batches, added, start)
        grads = jax.tree.map(lambda g: g / jnp.maximum(total.weight, 1.0), grads)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        stepped = replace(
            state, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        finite = jnp.isfinite(norm)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        metrics = {"loss": divide(total)} | {k: divide(v) for k, v in statistics.items()}
        metrics["grad_norm"] = norm
        metrics["skipped_nonfinite"] = (~finite).astype(jnp.float32)
        return state, {f"update/{name}": value for name, value in metrics.items()}

    return jax.jit(update, donate_argnums=0)


def reset_reference(
    state: TrainState, optimizer: optax.GradientTransformation, *, clear_optimizer: bool
) -> TrainState:
    """The hard reset: reference := policy, and the optimizer starts anew (ProRL section 2.3.1).

    ProRL v2 resets the reference alone (`clear_optimizer` false).
    """
    ref_params = jax.tree.map(jnp.copy, state.params)
    state = replace(state, ref_params=ref_params)
    if not clear_optimizer:
        return state
    shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
    fresh = jax.jit(optimizer.init, out_shardings=shardings)(state.params)
    return replace(state, opt_state=fresh)
