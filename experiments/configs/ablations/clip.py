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
SEEN = ""
