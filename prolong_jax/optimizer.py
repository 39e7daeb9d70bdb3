"""The optimizer: AdamW with global-norm clipping and a constant learning rate after warm-up."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prolong_jax.config import OptimizerSettings
from prolong_jax.mesh import replicated
from prolong_jax.types import Array, PyTree


@functools.cache  # so that resets with the same settings share one program
def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Decoupled weight decay (arXiv 1711.05101) after clipping the gradient's global norm."""

    def schedule(count: Any) -> Array:
        """Step 1 of `warmup_steps` already moves the weights."""
        warm = (count + 1) / max(1, settings.warmup_steps)
        return settings.learning_rate * jnp.minimum(1.0, warm)

    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        # The state holds the learning rate of its last step, for the records.
        optax.inject_hyperparams(
            optax.adamw, static_args=("b1", "b2", "eps", "eps_root", "weight_decay")
        )(
            schedule,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
    )


def learning_rate(opt_state: PyTree) -> Array:
    """That of the last step; NaN where the state is not of an optimizer from `make_optimizer`."""
    found = optax.tree.get_all_with_path(opt_state, "learning_rate")
    return next((value for _, value in found if isinstance(value, jax.Array)), jnp.array(jnp.nan))


def opt_state_shardings(
    optimizer: optax.GradientTransformation, params: PyTree, shardings: PyTree
) -> PyTree:
    """The moments lie where their parameters lie, counters on every device.

    Args:
      optimizer: from `make_optimizer`.
      params: parameters, or their shapes.
      shardings: one for each parameter.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated(jax.tree.leaves(shardings)[0].mesh),
    )
