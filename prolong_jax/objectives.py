"""The family of objectives, each member under the name that the settings give it.

    from prolong_jax import objectives, presets
    loss = objectives.make_objective(**presets.PRESETS["dapo"]["loss"])
    mean, statistics = loss(logp_BT, entropy_BT, objectives.batch_of(old_logp_BT, advantage_BT))

Every function takes arrays alone and works under jit, grad, vmap and shard_map. losses.py has the
notation, and the pieces of ProRL itself. In all formulas r = pi / pi_old of a token, with its
logarithm clamped to +-RATIO_LIMIT, A its advantage, y_i a response; losses are to be minimised.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from prolong_jax import losses, sequences
from prolong_jax.losses import (
    RATIO_LIMIT,
    Parts,
    clipped_surrogate,
    importance_ratio,
)
from prolong_jax.masked import token_mean
from prolong_jax.types import Batch, Mean

FloatBT = Float[Array, "B T"]
IntBT = Int[Array, "B T"]
BoolBT = Bool[Array, "B T"]
Objective = Callable[..., tuple[Mean, dict[str, Mean]]]

# Nats, dense at 0: where the distribution of log-ratios is read, for its quantiles.
EDGES = RATIO_LIMIT * np.sinh(np.linspace(-9.0, 9.0, 145)) / np.sinh(9.0)


# --- policy losses -------------------------------------------------------------------------------


def dual_clip(
    logp_BT: FloatBT,
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> FloatBT:
    """PPO's clipped loss, at most -dual_clip * A where A < 0.

    A bad token that has become much likelier pulls no harder than at r = dual_clip, and beyond it
    not at all. Ye et al. 2020 (arXiv 1912.09729) Eq. 5.

    Args:
        logp_BT: carries gradient.
        old_logp_BT, advantage_BT: constants.
        clip_low, clip_high: see `losses.ppo_clip`.
        dual_clip: > 1, usually 3.
    """
    loss_BT = losses.ppo_clip(
        logp_BT, old_logp_BT, advantage_BT, clip_low=clip_low, clip_high=clip_high
    )
    return jnp.where(advantage_BT < 0, jnp.minimum(loss_BT, -dual_clip * advantage_BT), loss_BT)


def sequence_ratio(
    logp_BT: FloatBT, old_logp_BT: FloatBT, *, mask_BT: BoolBT, segments_BT: IntBT
) -> FloatBT:
    """s_i = exp(mean over the tokens of y_i of log r), at each slot of y_i. GSPO Eq. 7."""
    logratio_BT = sequences.response_mean(logp_BT - old_logp_BT, mask_BT, segments_BT)
    return importance_ratio(logratio_BT, jnp.zeros_like(logratio_BT))


def gspo(
    logp_BT: FloatBT,
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    *,
    mask_BT: BoolBT,
    segments_BT: IntBT,
    clip_low: float,
    clip_high: float,
) -> FloatBT:
    """-min(s_i * A, clip(s_i, 1 - clip_low, 1 + clip_high) * A), s_i as in `sequence_ratio`.

    The same at all tokens of a response, to be aggregated by responses ("seq_mean_token_mean").
    GSPO (arXiv 2507.18071) Eq. 5; its bounds are 3e-4 and 4e-4.
    """
    where = {"mask_BT": mask_BT, "segments_BT": segments_BT}
    ratio_BT = sequence_ratio(logp_BT, old_logp_BT, **where)
    return clipped_surrogate(ratio_BT, advantage_BT, clip_low, clip_high)


def gspo_token(
    logp_BT: FloatBT,
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    *,
    mask_BT: BoolBT,
    segments_BT: IntBT,
    clip_low: float,
    clip_high: float,
) -> FloatBT:
    """GSPO with advantages per token: s_it = sg[s_i] * pi / sg[pi] in place of s_i.

    Value and, where the advantages of a response are equal, gradient are those of `gspo`.
    GSPO (arXiv 2507.18071) Eq. 13 and 14.
    """
    where = {"mask_BT": mask_BT, "segments_BT": segments_BT}
    sequence_BT = jax.lax.stop_gradient(sequence_ratio(logp_BT, old_logp_BT, **where))
    ratio_BT = sequence_BT * jnp.exp(logp_BT - jax.lax.stop_gradient(logp_BT))
    return clipped_surrogate(ratio_BT, advantage_BT, clip_low, clip_high)


def gmpo(
    logp_BT: FloatBT,
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    *,
    mask_BT: BoolBT,
    segments_BT: IntBT,
    clip_low: float,
    clip_high: float,
) -> FloatBT:
    """-A * exp(mean over y_i of the clipped log r): the geometric mean of clipped ratios.

    log r is clipped at clip_high where A > 0 and at -clip_low where A < 0, so the bounds are nats
    here, not shares. To be aggregated by responses. GMPO (arXiv 2507.20673) Eq. 4; its bounds are 0.4.
    """
    logratio_BT = jnp.clip(logp_BT - old_logp_BT, -RATIO_LIMIT, RATIO_LIMIT)
    good_BT, bad_BT = jnp.minimum(logratio_BT, clip_high), jnp.maximum(logratio_BT, -clip_low)
    clipped_BT = jnp.where(advantage_BT > 0, good_BT, bad_BT)
    mean_BT = sequences.response_mean(clipped_BT, mask_BT, segments_BT)
    return -advantage_BT * jnp.exp(mean_BT)


def cispo(
    logp_BT: FloatBT,
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    *,
    clip_low: float,
    clip_high: float,
) -> FloatBT:
    """-sg[clip(r, 1 - clip_low, 1 + clip_high)] * A * logp: every token keeps a gradient.

    The cap of the weight is 1 + clip_high, not clip_high. clip_low = 1 is no lower bound, as in the
    paper: MiniMax-M1 (arXiv 2506.13585) Eq. 4 and 5.
    """
    ratio_BT = importance_ratio(logp_BT, old_logp_BT)
    weight_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    return -jax.lax.stop_gradient(weight_BT) * advantage_BT * logp_BT


def sapo(
    logp_BT: FloatBT,
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    *,
    temperature_good: float = 1.0,
    temperature_bad: float = 1.05,
) -> FloatBT:
    """-A * 4 / t * sigmoid(t * (r - 1)), t by the sign of A: a soft gate in place of a clip.

    SAPO (arXiv 2511.20347); the default temperatures t are the paper's.
    """
    ratio_BT = importance_ratio(logp_BT, old_logp_BT)
    t_BT = jnp.where(advantage_BT > 0, temperature_good, temperature_bad)
    return -advantage_BT * 4.0 / t_BT * jax.nn.sigmoid(t_BT * (ratio_BT - 1.0))


def reinforce(logp_BT: FloatBT, old_logp_BT: FloatBT, advantage_BT: FloatBT) -> FloatBT:
    """-sg[r] * A * logp: the policy gradient with unbounded importance weights.

    Its gradient is that of -r * A. Williams 1992; no clip, so r may grow up to exp(RATIO_LIMIT).
    """
    ratio_BT = importance_ratio(logp_BT, old_logp_BT)
    return -jax.lax.stop_gradient(ratio_BT) * advantage_BT * logp_BT


# --- corrections for a sampler that is not the policy before the update --------------------------


def no_correction(old_logp_BT: FloatBT) -> FloatBT:
    return jnp.ones_like(old_logp_BT)


def truncated_importance_weight(
    old_logp_BT: FloatBT, sampler_logp_BT: FloatBT, *, is_low: float, is_high: float
) -> FloatBT:
    """clip(pi_old / pi_sampler, is_low, is_high), a constant for the gradient.

    Corrects for a sampler whose distribution is not quite the trainer's (other kernels, other
    precision, older weights). Yao et al. 2025, truncated importance sampling (TIS), has no lower
    bound: is_low = 0.

    Args:
        old_logp_BT: constant.
        sampler_logp_BT: constant.
        is_low: in [0, 1].
        is_high: > 0, usually 2 to 10.
    """
    ratio_BT = importance_ratio(old_logp_BT, sampler_logp_BT)
    return jax.lax.stop_gradient(jnp.clip(ratio_BT, is_low, is_high))


def icepop(
    old_logp_BT: FloatBT, sampler_logp_BT: FloatBT, *, is_low: float, is_high: float
) -> FloatBT:
    """w = pi_old / pi_sampler where it lies in [is_low, is_high], else 0; constant.

    IcePop, with bounds 0.5 and 5 in the open implementations of ProRL v2.
    """
    ratio_BT = importance_ratio(old_logp_BT, sampler_logp_BT)
    inside_BT = (is_low <= ratio_BT) & (ratio_BT <= is_high)
    return jax.lax.stop_gradient(jnp.where(inside_BT, ratio_BT, 0.0))


def seq_mask_tis(
    old_logp_BT: FloatBT,
    sampler_logp_BT: FloatBT,
    *,
    mask_BT: BoolBT,
    segments_BT: IntBT,
    is_low: float,
    is_high: float,
) -> FloatBT:
    """w, and 0 at all tokens of a response whose geometric mean of w leaves [is_low, is_high].

    Constant. Tokens of the other responses keep their own w. As in OpenRLHF and NeMo-RL, with a
    window of 0.999 to 1.002.
    """
    where = {"mask_BT": mask_BT, "segments_BT": segments_BT}
    mean_BT = sequence_ratio(old_logp_BT, sampler_logp_BT, **where)
    inside_BT = (is_low <= mean_BT) & (mean_BT <= is_high)
    ratio_BT = importance_ratio(old_logp_BT, sampler_logp_BT)
    return jax.lax.stop_gradient(jnp.where(inside_BT, ratio_BT, 0.0))


# --- aggregations --------------------------------------------------------------------------------


def token_sum_over_constant(
    x_BT: FloatBT, mask_BT: BoolBT, segments_BT: IntBT, *, token_constant: float
) -> Mean:
    return sequences.sequence_sum(x_BT, mask_BT, segments_BT, constant=token_constant)


# --- by name -------------------------------------------------------------------------------------

SETTINGS = ("policy_loss", "clip_low", "clip_high", "dual_clip", "kl_coef", "kl_estimator", "kl_in")
SETTINGS += ("correction", "is_low", "is_high", "aggregation", "token_constant")
SETTINGS += ("entropy_coef", "entropy_target", "entropy_step")
POLICY_LOSSES: dict[str, Callable[..., FloatBT]] = {
    "ppo_clip": losses.ppo_clip,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
}
RATIOS = {"gspo": sequence_ratio, "gspo_token": sequence_ratio}  # of the others: that of a token
KL_ESTIMATORS = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}
CORRECTIONS: dict[str, Callable[..., FloatBT]] = {
    "none": no_correction,
    "tis": truncated_importance_weight,
    "icepop": icepop,
    "seq_mask_tis": seq_mask_tis,
}
AGGREGATIONS: dict[str, Callable[..., Mean]] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": sequences.sequence_mean,
    "seq_mean_token_sum": sequences.sequence_sum,
    "token_sum_over_constant": token_sum_over_constant,
}


def make_objective(**settings: Any) -> Objective:
    """The objective that settings name, as a function of arrays alone.

    Args:
        settings: all fields of `config.LossSettings`, or `presets.PRESETS[NAME]["loss"]` (for
            dr_grpo with a token_constant: the longest response allowed).

    Returns:
        objective(logp_BT, entropy_BT, batch, entropy_coef) -> (loss, statistics), see
        `losses.objective` and `statistics`. The coefficient is the settings' own if left out.

    Raises:
        ValueError: a setting that is missing or not known, k1 as a loss, a sum over no constant.
    """
    if wrong := sorted(set(SETTINGS).symmetric_difference(settings)):
        raise ValueError(f"objective: expected the settings {', '.join(SETTINGS)}; see {wrong}.")
    estimator, kl_in = settings["kl_estimator"], settings["kl_in"]
    if kl_in not in ("loss", "reward"):
        raise ValueError(f"kl_in: expected loss or reward, got {kl_in!r}.")
    if estimator == "k1" and kl_in == "loss":
        raise ValueError(
            "kl_estimator: k1 has no expected gradient as a loss; use k2 or k3, or kl_in='reward'."
        )
    if settings["aggregation"] == "token_sum_over_constant" and settings["token_constant"] <= 0:
        raise ValueError(
            "token_constant: must be above 0 with token_sum_over_constant, got "
            f"{settings['token_constant']}; the longest response allowed is usual."
        )
    parts = Parts(
        policy_loss=_asking(_known("policy_loss", POLICY_LOSSES, settings), settings),
        ratio=_asking(RATIOS.get(settings["policy_loss"], importance_ratio), settings),
        correction=_asking(_known("correction", CORRECTIONS, settings), settings),
        aggregate=_asking(_known("aggregation", AGGREGATIONS, settings), settings),
        kl=_known("kl_estimator", KL_ESTIMATORS, settings),
        kl_coef=settings["kl_coef"],
        kl_in_reward=kl_in == "reward",
    )

    clipped, corrected = partial(_clipped, settings), settings["correction"] != "none"

    def objective(logp_BT, entropy_BT, batch, entropy_coef=settings["entropy_coef"]):
        loss, terms = losses.objective(parts, logp_BT, entropy_BT, batch, entropy_coef)
        return loss, statistics(terms, batch.mask, clipped, corrected=corrected)

    return objective


def _clipped(settings: dict[str, Any], ratio_BT: FloatBT, advantage_BT: FloatBT):
    """Tokens whose gradient the lower and the upper bound took away; with cispo: capped its weight."""
    name, low, high = (settings[k] for k in ("policy_loss", "clip_low", "clip_high"))
    if name in ("sapo", "reinforce"):  # no bounds
        return jnp.zeros_like(ratio_BT, bool), jnp.zeros_like(ratio_BT, bool)
    if name == "gmpo":  # nats
        low, high = -np.expm1(-low), np.expm1(high)
    low_BT, high_BT = ratio_BT < 1.0 - low, ratio_BT > 1.0 + high
    if name == "cispo":
        return low_BT, high_BT
    low_BT, high_BT = low_BT & (advantage_BT < 0), high_BT & (advantage_BT > 0)
    if name == "dual_clip":
        high_BT |= (ratio_BT > settings["dual_clip"]) & (advantage_BT < 0)
    return low_BT, high_BT


def statistics(
    terms: dict[str, FloatBT],
    mask_BT: BoolBT,
    clipped: Callable[[FloatBT, FloatBT], tuple[Bool[Array, "B T"], Bool[Array, "B T"]]],
    *,
    corrected: bool,
) -> dict[str, Mean]:
    """What is told of a step, as means over tokens: the terms of `losses.objective`, and theirs.

    Args:
        terms, mask_BT: of the objective and the batch.
        clipped: of ratio_BT and advantage_BT, which tokens the lower and the upper bound clipped.
        corrected: whether importance weights have bounds.
    """
    logp_BT, old_logp_BT, sampler_logp_BT, ratio_BT, advantage_BT = (
        terms[name] for name in ("logp", "old_logp", "sampler_logp", "ratio", "advantage")
    )
    low_BT, high_BT = clipped(ratio_BT, advantage_BT)
    is_clipped_BT = terms["is_weight"] != importance_ratio(old_logp_BT, sampler_logp_BT)
    told = {k: terms[k] for k in ("policy_loss", "kl_loss", "entropy", "is_weight")} | {
        "kl_ref": losses.kl_k3(logp_BT, terms["ref_logp"]),
        "kl_ref_k1": losses.kl_k1(logp_BT, terms["ref_logp"]),
        "kl_old": losses.kl_k3(old_logp_BT, logp_BT),  # KL(pi_old || pi): the tokens are pi_old's
        "is_weight_square": jnp.square(terms["is_weight"]),
        "is_clipped": (is_clipped_BT & corrected).astype(jnp.float32),
        "advantage": advantage_BT,
        "advantage_square": jnp.square(advantage_BT),
        "ratio": ratio_BT,
        "ratio_deviation": jnp.abs(ratio_BT - 1.0),
        "clip_fraction_low": low_BT.astype(jnp.float32),
        "clip_fraction_high": high_BT.astype(jnp.float32),
    }
    means = {name: token_mean(x_BT, mask_BT) for name, x_BT in told.items()}
    logratio_BT = old_logp_BT - sampler_logp_BT
    return means | {
        "is_logratio_below": sequences.share_below(logratio_BT, mask_BT, jnp.asarray(EDGES))
    }


def batch_of(
    old_logp_BT: FloatBT,
    advantage_BT: FloatBT,
    mask_BT: BoolBT | None = None,
    *,
    ref_logp_BT: FloatBT | None = None,
    sampler_logp_BT: FloatBT | None = None,
    segments_BT: IntBT | None = None,
) -> Batch:
    """What an objective reads, from arrays; tokens, which it does not read, are zeros.

    What is left out: every token counts, reference and sampler are the old policy, and a row is one
    response.
    """
    shape = old_logp_BT.shape
    zeros_BT, ones_BT = jnp.zeros(shape, jnp.int32), jnp.ones(shape, jnp.int32)
    segments_BT = ones_BT if segments_BT is None else segments_BT
    return Batch(
        tokens=zeros_BT,
        positions=zeros_BT,
        segments=segments_BT,
        prompts=segments_BT,
        mask=jnp.ones(shape, bool) if mask_BT is None else mask_BT,
        sampler_logp=old_logp_BT if sampler_logp_BT is None else sampler_logp_BT,
        old_logp=old_logp_BT,
        ref_logp=old_logp_BT if ref_logp_BT is None else ref_logp_BT,
        advantage=advantage_BT,
    )


def quantile(below: Array, share: float) -> Array:
    """The ratio that a share of the tokens is at most, read off a distribution of log-ratios.

    Args:
        below: f32 [K] shares of tokens at most EDGES, as `is_logratio_below` divided.
        share: in (0, 1).
    """
    return jnp.exp(jnp.interp(share, below, EDGES))


def adapted_entropy_shift(
    shift: float, entropy: float, *, coef: float, target: float, step: float
) -> float:
    """What is added to the coefficient of the entropy, after a step whose entropy was this.

    One `step` more where the entropy is below the target, else one less; never so that
    coef + shift is negative. It outlives stages and resets. Skywork-OR1 (arXiv 2505.22312), which sets the coefficient to 0 as
    long as the entropy is above the target: `adapted_entropy_coef`.
    """
    return max(-coef, shift + (step if entropy < target else -step))


def adapted_entropy_coef(shift: float, entropy: float, *, coef: float, target: float) -> float:
    """The coefficient of the next step: coef + shift where the entropy is at most the target."""
    return max(0.0, coef + shift) if entropy <= target else 0.0


def _known(setting: str, functions: dict[str, Callable], settings: dict[str, Any]) -> Callable:
    name = settings[setting]
    if name not in functions:
        raise ValueError(f"{setting}: expected one of {', '.join(functions)}, got {name!r}.")
    return functions[name]


def _asking(function: Callable, settings: dict[str, Any]) -> Callable:
    """The function of named arrays, given those of the settings and arrays that it asks for."""
    wanted = inspect.signature(function).parameters
    fixed = {name: value for name, value in settings.items() if name in wanted}

    def call(**arrays: Array) -> Any:
        return function(**{k: x for k, x in arrays.items() if k in wanted}, **fixed)

    return call
