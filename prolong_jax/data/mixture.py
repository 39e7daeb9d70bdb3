"""Which prompt comes next: a pure function of (seed, position), resumable by the position alone."""

import random
from collections.abc import Mapping

from prolong_jax.data.procedural import make_prompt
from prolong_jax.data.prompts import Prompt


def prompt_at(
    position: int, seed: int, mixture: Mapping[str, float], levels: Mapping[str, float]
) -> Prompt:
    """The training prompt at a position of the endless stream.

    Args:
      position: how many prompts were drawn before.
      seed: of the run.
      mixture: weight of each domain.
      levels: weight of each difficulty level.
    """
    rng = random.Random(f"mixture/{seed}/{position}")
    domain = rng.choices(list(mixture), list(mixture.values()))[0]
    level = rng.choices(list(levels), list(levels.values()))[0]
    return make_prompt(domain, level, "train", seed, position)
