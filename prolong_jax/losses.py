"""The objective of a training step, built from pieces per token.

All log-probabilities are in nats and of the token that was sampled. `logp` is the policy that is
trained and alone carries gradient; `old_logp` is the policy before this step's updates,
`sampler_logp` the distribution that was sampled, `ref_logp` the reference policy.

Pieces return one value per token and know no mask. `grpo_loss` puts them together. Another
objective is another function made of the same pieces.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prolong_jax import masked
from prolong_jax.types import Batch, Mean

FloatBT = Float[Array, "B T"]

RATIO_LIMIT = 20.0  # nats; exp(20) = 4.9e8 leaves float32 room for sums and gradients
KL_LIMIT = 5.0  # nats; the KL estimators go on linearly where log(pi_ref / pi) passes it


def importance_ratio(logp_BT: FloatBT, old_logp_BT: FloatBT) -> FloatBT:
    """pi / pi_old = exp(logp - old_logp), with the log-ratio clamped to +-RATIO_LIMIT.

    Clamped before exp: exp of a large log-ratio is inf, and the min of the clipped loss would
    back-propagate 0 * inf = NaN.
    """
    return jnp.exp(jnp.clip(logp_BT - old_logp_BT, -RATIO_LIMIT, RATIO_LIMIT))


def clipped_policy_loss(
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
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def kl_k1(logp_BT: FloatBT, ref_logp_BT: FloatBT) -> FloatBT:
    """KL(pi || pi_ref) as log(pi / pi_ref): unbiased, of either sign, unbounded.

    For monitoring only: as a loss its expected gradient is zero.
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


KL_ESTIMATORS = {"k2": kl_k2, "k3": kl_k3}


def truncated_importance_weight(
    old_logp_BT: FloatBT, sampler_logp_BT: FloatBT, *, cap: float
) -> FloatBT:
    """min(pi_old / pi_sampler, cap), a constant for the gradient.

    Corrects for a sampler whose distribution is not quite the trainer's (other kernels, other
    precision, older weights). Yao et al. 2025, truncated importance sampling (TIS).

    Args:
        old_logp_BT: constant.
        sampler_logp_BT: constant.
        cap: > 0, usually 2 to 10.
    """
    return jax.lax.stop_gradient(jnp.minimum(importance_ratio(old_logp_BT, sampler_logp_BT), cap))


def grpo_loss(
    logp_BT: FloatBT,
    batch: Batch,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: str,
    tis_cap: float,
) -> tuple[Mean, dict[str, Mean]]:
    """GRPO as in ProRL: the token mean of w * clipped policy loss + kl_coef * KL(pi || pi_ref).

    ProRL (arXiv 2505.24864) Eq. 4, aggregated over the tokens of the whole batch as in DAPO
    (arXiv 2503.14476) Eq. 8. Values where `batch.mask` is false have no influence.

    Args:
        logp_BT: carries gradient; scored at the temperature of the sampler.
        batch: the responses and their constants.
        clip_low, clip_high: see `clipped_policy_loss`.
        kl_coef: >= 0.
        kl_estimator: a key of `KL_ESTIMATORS`.
        tis_cap: upper bound of the weight w, see `truncated_importance_weight`.

    Returns:
        The loss to minimise, and statistics without gradient. Both are not divided yet: add them
        over micro-batches and devices, then `masked.divide`.
    """
    mask_BT = batch.mask
    logp_BT, old_logp_BT, ref_logp_BT, sampler_logp_BT = (
        jnp.where(mask_BT, x_BT, 0.0)
        for x_BT in (logp_BT, batch.old_logp, batch.ref_logp, batch.sampler_logp)
    )
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    weight_BT = truncated_importance_weight(old_logp_BT, sampler_logp_BT, cap=tis_cap)
    policy_loss_BT = weight_BT * clipped_policy_loss(logp_BT, old_logp_BT, batch.advantage, **clip)
    kl_loss_BT = kl_coef * KL_ESTIMATORS[kl_estimator](logp_BT, ref_logp_BT)
    statistics = {
        "policy_loss": policy_loss_BT,
        "kl_loss": kl_loss_BT,
        "kl_ref": kl_k3(logp_BT, ref_logp_BT),
        "kl_old": kl_k3(old_logp_BT, logp_BT),  # KL(pi_old || pi): the tokens are pi_old's
        "tis_weight": weight_BT,
        "tis_capped": (weight_BT >= tis_cap).astype(jnp.float32),
        "advantage": batch.advantage,
        "advantage_square": jnp.square(batch.advantage),
        **_ratio_statistics(importance_ratio(logp_BT, old_logp_BT), batch.advantage, **clip),
    }
    return masked.token_mean(policy_loss_BT + kl_loss_BT, mask_BT), {
        name: masked.token_mean(jax.lax.stop_gradient(x_BT), mask_BT)
        for name, x_BT in statistics.items()
    }


def _ratio_statistics(ratio_BT, advantage_BT, *, clip_low, clip_high):
    """A token counts as clipped where the bound took its gradient away."""
    low_BT = (advantage_BT < 0) & (ratio_BT < 1.0 - clip_low)
    high_BT = (advantage_BT > 0) & (ratio_BT > 1.0 + clip_high)
    return {
        "ratio": ratio_BT,
        "ratio_deviation": jnp.abs(ratio_BT - 1.0),
        "clip_fraction_low": low_BT.astype(jnp.float32),
        "clip_fraction_high": high_BT.astype(jnp.float32),
    }
