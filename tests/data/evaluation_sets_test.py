"""Evaluation sets are found in the user's directory, and a missing one is named with its origin."""

import json

import pytest

from prolong_jax.data.evaluation_sets import EVALUATION_SETS, read_evaluation_set
from prolong_jax.data.prompts import Prompt, Skipped

# One row of each set as its public files have it.
PRIME = {
    "data_source": "apps",
    "prompt": [{"role": "user", "content": "Print 1."}],
    "ability": "code",
    "reward_model": {"ground_truth": json.dumps({"inputs": [""], "outputs": ["1"]})},
}
TEST = [{"input": "", "output": "1", "testtype": "stdin"}]
ENTRY = {"question": "1 + 1 =", "answer": "2", "metadata": {}}
LOGIC = {
    "domain": "logic",
    "prompt": "1 + 1 =",
    "reference": {"task": "chain_sum", "entry": ENTRY},
}
ROWS = {
    "aime24": {"id": 60, "problem": "p", "solution": "s", "answer": "204", "year": "2024"},
    "aime25": {"question": "p", "answer": "70"},
    "amc": {"id": 0, "problem": "p", "answer": 142.0, "url": ""},
    "math": {"problem": "p", "solution": "s", "answer": "p - q", "level": 5, "unique_id": "x"},
    "minerva": {"question": "p", "answer": "4.5e33"},
    "olympiad_bench": {"question": "p", "final_answer": ["$2$"], "is_multiple_answer": False},
    "eurus_validation": PRIME,
    "humaneval_plus": {
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(c):\n    assert c() == 1\n",
    },
    "live_code_bench": {
        "question_content": "Print 1.",
        "public_test_cases": json.dumps(TEST),
        "private_test_cases": "[]",
        "metadata": "{}",
    },
    "gpqa_diamond": {"Question": "Why?", "Correct Answer": "a"}
    | {f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)},
    "ifeval": {
        "key": 1,
        "prompt": "Say.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    "reasoning_gym/test": LOGIC,
    "reasoning_gym/ood": LOGIC,
}


def test_every_set_of_the_paper_is_read(tmp_path):
    (tmp_path / "reasoning_gym").mkdir()
    for name, row in ROWS.items():
        others = [{**PRIME, "data_source": s} for s in ("codecontests", "codeforces", "taco")]
        others += [{**PRIME, "data_source": "numina_aops", "ability": "math"}]
        rows = [row, *others] if row is PRIME else [row]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, (domain, _, _) in EVALUATION_SETS.items():
        found = list(read_evaluation_set(name, f"{tmp_path}/"))
        prompts = [item for item in found if isinstance(item, Prompt)]
        assert [p.domain for p in prompts] == [domain], (name, found)
        assert not any(isinstance(item, Skipped) and item.is_bad for item in found)
        assert all(p.id.startswith(f"{name}/") for p in prompts)


def test_a_missing_set_is_named_with_its_origin(tmp_path):
    with pytest.raises(ValueError, match="'taco' at .*/eurus_validation.parquet.*PRIME-RL/Eurus"):
        list(read_evaluation_set("taco", str(tmp_path)))
    with pytest.raises(ValueError, match="expected one of aime24"):
        list(read_evaluation_set("aime26", str(tmp_path)))
