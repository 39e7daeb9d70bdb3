"""Does a KL term hold a policy that runs away, and do resets undo its hold?

Claim: a KL term is a stronger and more stable remedy against collapse than clip and temperature
(arXiv 2505.24864, section 2.3.1), and a reset of reference and optimizer helps a run that degrades.
"""

from experiments.configs.ablations.base import RESETS, UNSTABLE, get_config

__all__ = ["get_config"]

TITLE = "KL term and resets, at the unstable learning rate"
VARIANTS = {
    "0": {**UNSTABLE},
    "1e-2": {**UNSTABLE, "loss.kl_coef": 1e-2},
    "1e-1": {**UNSTABLE, "loss.kl_coef": 1e-1},
    "1e-1, resets": {**UNSTABLE, "loss.kl_coef": 1e-1, **RESETS},
    "0, resets": {**UNSTABLE, **RESETS},
}
SEEN = """
No coefficient improves on none beyond the interval, although the KL to the reference falls with it (1.0,
0.52 and 0.16 nats per token). Resets make it worse (1e-1: -0.128 [-0.200, -0.053] against the same without
them): they make a policy that has gone astray the new reference. The claim is not seen here.
"""
