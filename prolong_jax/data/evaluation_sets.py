"""The evaluation sets of ProRL (arXiv 2505.24864, section 3.4): where they come from, how to read
them. Nothing is downloaded: the user puts the files into one directory, by the names below.

The paper's protocol: 16 samples per prompt at temperature 0.6 and top-p 0.95; math, code and STEM
count as right or wrong, logic and instruction following by their continuous reward.
"""

from collections.abc import Iterator

from prolong_jax.config import SourceSettings
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
