"""From what the verifier paid to what a response is trained on: length, ends and repetition.

Host side, numpy. Dynamic sampling looks at the raw reward, before any of this.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Reward = Float[np.ndarray, "... G"]
Flag = Bool[np.ndarray, "... G"]
Length = Int[np.ndarray, "... G"]


def stop_properly(reward: Reward, finished: Flag, *, coef: float) -> Reward:
    """Lowers the reward of responses that did not terminate by themselves.

    coef in [0, 1]: their reward is multiplied by it (1 leaves it as it is).
    coef < 0: their reward is replaced by it.
    ProRL (arXiv 2505.24864) App. E, from run 4 on; the size of the penalty is not published.

    Args:
        reward: [..., G].
        finished: true where the response ended with a stop token or stop string, [..., G].
        coef: at most 1.

    Raises:
        ValueError: coef is above 1 or not a number.
    """
    if not coef <= 1.0:
        raise ValueError(
            f"stop_properly: coef must be at most 1, but is {coef}; "
            "use [0, 1] to scale the reward of unfinished responses, < 0 to replace it."
        )
    return np.where(finished, reward, coef if coef < 0 else coef * reward)


def soft_overlong(length: Length, *, limit: int, buffer: float) -> Reward:
    """What DAPO adds to the reward of a long response: 0 down to -1 over the last part of the budget.

    ((limit - L_cache) - length) / L_cache within the last L_cache = buffer * limit tokens, 0 before
    and -1 beyond. DAPO (arXiv 2503.14476) Eq. 13.

    Args:
        length: tokens of the response, [..., G].
        limit: tokens that a response may have.
        buffer: L_cache as a share of the limit, in [0, 1]; 0: no penalty.
    """
    if buffer == 0:
        return np.zeros(length.shape)
    cache = buffer * limit
    return np.clip((limit - cache - length) / cache, -1.0, 0.0)


def cosine_length(length: Length, *, limit: int, low: float, high: float) -> Reward:
    """A reward that falls with the length from `high` to `low` (at the limit) along half a cosine.

    low + 0.5 * (high - low) * (1 + cos(pi * length / limit)). ProRL v2, the authors' post of August
    2025, which gives no numbers for it.

    Args:
        length: tokens of the response, at most `limit`, [..., G].
        limit: tokens that a response may have.
        low, high: rewards.
    """
    share = np.clip(length / limit, 0.0, 1.0)
    return low + 0.5 * (high - low) * (1.0 + np.cos(np.pi * share))


def is_on(step: int, *, on: int, off: int) -> bool:
    """Whether a penalty that is on for `on` steps, then off for `off`, is on in a step (from 1).

    on = 0: always.
    """
    return on == 0 or (step - 1) % (on + off) < on


def repetition(tokens: Sequence[int], size: int) -> float:
    """Share of a response's n-grams of `size` tokens that were there before, in [0, 1).

    Ours, after the penalty per repeated n-gram of Yeo et al. 2025 (arXiv 2502.03373).
    """
    if len(tokens) < size:
        return 0.0
    ngrams = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), size)
    return 1.0 - len(np.unique(ngrams, axis=0)) / len(ngrams)
