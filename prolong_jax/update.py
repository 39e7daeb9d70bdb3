"""Scoring and the optimizer step, on packed rows, micro-batch by micro-batch.

Device arrays are [M, R, T]: M micro-batches of R rows of T tokens. How many of the M are in use is
an argument of the compiled programs, so that one compilation serves every step.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prolong_jax.config import LossSettings
from prolong_jax.losses import importance_ratio
from prolong_jax.masked import divide
from prolong_jax.mesh import ROW_AXES, ROWS, put
from prolong_jax.models.attention import Packed
from prolong_jax.models.decoder import Model
from prolong_jax.objectives import Objective, make_objective, quantile
from prolong_jax.optimizer import learning_rate
from prolong_jax.types import Array, Batch, Mean, PyTree, TrainState


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


def make_score(
    model: Model, temperature: float, *, policy: bool = True
) -> Callable[[TrainState, Batch, int], Batch]:
    """A compiled function that fills `ref_logp` of a batch [M, R, T], and `old_logp` if `policy`."""

    @jax.jit
    def score(state: TrainState, batch: Batch, num_micro_batches: Array) -> Batch:
        def one(index, filled):
            rows = _micro_batch(batch, index)
            for_both = []
            for params, out in zip(scored, filled, strict=True):
                logp_BT, _ = token_logprobs(model, params, rows, temperature)
                for_both.append(jax.lax.dynamic_update_index_in_dim(out, logp_BT, index, 0))
            return tuple(for_both)

        scored = (state.ref_params, state.params)[: 1 + policy]
        empty = (jnp.zeros_like(batch.ref_logp),) * len(scored)
        ref_logp, *old_logp = jax.lax.fori_loop(0, num_micro_batches, one, empty)
        return replace(batch, ref_logp=ref_logp, old_logp=(*old_logp, batch.old_logp)[0])

    return score


def _local_sums(
    objective: Objective, logp_BT: Array, entropy_BT: Array, rows: Batch, entropy_coef: Array
) -> tuple[tuple[Mean, dict[str, Mean]], dict[str, Array]]:
    """The objective and its statistics, summed over the rows of all devices; and their maxima."""
    sums = objective(logp_BT, entropy_BT, rows, entropy_coef)
    ratio_BT = importance_ratio(jax.lax.stop_gradient(logp_BT), rows.old_logp)
    highest = {"ratio_max": ratio_BT, "ratio_min": 1.0 / ratio_BT}
    highest |= {"advantage_max": rows.advantage, "advantage_min": -rows.advantage}
    highest = {k: jnp.where(rows.mask, x_BT, -jnp.inf).max() for k, x_BT in highest.items()}
    return jax.lax.psum(sums, ROW_AXES), jax.lax.pmax(highest, ROW_AXES)


def _divided(total: Mean, sums: dict[str, Mean], highest: dict[str, Array]) -> dict[str, Array]:
    """The metrics that the sums and maxima of `_local_sums` stand for."""
    means = {"loss": divide(total)} | {name: divide(mean) for name, mean in sums.items()}
    variance = means.pop("advantage_square") - jnp.square(means["advantage"])
    least = {"ratio_min": 1 / highest["ratio_min"], "advantage_min": -highest["advantage_min"]}
    means["advantage_std"] = jnp.sqrt(jnp.maximum(variance, 0.0))
    below, square = means.pop("is_logratio_below"), means.pop("is_weight_square")
    means |= {f"is_ratio_q{q:02}": quantile(below, q / 100) for q in (1, 50, 99)}
    means["is_ess"] = jnp.square(means["is_weight"]) / jnp.maximum(square, 1e-30)
    return means | highest | least


def _flops_per_token(model: Model, params: PyTree) -> Array:
    """Of a forward and a backward pass, without attention."""
    weights = optax.tree.size(params)  # an embedding that is no head multiplies nothing
    weights -= 0 if model.head_name == "embed" else optax.tree.size(params["embed"])
    return jnp.float32(6.0 * weights)


def _gradient_of_total(
    model: Model, mesh: Mesh, loss: LossSettings, temperature: float, on_policy: bool
) -> Callable[..., tuple[PyTree, Any]]:
    """(params, rows, sum of gradients so far, entropy_coef) -> gradient, and sums and maxima."""
    local_sums = partial(_local_sums, make_objective(**asdict(loss)))
    specs = (ROWS, ROWS, ROWS, P())
    global_sums = jax.shard_map(local_sums, mesh=mesh, in_specs=specs, out_specs=P())

    def objective(params: PyTree, rows: Batch, grads: PyTree, entropy_coef: Array):
        logp_BT, entropy_BT = token_logprobs(model, params, rows, temperature, grads)
        if on_policy:
            rows = replace(rows, old_logp=jax.lax.stop_gradient(logp_BT))
        if not (loss.entropy_coef or loss.entropy_target):
            entropy_BT = jax.lax.stop_gradient(entropy_BT)  # is cheaper
        means, highest = global_sums(logp_BT, entropy_BT, rows, entropy_coef)
        return means[0].total, (means, highest)

    return jax.grad(objective, has_aux=True)


def make_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    loss: LossSettings,
    temperature: float,
    *,
    on_policy: bool = False,
) -> Callable[[TrainState, Batch, int], tuple[TrainState, dict[str, Array]]]:
    """A compiled optimizer step over a batch [M, R, T]; the state that comes in is donated.

    The gradient is that of the aggregate over the whole batch: micro-batches and devices add up
    totals and weights, and the sum is divided once. An update whose gradient is not finite is
    skipped and counted in `update/skipped_nonfinite`.

    `on_policy`: the batch is the only one of its step, so that the policy before the step's updates
    is the one at hand and its logprobs need not be in the batch.
    """
    gradient = _gradient_of_total(model, mesh, loss, temperature, on_policy)

    def update(
        state: TrainState,
        batch: Batch,
        num_micro_batches: Array,
        entropy_coef: Array | float = loss.entropy_coef,
    ):
        def added(index, sums):
            grads, (means, highest) = sums
            found, (more, higher) = gradient(
                state.params, _micro_batch(batch, index), grads, entropy_coef
            )
            grads = grads | {model.head_name: _zeros(grads[model.head_name])}  # in `found` already
            grads, means = jax.tree.map(jnp.add, (grads, means), (found, more))
            return grads, (means, jax.tree.map(jnp.maximum, highest, higher))

        first = _micro_batch(batch, jnp.int32(0))
        shapes = jax.eval_shape(gradient, state.params, first, state.params, entropy_coef)
        grads, (means, highest) = _zeros(shapes)
        start = grads, (means, jax.tree.map(lambda x: x - jnp.inf, highest))
        grads, aux = jax.lax.fori_loop(0, num_micro_batches, added, start)
        (total, statistics), highest = aux
        weight = jnp.where(total.weight == 0, 1.0, total.weight)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        stepped = replace(
            state, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        finite = jnp.isfinite(norm)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        metrics = _divided(total, statistics, highest) | {"grad_norm": norm}
        metrics["learning_rate"] = learning_rate(opt_state)
        metrics["flops_per_token"] = _flops_per_token(model, state.params)
        metrics["skipped_nonfinite"] = (~finite).astype(jnp.float32)
        return state, {f"update/{name}": value for name, value in metrics.items()}

    return jax.jit(update, donate_argnums=0)


def reset_reference(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    *,
    clear_optimizer: bool,
) -> TrainState:
    """The hard reset: reference := params, and the optimizer starts anew (ProRL section 2.3.1).

    `params` are those of the policy, or of an earlier one. ProRL v2 resets the reference alone
    (`clear_optimizer` false).
    """
    state = replace(state, ref_params=jax.tree.map(jnp.copy, params))
    if not clear_optimizer:
        return state
    shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
    fresh = jax.jit(optimizer.init, out_shardings=shardings)(state.params)
    return replace(state, opt_state=fresh)
