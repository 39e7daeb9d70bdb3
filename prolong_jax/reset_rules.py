"""When the reference is to be reset: one function for each rule of `ResetSettings`.

A rule looks at the history since the last reset and returns the values that ask for a reset, or
none. Pure.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from prolong_jax.config import ResetSettings

KL_SCALE = 20  # steps before a spike whose mean KL is its scale
SIGNALS = {"update/kl_ref": "kl", "update/entropy": "entropy", "response/terminated": "terminated"}
Values = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    step: int
    score: float  # of the validation blend, [0, 1]
    low: float  # its 95% interval
    high: float


@dataclass(frozen=True)
class History:
    """What the rules look at, since the last reset, oldest first."""

    evaluations: tuple[Evaluation, ...] = ()  # the one that led to the reset is the first
    kl: tuple[float, ...] = ()  # nats per token to the reference, of the last steps
    entropy: tuple[float, ...] = ()  # nats per token
    terminated: tuple[float, ...] = ()  # share of the responses


def extended(
    history: History,
    row: Mapping[str, float | None],
    evaluation: Evaluation | None,
    over: int,
) -> History:
    """The history after a step; metrics that are missing or not finite are passed over."""
    keep, known = over + KL_SCALE, {}
    for name, signal in SIGNALS.items():
        value = row.get(name)
        if value is not None and math.isfinite(value):
            known[signal] = (*getattr(history, signal), float(value))[-keep:]
    if evaluation is not None:
        known["evaluations"] = (*history.evaluations, evaluation)
    return replace(history, **known)


def _degradation(rule: ResetSettings, history: History) -> Values:
    *before, last = history.evaluations
    if not rule.degradation or not before:
        return {}
    best = max(before, key=lambda e: e.score)
    bar = min(best.score - rule.degradation, best.low)
    return {"score": last.score, "best": best.score, "below": bar} if last.score < bar else {}


def _plateau(rule: ResetSettings, history: History) -> Values:
    window = rule.plateau_window
    if not window or len(history.evaluations) <= window:
        return {}
    best = max(history.evaluations[:-window], key=lambda e: e.score)
    last = max(e.score for e in history.evaluations[-window:])
    bar = max(best.score + rule.plateau_gain, best.high)
    return {"score": last, "best": best.score, "not_above": bar} if last <= bar else {}


def _mean(values: tuple[float, ...], over: int) -> float | None:
    return sum(values[-over:]) / over if len(values) >= over else None


def _kl(rule: ResetSettings, history: History) -> Values:
    kl = _mean(history.kl, rule.over)
    return {"kl": kl, "above": rule.max_kl} if rule.max_kl and kl and kl > rule.max_kl else {}


def _kl_spike(rule: ResetSettings, history: History) -> Values:
    kl, scale = _mean(history.kl, rule.over), _mean(history.kl[: -rule.over], KL_SCALE)
    if not rule.kl_spike or kl is None or scale is None or kl <= rule.kl_spike * scale:
        return {}
    return {"kl": kl, "above": rule.kl_spike * scale}


def _entropy(rule: ResetSettings, history: History) -> Values:
    entropy = _mean(history.entropy, rule.over)
    if entropy is None or entropy >= rule.min_entropy:
        return {}
    return {"entropy": entropy, "below": rule.min_entropy}


def _unterminated(rule: ResetSettings, history: History) -> Values:
    terminated, limit = _mean(history.terminated, rule.over), rule.max_unterminated
    if not limit or terminated is None or 1 - terminated <= limit:
        return {}
    return {"unterminated": 1 - terminated, "above": limit}


RULES: Mapping[str, Callable[[ResetSettings, History], Values]] = {
    "degradation": _degradation,
    "kl": _kl,
    "kl spike": _kl_spike,
    "entropy": _entropy,
    "unterminated": _unterminated,
    "plateau": _plateau,
}
AFTER_EVALUATION = ("degradation", "plateau")  # asked right after one alone
