"""The evaluation sets of ProRL (arXiv 2505.24864, section 3.4): where they come from, how to read
them. Nothing is downloaded: the user puts the files into one directory, by the names below.

The paper's protocol: 16 samples per prompt at temperature 0.6 and top-p 0.95; math, code and STEM
count as right or wrong, logic and instruction following by their continuous reward.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from prolong_jax.config import SourceSettings, ValidationSettings
from prolong_jax.data.prompts import Prompt, Skipped
from prolong_jax.data.readers import EXTENSIONS, find, read

_PRIME = "PRIME-RL/Eurus-2-RL-Data, validation.parquet"
_GYM = "(python -m prolong_jax.data.reasoning_gym --out DIRECTORY/reasoning_gym makes it)"
_VALIDATION = "eurus_validation"

# name: domain; file or directory, without extension; where to get it: the name on the Hugging Face
# hub. Several sets may stand in one file; then the data_source of the rows is the name of the set.
EVALUATION_SETS = {
    "aime24": ("math", "aime24", "HuggingFaceH4/aime_2024"),
    "aime25": ("math", "aime25", "math-ai/aime25"),
    "amc": ("math", "amc", "AI-MO/aimo-validation-amc"),
    "math": ("math", "math", "HuggingFaceH4/MATH-500"),
    "minerva": ("math", "minerva", "math-ai/minervamath"),
    "olympiad_bench": ("math", "olympiad_bench", "Hothan/OlympiadBench, OE_TO_maths_en_COMP"),
    "apps": ("code", _VALIDATION, _PRIME),
    "codecontests": ("code", _VALIDATION, _PRIME),
    "codeforces": ("code", _VALIDATION, _PRIME),
    "taco": ("code", _VALIDATION, _PRIME),
    "humaneval_plus": ("code", "humaneval_plus", "evalplus/humanevalplus"),
    "live_code_bench": ("code", "live_code_bench", "livecodebench/code_generation_lite"),
    "gpqa_diamond": ("stem", "gpqa_diamond", "Idavidrein/gpqa, gpqa_diamond.csv"),
    "ifeval": ("instruct", "ifeval", "google/IFEval"),
    "reasoning_gym_test": ("logic", "reasoning_gym/test", _GYM),
    "reasoning_gym_ood": ("logic", "reasoning_gym/ood", _GYM),
}

# pass@1 or mean reward in percent by that paper's tables 1 to 3: of DeepSeek-R1-Distill-Qwen-1.5B,
# and of Nemotron-Research-Reasoning-Qwen-1.5B, which was trained from it. Of reasoning_gym_ood: by
# task. Of gpqa_diamond the paper took a subset, and of live_code_bench an unnamed release.
PUBLISHED = {
    "math": {
        "aime24": (28.54, 48.13),
        "aime25": (22.71, 33.33),
        "amc": (62.58, 79.29),
        "math": (82.90, 91.89),
        "minerva": (26.38, 47.98),
        "olympiad_bench": (43.58, 60.22),
    },
    "code": {
        "apps": (20.95, 41.99),
        "codecontests": (16.79, 31.80),
        "codeforces": (14.13, 34.50),
        "taco": (8.03, 20.81),
        "humaneval_plus": (61.77, 72.05),
        "live_code_bench": (16.80, 23.81),
    },
    "STEM, instructions, logic": {
        "gpqa_diamond": (15.86, 41.78),
        "ifeval": (44.05, 66.02),
        "reasoning_gym_test": (4.24, 59.06),
        "reasoning_gym_ood/acre": (5.99, 58.57),
        "reasoning_gym_ood/boxnet": (0.00, 7.91),
        "reasoning_gym_ood/game_of_life_halting": (3.49, 52.29),
    },
}


def held_out(settings: ValidationSettings) -> list[Prompt]:
    """The prompts of the validation's own sets and sources: the same for every policy.

    Their `source` is the name of the set, and their ids begin with it.

    Raises:
      ValueError: what `read` refuses, a set without prompts, or two prompts of one id.
    """
    items = {name: read_evaluation_set(name, settings.directory) for name in settings.sets}
    items |= {name: read(name, source) for name, source in settings.sources.items()}
    found: dict[str, Prompt] = {}
    for name, rows in items.items():
        prompts = [item for item in rows if isinstance(item, Prompt)]
        if not prompts:
            raise ValueError(
                f"validation: {name!r} has no usable prompt; python -m prolong_jax.data says why."
            )
        if 0 < settings.prompts_per_set < len(prompts):
            rng = random.Random(f"validation/{settings.seed}/{name}")
            prompts = rng.sample(prompts, settings.prompts_per_set)
        for prompt in prompts:
            identity = f"{name}/{prompt.id.removeprefix(f'{name}/')}"
            if identity in found:
                raise ValueError(
                    f"validation: {name!r} has two prompts with the id {prompt.id!r}; ids seed "
                    "the samples, so mend them."
                )
            found[identity] = replace(prompt, id=identity, source=name)
    return list(found.values())


def read_evaluation_set(name: str, directory: str) -> Iterator[Prompt | Skipped]:
    """The prompts of an evaluation set from the user's directory, local or remote.

    Raises:
      ValueError: an unknown set, or its file is missing: says which, and where to get it.
    """
    if name not in EVALUATION_SETS:
        raise ValueError(f"evaluation: expected one of {', '.join(EVALUATION_SETS)}, got {name!r}.")
    domain, file, origin = EVALUATION_SETS[name]
    place = f"{directory.rstrip('/')}/{file}"
    endings = ["", *EXTENSIONS, *(f"{extension}.gz" for extension in EXTENSIONS)]
    path = next((place + ending for ending in endings if find(place + ending)), None)
    if path is None:
        raise ValueError(
            f"evaluation: expected the set {name!r} at {place}.parquet, .json, .jsonl or .csv, "
            f"found none; get {origin}."
        )
    only = name if file == _VALIDATION else ""
    yield from read(name, SourceSettings(path, only=only, domain=domain))
