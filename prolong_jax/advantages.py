"""From the rewards of a prompt's group of responses to their advantages. Host side, numpy.

`reward` holds one number per response, groups along the last axis. `scored` is false where the
verifier itself failed (status ERROR); the reward found there is never looked at.
"""

import numpy as np
from jaxtyping import Bool, Float

Reward = Float[np.ndarray, "... G"]
Flag = Bool[np.ndarray, "... G"]

STD_EPS = 1e-6  # added to the standard deviation


def _centred(reward: Reward, scored: Flag, axis: int | None = -1) -> Reward:
    """Rewards minus their mean over the scored ones; 0 where not scored."""
    count = scored.sum(axis=axis, keepdims=True)
    mean = np.where(scored, reward, 0.0).sum(axis=axis, keepdims=True) / np.maximum(count, 1)
    return np.where(scored, reward, mean) - mean


def _scaled(centred: Reward, scored: Flag, axis: int | None = -1) -> Reward:
    """Centred rewards over their standard deviation."""
    degrees = np.maximum(scored.sum(axis=axis, keepdims=True) - 1, 1)
    variance = np.square(centred).sum(axis=axis, keepdims=True) / degrees
    return centred / (np.sqrt(variance) + STD_EPS)


def group_advantage(reward: Reward, scored: Flag) -> Reward:
    """Rewards relative to their group: (r - mean) / (std + STD_EPS), std with ddof = 1.

    Mean and standard deviation are taken over the scored responses of the group. A response that
    is not scored gets 0, and so does one that is the only scored one of its group; so it is with
    all of these. GRPO, DeepSeekMath (arXiv 2402.03300); ProRL (arXiv 2505.24864) Eq. 2.

    Args:
        reward: shaped reward, [..., G].
        scored: [..., G].
    """
    return _scaled(_centred(reward, scored), scored)


def group_mean_advantage(reward: Reward, scored: Flag) -> Reward:
    """r - mean of the group. Dr. GRPO (arXiv 2503.20783)."""
    return _centred(reward, scored)


def leave_one_out_advantage(reward: Reward, scored: Flag) -> Reward:
    """r - mean of the others of the group = n / (n - 1) * (r - mean). RLOO (arXiv 2402.14740)."""
    count = scored.sum(axis=-1, keepdims=True)
    return _centred(reward, scored) * count / np.maximum(count - 1, 1)


def batch_advantage(reward: Reward, scored: Flag) -> Reward:
    """(r - mean) / (std + STD_EPS) over all responses. REINFORCE++ (arXiv 2501.03262)."""
    return _scaled(_centred(reward, scored, axis=None), scored, axis=None)


def group_mean_batch_advantage(reward: Reward, scored: Flag) -> Reward:
    """`batch_advantage` of r - mean of the group: REINFORCE++ with baseline; ProRL v2.

    Over responses, as the formula; OpenRLHF, NeMo-RL and verl weigh each by its tokens.
    """
    return batch_advantage(_centred(reward, scored), scored)


ESTIMATORS = {
    "group": group_advantage,
    "group_mean": group_mean_advantage,
    "leave_one_out": leave_one_out_advantage,
    "batch": batch_advantage,
    "group_mean_batch": group_mean_batch_advantage,
}


def boost_correct(advantage: Reward, raw_reward: Reward, *, factor: float) -> Reward:
    """Advantages of responses with full reward times `factor`, where they are positive. Ours."""
    return np.where((raw_reward == 1.0) & (advantage > 0), factor, 1.0) * advantage


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
