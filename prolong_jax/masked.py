"""Reductions over real tokens, and the two quantities that are read off logits.

A reduction returns a `Mean`: (total, weight), not divided. Micro-batches and devices add their
Means, and `divide` is called once on the sum. A mean of means would weigh a token of a short
micro-batch more than one of a long micro-batch.

Masked positions may hold anything, NaN and infinities included. They are replaced by `where`
before any arithmetic, because 0 * inf is NaN, in the value and in the gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prolong_jax.types import Mean

FloatBT = Float[Array, "B T"]
IntBT = Int[Array, "B T"]
BoolBT = Bool[Array, "B T"]
FloatBTV = Float[Array, "B T V"]
Scalar = Float[Array, ""]


def token_mean(x_BT: FloatBT, mask_BT: BoolBT) -> Mean:
    """Mean over all real tokens: sum(x * mask) / sum(mask). A long response weighs more.

    Args:
        x_BT: any values; carries gradient where the mask is true.
        mask_BT: true at the tokens that count.

    Returns:
        total = sum of x over real tokens, weight = number of real tokens.
    """
    return Mean(_zero_masked_BT(x_BT, mask_BT).sum(), mask_BT.sum(dtype=jnp.float32))


def sequence_mean(x_BT: FloatBT, mask_BT: BoolBT, segments_BT: IntBT) -> Mean:
    """Mean over responses of the mean over their tokens: every response weighs the same.

    Args:
        x_BT: any values; carries gradient where the mask is true.
        mask_BT: true at the tokens that count; a response without any weighs 0.
        segments_BT: in [0, T], the number of the response within its row.

    Returns:
        total = sum over responses of their token mean, weight = number of responses.
    """
    # P: the responses of a row
    count_BP = _segment_sum_BP(mask_BT.astype(jnp.float32), segments_BT)
    sum_BP = _segment_sum_BP(_zero_masked_BT(x_BT, mask_BT), segments_BT)
    mean_BP = sum_BP / jnp.maximum(count_BP, 1.0)
    return Mean(mean_BP.sum(), (count_BP > 0).sum(dtype=jnp.float32))


def add(left: Mean, right: Mean) -> Mean:
    """The Mean over the data of both."""
    return Mean(left.total + right.total, left.weight + right.weight)


def divide(mean: Mean) -> Scalar:
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


def _zero_masked_BT(x_BT, mask_BT):
    return jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)


def _segment_sum_BP(x_BT, segments_BT):
    sum_row = partial(jax.ops.segment_sum, num_segments=x_BT.shape[1] + 1)
    return jax.vmap(sum_row)(x_BT, segments_BT)
