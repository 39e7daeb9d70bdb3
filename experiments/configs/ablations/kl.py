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
SEEN = """
The stagnation is real: with a coefficient of 1 a run gains half of what it gains without (-0.148 [-0.207,
-0.084]). Resets restore most of that: +0.100 [+0.044, +0.158] over the same coefficient without them. This is the
paper's mechanism. From 1e-4 to 1e-2 the KL term costs nothing that can be told from noise, and there is no plateau; then
resets every 8 steps cost score (1e-3: -0.086 [-0.152, -0.024] against the same without), perhaps because they restart
Adam's moments each time; not so at 1e-4 and 1e-2, where the interval holds 0. A reset pays where the reference holds the policy back, and is not free elsewhere.
"""
