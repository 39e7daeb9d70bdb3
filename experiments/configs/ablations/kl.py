"""Where a KL term slows learning down, does a reset restore progress?

Claim: in time the KL term dominates the loss, and a hard reset of reference and optimizer restores
progress (arXiv 2505.24864, section 2.3.1). The coefficient 1 is far too strong on purpose: it makes
the plateau certain.
"""

from experiments.configs.ablations.base import RESETS, get_config

__all__ = ["get_config"]

TITLE = "KL term and resets, at the steady learning rate"
VARIANTS = {
    "0": {},
    "1": {"loss.kl_coef": 1.0},
    "1, resets": {"loss.kl_coef": 1.0, **RESETS},
    "1e-2": {"loss.kl_coef": 1e-2},
    "1e-2, resets": {"loss.kl_coef": 1e-2, **RESETS},
    "1e-3": {"loss.kl_coef": 1e-3},
    "1e-3, resets": {"loss.kl_coef": 1e-3, **RESETS},
    "1e-4": {"loss.kl_coef": 1e-4},
    "1e-4, resets": {"loss.kl_coef": 1e-4, **RESETS},
    "0, resets": {**RESETS},
}
SEEN = ""
