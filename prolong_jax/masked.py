"""Reductions over real tokens, and two quantities that are read off logits.

A reduction returns a `Mean`: (total, weight), not divided. Micro-batches and devices add their
Means, and `divide` is called once on the sum. A mean of means would weigh a token of a short
micro-batch more than one of a long micro-batch.

Masked positions may hold anything, NaN and infinities included. They are replaced by `where`
before any arithmetic, because 0 * inf is NaN, in the value and in the gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prolong_jax.types import Mean

FloatBT = Float[Array, "B T"]
IntBT = Int[Array, "B T"]
BoolBT = Bool[Array, "B T"]
FloatBTV = Float[Array, "B T V"]


def token_mean(x_BT: FloatBT, mask_BT: BoolBT) -> Mean:
    """Mean over all real tokens: sum(x * mask) / sum(mask). A long response weighs more.

    Args:
        x_BT: any values; carries gradient where the mask is true.
        mask_BT: true at the tokens that count.

    Returns:
        total = sum of x over real tokens, weight = number of real tokens.
    """
    return Mean(zero_masked(x_BT, mask_BT).sum(), mask_BT.sum(dtype=jnp.float32))


def add(left: Mean, right: Mean) -> Mean:
    """The Mean over the data of both."""
    return Mean(left.total + right.total, left.weight + right.weight)


def divide(mean: Mean) -> Float[Array, "..."]:
    """total / weight, and 0 with zero gradient where the weight is 0."""
    is_empty = mean.weight == 0
    return jnp.where(is_empty, 0.0, mean.total / jnp.where(is_empty, 1.0, mean.weight))


def chosen_logp(logits_BTV: FloatBTV, tokens_BT: IntBT) -> FloatBT:
    """Log-probability in nats of each chosen token: logits[token] - logsumexp(logits).

    Args:
        logits_BTV: any float dtype, computed on in float32; carries gradient.
        tokens_BT: token ids in [0, V).

    Returns:
        f32, at most 0 up to rounding.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def entropy(logits_BTV: FloatBTV) -> FloatBT:
    """Entropy in nats of the distribution at each position: -sum_v p_v log p_v.

    Args:
        logits_BTV: any float dtype, computed on in float32; carries gradient. -inf marks an
            excluded token, which adds 0; at least one logit per position is finite.

    Returns:
        f32, in [0, log V].
    """
    logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    finite_logp_BTV = jnp.where(jnp.isneginf(logp_BTV), 0.0, logp_BTV)
    return -(jnp.exp(logp_BTV) * finite_logp_BTV).sum(axis=-1)


def zero_masked(x_BT: FloatBT, mask_BT: BoolBT) -> FloatBT:
    """x as f32, 0 where the mask is false."""
    return jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
