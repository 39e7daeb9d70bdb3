"""The evaluation sets of ProRL (arXiv 2505.24864, section 3.4): where they come from, how to read
them. Nothing is downloaded: the user puts the files into one directory, by the names below.

The paper's protocol: 16 samples per prompt at temperature 0.6 and top-p 0.95; math, code and STEM
count as right or wrong, logic and instruction following by their continuous reward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from prolong_jax.data.prompts import Prompt, Skipped
from prolong_jax.data.readers import EXTENSIONS, SourceSettings, find, read

_OURS = "made by: python -m prolong_jax.data.reasoning_gym --out DIRECTORY/reasoning_gym"
_PRIME = "eurus_validation", "PRIME-RL/Eurus-2-RL-Data, validation.parquet"


@dataclass(frozen=True)
class EvaluationSet:
    domain: str
    file: str  # or directory, in the user's directory, without extension
    origin: str  # public name of the data set, on the Hugging Face hub where nothing else is said
    only: str = ""  # data_source of the rows that belong to it


EVALUATION_SETS = {
    "aime24": EvaluationSet("math", "aime24", "HuggingFaceH4/aime_2024"),
    "aime25": EvaluationSet("math", "aime25", "math-ai/aime25"),
    "amc": EvaluationSet("math", "amc", "AI-MO/aimo-validation-amc"),
    "math": EvaluationSet("math", "math", "HuggingFaceH4/MATH-500"),
    "minerva": EvaluationSet("math", "minerva", "math-ai/minervamath"),
    "olympiad_bench": EvaluationSet(
        "math", "olympiad_bench", "Hothan/OlympiadBench, OE_TO_maths_en_COMP"
    ),
    "apps": EvaluationSet("code", *_PRIME, "apps"),
    "codecontests": EvaluationSet("code", *_PRIME, "codecontests"),
    "codeforces": EvaluationSet("code", *_PRIME, "codeforces"),
    "taco": EvaluationSet("code", *_PRIME, "taco"),
    "humaneval_plus": EvaluationSet("code", "humaneval_plus", "evalplus/humanevalplus"),
    "live_code_bench": EvaluationSet(
        "code", "live_code_bench", "livecodebench/code_generation_lite"
    ),
    "gpqa_diamond": EvaluationSet("stem", "gpqa_diamond", "Idavidrein/gpqa, gpqa_diamond.csv"),
    "ifeval": EvaluationSet("instruct", "ifeval", "google/IFEval"),
    "reasoning_gym_test": EvaluationSet("logic", "reasoning_gym/test", _OURS),
    "reasoning_gym_ood": EvaluationSet("logic", "reasoning_gym/ood", _OURS),
}


def read_evaluation_set(name: str, directory: str) -> Iterator[Prompt | Skipped]:
    """The prompts of an evaluation set from the user's directory, local or remote.

    Raises:
      ValueError: an unknown set, or its file is missing: says which, and where to get it.
    """
    if name not in EVALUATION_SETS:
        raise ValueError(f"evaluation: expected one of {', '.join(EVALUATION_SETS)}, got {name!r}.")
    wanted = EVALUATION_SETS[name]
    endings = ["", *EXTENSIONS, *(f"{extension}.gz" for extension in EXTENSIONS)]
    places = [f"{directory.rstrip('/')}/{wanted.file}{ending}" for ending in endings]
    path = next((place for place in places if find(place)), None)
    if path is None:
        raise ValueError(
            f"evaluation: expected the set {name!r} as {wanted.file}.parquet, .json, .jsonl or "
            f".csv in {directory!r}, found none; get {wanted.origin}."
        )
    yield from read(name, SourceSettings(path, only=wanted.only, domain=wanted.domain))
