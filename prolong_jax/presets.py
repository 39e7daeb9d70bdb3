"""Published recipes by name, as settings of loss, advantage, shaping and dynamic sampling.

Each names every setting of the loss and the advantage. Numbers marked "ours" are not published.
Resets, sizes and learning rates belong to a run, not to its objective: experiments/configs has those.
"""

from typing import Any

# PPO's clip 0.2, per token, no KL, no correction of the sampler.
_PLAIN: dict[str, Any] = {
    "policy_loss": "ppo_clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 3.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "kl_in": "loss",
    "correction": "none",
    "is_low": 0.0,
    "is_high": 2.0,
    "aggregation": "token_mean",
    "token_constant": 0.0,
    "entropy_coef": 0.0,
    "entropy_target": 0.0,
    "entropy_step": 0.005,
}
_GROUP = {"estimator": "group", "correct_boost": 1.0}
_OFF, _ON = {"dynamic_sampling": False}, {"dynamic_sampling": True}
# 4,096 of 20,480 tokens. At most half of what separates right from wrong: DAPO pays 1 and -1 where
# the rewards here are 1 and 0.
_OVERLONG = {"overlong_buffer": 0.2, "overlong_coef": 0.5}

# REINFORCE++ baseline, k2, no reward for responses that do not end, a length penalty on in 100 of
# 600 steps. From the authors' post of August 2025; the window of the correction is that of
# OpenRLHF and NeMo-RL; the KL coefficient is theirs; size and ends of the length penalty are ours.
_PRORL_V2: dict[str, Any] = {
    "loss": _PLAIN
    | {"clip_high": 0.28, "kl_coef": 1e-4, "kl_estimator": "k2"}
    | {"correction": "icepop", "is_low": 0.5, "is_high": 5.0},
    "advantage": {"estimator": "group_mean_batch", "correct_boost": 1.0},
    "rollout": {"dynamic_sampling": True, "group_size": 16},
    "shaping": {"stop_properly": 0.0, "length_coef": 0.1, "length_min": -1.0, "length_max": 0.0}
    | {"length_on": 100, "length_off": 500},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # DeepSeekMath (arXiv 2402.03300) Eq. 3 and 4, section 4.2; it gives no clip.
    "grpo": {
        "loss": _PLAIN | {"kl_coef": 0.04, "aggregation": "seq_mean_token_mean"},
        "advantage": _GROUP,
        "rollout": _OFF,
    },
    # DAPO (arXiv 2503.14476) Eq. 8 to 13.
    "dapo": {
        "loss": _PLAIN | {"clip_high": 0.28},
        "advantage": _GROUP,
        "rollout": _ON,
        "shaping": _OVERLONG,
    },
    # Dr. GRPO (arXiv 2503.20783); the constant is the longest response allowed.
    "dr_grpo": {
        "loss": _PLAIN | {"aggregation": "token_sum_over_constant"},
        "advantage": _GROUP | {"estimator": "group_mean"},
        "rollout": _OFF,
    },
    # GSPO (arXiv 2507.18071) Eq. 5 to 7, section 5.1.
    "gspo": {
        "loss": _PLAIN
        | {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
        | {"aggregation": "seq_mean_token_mean"},
        "advantage": _GROUP,
        "rollout": _OFF,
    },
    # MiniMax-M1 (arXiv 2506.13585) Eq. 4 to 7, with DAPO's sampling and length penalty. The cap of
    # the weight, here 5, is ours: the paper does not disclose it.
    "cispo": {
        "loss": _PLAIN | {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
        "advantage": _GROUP,
        "rollout": _ON,
        "shaping": _OVERLONG,
    },
    # REINFORCE++ (arXiv 2501.03262) with the group's mean as baseline. The KL coefficient is ours.
    "reinforce_pp_baseline": {
        "loss": _PLAIN | {"kl_coef": 1e-4, "kl_estimator": "k2"},
        "advantage": _GROUP | {"estimator": "group_mean_batch"},
        "rollout": _OFF,
    },
    # ProRL (arXiv 2505.24864) section 3.2. The KL coefficient is from a secondary source; estimator,
    # aggregation and the correction of the sampler are ours.
    "prorl_v1": {
        "loss": _PLAIN | {"clip_high": 0.4, "kl_coef": 1e-4, "correction": "tis"},
        "advantage": _GROUP,
        "rollout": {"dynamic_sampling": True, "group_size": 16, "temperature": 1.2},
    },
    "prorl_v2": _PRORL_V2,
    # BroRL (arXiv 2510.01180): v2 with many more responses to fewer prompts.
    "brorl": _PRORL_V2 | {"rollout": _ON | {"group_size": 512, "prompts_per_step": 128}},
}
