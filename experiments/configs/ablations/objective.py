"""Is the objective of the second version better than that of the first?

Claim: REINFORCE++ with the group's mean as baseline, k2 and a length penalty in cycles carried ProRL
beyond 3,000 steps (ProRL v2, authors' post of August 2025). The presets prorl_v1 and prorl_v2 at the
sizes of the other ablations; resets are those of a run, and there are none here.
"""

from experiments.configs.ablations.base import settings


def get_config():
    config = settings()
    del config["loss"]  # the presets have their own
    return config


TITLE = "Objective of ProRL v1 and v2"
SIZES = {"rollout.group_size": 8, "rollout.temperature": 1.0}  # in place of the presets' own
VARIANTS = {"v1": {"preset": "prorl_v1", **SIZES}, "v2": {"preset": "prorl_v2", **SIZES}}
SEEN = """
No difference: +0.027 [-0.031, +0.090] for the second version. Its length penalty is on in all 32 steps, since
the cycle begins with 100 of them.
"""
