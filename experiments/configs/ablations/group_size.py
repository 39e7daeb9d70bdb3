"""Fewer prompts with more responses each, at equal samples?

Claim: 512 responses to each of 128 prompts go on improving where 16 to each of 512 stall (BroRL,
arXiv 2510.01180). Here the range is 4 to 16, with two optimizer steps for every 32 samples.
"""

from experiments.configs.ablations.base import settings


def get_config():
    return settings(update={"num_minibatches": 2})


TITLE = "Group size at equal samples"
VARIANTS = {
    "16": {"rollout.group_size": 16, "rollout.prompts_per_step": 2},
    "4": {"rollout.group_size": 4, "rollout.prompts_per_step": 8},
}
SEEN = """
The other way round: groups of 4 end 0.146 [0.088, 0.208] above groups of 16. At equal samples they see four
times as many prompts (256 against 64), which at this length matters more than the estimate of a prompt's mean. The range is
far from that of the claim, whose runs see every prompt many times.
"""
