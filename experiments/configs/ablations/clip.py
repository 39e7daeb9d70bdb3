"""Does a wider upper clip keep the policy exploring?

Claim: clip 0.2/0.4 keeps the entropy up, puts off its collapse, and validates best (arXiv 2505.24864,
section 2.3, and 2507.12507 by secondary sources).
"""

from experiments.configs.ablations.base import UNSTABLE, get_config

__all__ = ["get_config"]

TITLE = "Clip 0.2/0.2, 0.2/0.28 and 0.2/0.4, at the unstable learning rate"
VARIANTS = {
    "0.2/0.4": {**UNSTABLE},
    "0.2/0.28": {**UNSTABLE, "loss.clip_high": 0.28},
    "0.2/0.2": {**UNSTABLE, "loss.clip_high": 0.2},
}
SEEN = """
No difference in held-out score: the intervals of the differences reach from -0.12 to +0.14, at a rate at
which no variant ends above the base (0.33). The entropy of the last ten steps is ordered as the claim
says, 0.127, 0.100 and 0.075 from the widest clip to the narrowest, without an interval. The bound touches
few tokens; the learning rate, not the clip, is what goes wrong here.
"""
