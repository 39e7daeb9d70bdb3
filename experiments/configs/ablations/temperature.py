"""Does sampling at a higher temperature learn better?

Claim: 1.2 ends above 0.6 and prevents mode collapse, though it may begin less stable (arXiv
2507.12507 by secondary sources); it delays the collapse alone (arXiv 2505.24864, section 2.2.1).
Validation is by the rule of the paper, temperature 0.6 and top-p 0.95, for both.
"""

from experiments.configs.ablations.base import settings


def get_config():
    return settings(validation={"temperature": 0.6, "top_p": 0.95})


TITLE = "Rollout temperature 0.6 and 1.2"
VARIANTS = {"1.2": {"rollout.temperature": 1.2}, "0.6": {"rollout.temperature": 0.6}}
SEEN = """
No difference in held-out score. At 0.6 the entropy is lower (0.078 against 0.107, without an interval), and
more groups have equal rewards, so that 39% more tokens are generated for fewer responses to train on. Neither collapses
within 32 steps.
"""
