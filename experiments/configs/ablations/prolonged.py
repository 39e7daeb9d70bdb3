"""Does a longer run solve what the base never does, or only what it rarely does?

Claim: prolonged training raises pass@1 and pass@k, and solves problems that the base does not solve
in any of its samples (arXiv 2505.24864, section 4; 256 samples there). The full recipe in one run:
clip 0.2/0.4, KL, dynamic sampling, temperature 1.2, resets of reference and optimizer. Its policy
after 20 steps is the same run, stopped early. Scored on 24 held-out prompts of the hard level.
"""

from experiments.configs.ablations.base import HERE, settings

EARLY, LAST = 20, 60


def get_config():
    return settings(
        total_steps=LAST,
        rollout={"temperature": 1.2, "max_prompt_len": 40, "max_response_len": 64},
        loss={"kl_coef": 1e-3},
        update={"row_len": 560},
        validation={
            "every": EARLY,
            "sources": {"held_out": {"path": f"{HERE}/held_out_hard.jsonl"}},
        },
        checkpoint={"every": EARLY, "keep_every": EARLY},
        stages=[
            {
                "mixture": {"math": 1.0, "stem": 1.0},
                "levels": {"easy": 1.0, "middle": 2.0, "hard": 1.0},
                "reset": {"every": EARLY},
            }
        ],
    )


TITLE = "The full recipe, prolonged and stopped early"
VARIANTS = {"full": {}}
AT = (EARLY, LAST)  # steps at which the policy is scored
SAMPLES, BASE_SAMPLES = 64, 256  # per held-out prompt
SEEN = """
Both parts of the claim are seen. pass@1 goes from 0.004 over 0.114 to 0.315, and of the 13 prompts that the base
never solved in 256 samples, 9 to 12 are solved in 64 samples after 60 steps, by every seed. The longer run gains at pass@1
to pass@16; at pass@64 the difference to its early policy is within the interval, and a few prompts that the base solved
now and then are lost. The base was never trained on the hard level, which the run is.
"""
