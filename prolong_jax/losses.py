"""The objective of a training step, built from pieces per token.

All log-probabilities are in nats and of the token that was sampled. `logp` is the policy that is
trained and alone carries gradient; `old_logp` is the policy before this step's updates,
`sampler_logp` the distribution that was sampled, `ref_logp` the reference policy.

Here are the pieces of ProRL, and `objective`, which puts pieces together. objectives.py has the rest
of the family, under the names of the settings.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prolong_jax import sequences
from prolong_jax.types import Batch, Mean

FloatBT = Float[Array, "B T"]
Scalar = Float[Array, ""]

RATIO_LIMIT = 20.0  # nats; exp(20) = 4.9e8 leaves float32 room for sums and gradients
KL_LIMIT = 5.0  # nats; the KL estimators go on linearly where log(pi_ref / pi) passes it


def importance_ratio(logp_BT: FloatBT, old_logp_BT: FloatBT) -> FloatBT:
    """pi / pi_old = exp(logp - old_logp), with the log-ratio clamped to +-RATIO_LIMIT.

    Clamped before exp: exp of a large log-ratio is inf, and the min of the clipped loss would
    back-propagate 0 * inf = NaN.
    """
    return jnp.exp(jnp.clip(logp_BT - old_logp_BT, -RATIO_LIMIT, RATIO_LIMIT))


def clipped_surrogate(
    ratio_BT: FloatBT, advantage_BT: FloatBT, clip_low: float, clip_high: float
) -> FloatBT:
    """-min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A), for any ratio r."""
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def ppo_clip(
    logp_BT: FloatBT,
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    *,
    clip_low: float,
    clip_high: float,
) -> FloatBT:
    """PPO's clipped surrogate with decoupled bounds, negated: to be minimised.

    -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A), r = pi / pi_old.
    ProRL (arXiv 2505.24864) Eq. 1 and 3; DAPO (arXiv 2503.14476) Eq. 8.

    Args:
        logp_BT: carries gradient.
        old_logp_BT: constant.
        advantage_BT: that of the token's response, constant.
        clip_low: in [0, 1]; below 1 - clip_low a negative advantage has no gradient.
        clip_high: >= 0; above 1 + clip_high a positive advantage has no gradient.
    """
    ratio_BT = importance_ratio(logp_BT, old_logp_BT)
    return clipped_surrogate(ratio_BT, advantage_BT, clip_low, clip_high)


def kl_k1(logp_BT: FloatBT, ref_logp_BT: FloatBT) -> FloatBT:
    """KL(pi || pi_ref) as log(pi / pi_ref): unbiased, of either sign, unbounded.

    For monitoring and as part of the reward: as a loss its expected gradient is zero.
    """
    return logp_BT - ref_logp_BT


def kl_k2(logp_BT: FloatBT, ref_logp_BT: FloatBT) -> FloatBT:
    """KL(pi || pi_ref) as d^2 / 2, d = log(pi_ref / pi), for tokens sampled from pi.

    Its expected gradient is that of KL(pi || pi_ref). Where |d| > KL_LIMIT it goes on linearly
    with slope +-KL_LIMIT; clamping the value instead would cut the gradient off where the policy
    is furthest away. Schulman, http://joschu.net/blog/kl-approx.html.
    """
    d_BT = ref_logp_BT - logp_BT
    near_BT = jnp.clip(d_BT, -KL_LIMIT, KL_LIMIT)
    return near_BT * (d_BT - near_BT / 2)


def kl_k3(logp_BT: FloatBT, ref_logp_BT: FloatBT) -> FloatBT:
    """KL(pi || pi_ref) as exp(d) - d - 1, d = log(pi_ref / pi), for tokens sampled from pi.

    Never negative, and unbiased where d <= KL_LIMIT; its expected gradient is that of
    KL(pi_ref || pi). Where d > KL_LIMIT it goes on linearly with slope exp(KL_LIMIT) - 1; towards
    -inf it is linear by itself. DeepSeekMath (arXiv 2402.03300) Eq. 4; Schulman as above.
    """
    d_BT = ref_logp_BT - logp_BT
    near_BT = jnp.minimum(d_BT, KL_LIMIT)
    return jnp.expm1(near_BT) * (1.0 + d_BT - near_BT) - near_BT


@dataclass(frozen=True)
class Parts:
    """What an objective is made of. Functions get arrays by name, mask and segments among them."""

    policy_loss: Callable[..., FloatBT]  # of logp_BT, old_logp_BT, advantage_BT
    ratio: Callable[..., FloatBT]  # of logp_BT, old_logp_BT: what the loss compares with its bounds
    correction: Callable[..., FloatBT]  # of old_logp_BT, sampler_logp_BT: the weight of a token
    aggregate: Callable[..., Mean]  # of x_BT
    kl: Callable[[FloatBT, FloatBT], FloatBT]
    kl_coef: float
    kl_in_reward: bool


def objective(
    parts: Parts, logp_BT: FloatBT, entropy_BT: FloatBT, batch: Batch, entropy_coef: Scalar | float
) -> tuple[Mean, dict[str, FloatBT]]:
    """The aggregate of w * policy loss + kl_coef * KL(pi || pi_ref) - entropy_coef * entropy.

    ProRL (arXiv 2505.24864) Eq. 4. With the KL in the reward, a token's advantage is instead
    lowered by kl_coef times the KL from there to the response's end, as in REINFORCE++ (arXiv
    2501.03262); not normalised with the rewards, so that kl_coef keeps its unit. Values where
    `batch.mask` is false have no influence.

    Args:
        parts: see `objectives.make_objective`.
        logp_BT: carries gradient; scored at the temperature of the sampler.
        entropy_BT: nats; carries gradient where entropy_coef is not 0.
        batch: the responses and their constants.
        entropy_coef: reward of a nat of entropy, >= 0.

    Returns:
        The loss to minimise, not divided yet: add it over micro-batches and devices, then
        `masked.divide`. And its terms, without gradient.
    """
    mask_BT, where = batch.mask, {"mask_BT": batch.mask, "segments_BT": batch.segments}
    logp_BT, entropy_BT, old_logp_BT, ref_logp_BT, sampler_logp_BT, advantage_BT = (
        jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
        for x_BT in (logp_BT, entropy_BT, batch.old_logp, batch.ref_logp, batch.sampler_logp)
        + (batch.advantage,)
    )
    old, now = {"old_logp_BT": old_logp_BT} | where, {"logp_BT": logp_BT}
    weight_BT = parts.correction(sampler_logp_BT=sampler_logp_BT, **old)
    if parts.kl_in_reward:
        kl_loss_BT = jnp.zeros_like(logp_BT)
        kl_BT = parts.kl(old_logp_BT, ref_logp_BT)
        advantage_BT -= parts.kl_coef * sequences.sum_to_end(kl_BT, **where)
    else:
        kl_loss_BT = parts.kl_coef * parts.kl(logp_BT, ref_logp_BT)
    policy_loss_BT = weight_BT * parts.policy_loss(advantage_BT=advantage_BT, **old, **now)
    loss_BT = policy_loss_BT + kl_loss_BT - entropy_coef * entropy_BT
    terms = {"logp": logp_BT, "old_logp": old_logp_BT, "ref_logp": ref_logp_BT}
    terms |= {"sampler_logp": sampler_logp_BT, "advantage": advantage_BT, "entropy": entropy_BT}
    terms |= {"policy_loss": policy_loss_BT, "kl_loss": kl_loss_BT, "is_weight": weight_BT}
    terms["ratio"] = parts.ratio(**old, **now)
    return parts.aggregate(x_BT=loss_BT, **where), jax.lax.stop_gradient(terms)
