"""Reductions that know where a response begins and ends, in packed rows.

`segments_BT`, in [0, T], numbers the responses of a row; all ones where a row is one response. What
is masked may hold anything, see masked.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prolong_jax.masked import zero_masked
from prolong_jax.types import Mean

FloatBT = Float[Array, "B T"]
IntBT = Int[Array, "B T"]
BoolBT = Bool[Array, "B T"]


def sequence_mean(x_BT: FloatBT, mask_BT: BoolBT, segments_BT: IntBT) -> Mean:
    """Mean over responses of the mean over their tokens: every response weighs the same.

    The aggregation of GRPO, DeepSeekMath (arXiv 2402.03300) Eq. 3.

    Args:
        x_BT: any values; carries gradient where the mask is true.
        mask_BT: true at the tokens that count; a response without any weighs 0.
        segments_BT: the number of the response within its row.

    Returns:
        total = sum over responses of their token mean, weight = number of responses.
    """
    return sequence_sum(x_BT / _count_BT(mask_BT, segments_BT), mask_BT, segments_BT)


def sequence_sum(
    x_BT: FloatBT, mask_BT: BoolBT, segments_BT: IntBT, *, constant: float = 1.0
) -> Mean:
    """Mean over responses of the sum over their tokens, divided by a constant.

    With the longest response allowed as the constant, that of Dr. GRPO (arXiv 2503.20783).

    Returns:
        total = sum of x over real tokens, weight = number of responses * constant.
    """
    count_BP = _segment_sum_BP(mask_BT.astype(jnp.float32), segments_BT)  # P: responses of a row
    num_responses = (count_BP > 0).sum(dtype=jnp.float32)
    return Mean(zero_masked(x_BT, mask_BT).sum(), num_responses * constant)


def response_mean(x_BT: FloatBT, mask_BT: BoolBT, segments_BT: IntBT) -> FloatBT:
    """The mean over the tokens of a response, at each of its slots; carries gradient."""
    sum_BT = _at_slots(_segment_sum_BP(zero_masked(x_BT, mask_BT), segments_BT), segments_BT)
    return sum_BT / _count_BT(mask_BT, segments_BT)


def sum_to_end(x_BT: FloatBT, mask_BT: BoolBT, segments_BT: IntBT) -> FloatBT:
    """At each slot of a response the sum of x from there to the response's end.

    The slots of a response stand next to each other. By differences of sums over the whole row, so
    the rounding of a response grows with what stands before it.
    """
    x_BT = zero_masked(x_BT, mask_BT)
    before_BT = jnp.cumsum(x_BT, axis=1) - x_BT
    opens_BT = segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    opening_BP = _segment_sum_BP(jnp.where(opens_BT, before_BT, 0.0), segments_BT)
    whole_BP = _segment_sum_BP(x_BT, segments_BT)
    return _at_slots(whole_BP + opening_BP, segments_BT) - before_BT


def share_below(x_BT: FloatBT, mask_BT: BoolBT, edges_K: Float[Array, " K"]) -> Mean:
    """For each edge the share of real tokens whose x is at most the edge: their distribution.

    Returns:
        total [K] = number of such tokens, weight = number of real tokens.
    """
    below_BTK = zero_masked(x_BT, mask_BT)[..., None] <= edges_K
    total_K = (below_BTK & mask_BT[..., None]).sum((0, 1), dtype=jnp.float32)
    return Mean(total_K, mask_BT.sum(dtype=jnp.float32))


def _segment_sum_BP(x_BT, segments_BT):
    sum_row = partial(jax.ops.segment_sum, num_segments=x_BT.shape[1] + 1)
    return jax.vmap(sum_row)(x_BT, segments_BT)


def _at_slots(x_BP, segments_BT):
    return jnp.take_along_axis(x_BP, segments_BT, axis=1)


def _count_BT(mask_BT, segments_BT):
    """Tokens of the slot's response, at least 1."""
    count_BP = _segment_sum_BP(mask_BT.astype(jnp.float32), segments_BT)
    return jnp.maximum(_at_slots(count_BP, segments_BT), 1.0)
