"""From the rewards of a prompt's group of responses to their advantages. Host side, numpy.

`reward` holds one number per response, groups along the last axis. `scored` is false where the
verifier itself failed (status ERROR); the reward found there is never looked at.
"""

import numpy as np
from jaxtyping import Bool, Float

Reward = Float[np.ndarray, "... G"]
Flag = Bool[np.ndarray, "... G"]

STD_EPS = 1e-6  # added to the standard deviation


def group_advantage(reward: Reward, scored: Flag) -> Reward:
    """Rewards relative to their group: (r - mean) / (std + STD_EPS), std with ddof = 1.

    Mean and standard deviation are taken over the scored responses of the group. A response that
    is not scored gets 0, and so does one that is the only scored one of its group.
    GRPO, DeepSeekMath (arXiv 2402.03300); ProRL (arXiv 2505.24864) Eq. 2.

    Args:
        reward: shaped reward, [..., G].
        scored: [..., G].
    """
    count = scored.sum(axis=-1, keepdims=True)
    mean = np.where(scored, reward, 0.0).sum(axis=-1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(scored, reward, mean) - mean  # 0 for a group of one
    variance = np.square(centred).sum(axis=-1, keepdims=True) / np.maximum(count - 1, 1)
    return centred / (np.sqrt(variance) + STD_EPS)


def is_dead(raw_reward: Reward, scored: Flag) -> Bool[np.ndarray, "..."] | np.bool_:
    """Whether a group teaches nothing: its scored rewards are all equal, or fewer than two.

    Such groups are dropped whole and others sampled in their place (dynamic sampling, DAPO
    Eq. 11), generalised to rewards between 0 and 1. The comparison is exact and must see the raw
    reward: shaping would make a uniform group look alive.

    Args:
        raw_reward: as the verifier gave it, in [0, 1], [..., G].
        scored: [..., G].

    Returns:
        One flag per group.
    """
    highest = np.where(scored, raw_reward, -np.inf).max(axis=-1)
    lowest = np.where(scored, raw_reward, np.inf).min(axis=-1)
    return highest <= lowest


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
