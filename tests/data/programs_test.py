"""Programming problems: the real schemas, the packed private tests, and solutions that must pass."""

import base64
import json
import os
import pickle
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from prolong_jax.config import SourceSettings
from prolong_jax.data.programs import unpack_tests
from prolong_jax.data.prompts import BadRow, Prompt, Skipped
from prolong_jax.data.readers import read
from prolong_jax.verifiers import code


def read_one(tmp_path: Path, row: dict[str, Any]) -> Prompt | Skipped:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    (item,) = read("src", SourceSettings(str(path)))
    return item


def good(tmp_path: Path, row: dict[str, Any]) -> Prompt:
    item = read_one(tmp_path, row)
    assert isinstance(item, Prompt), item
    assert item.messages[0]["content"].endswith(code.PROMPT_SUFFIX)
    return item


def solved(prompt: Prompt, program: str) -> float:
    return code.verify(f"</think>```python\n{program}\n```", prompt.reference).score


TACO = {
    "question": "Print the sum.",
    "solutions": json.dumps(["print(sum(map(int, input().split())))"]),
    "starter_code": "",
    "input_output": json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}),
    "difficulty": "EASY",
    "raw_tags": "['math']",
    "skill_types": "[]",
    "time_limit": "1.0 seconds",
    "picture_num": None,
}


def test_taco_and_apps(tmp_path):
    prompt = good(tmp_path, TACO)
    assert prompt.source == "taco" and solved(prompt, prompt.solution) == 1.0
    assert "standard input" in prompt.messages[0]["content"]
    calls = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}
    apps = {
        "problem_id": 7,
        "question": "Add.",
        "solutions": "",
        "input_output": json.dumps(calls),
        "difficulty": "interview",
        "url": "",
        "starter_code": "class Solution:\n    def add(self, a, b):\n",
    }
    prompt = good(tmp_path, apps)
    told = prompt.messages[0]["content"]
    assert "def add(self" in told and "standard input" not in told and prompt.solution == ""
    assert (prompt.source, solved(prompt, "def add(a, b): return a + b")) == ("apps", 1.0)
    for wrong, reason in (
        ({"input_output": ""}, "no tests"),
        ({"input_output": "{'inputs'"}, "unreadable tests"),
        ({"solutions": "[print("}, "unreadable solutions"),
        ({"question": None}, "no prompt"),
        ({"special_judge": True}, "needs a special judge"),
    ):
        item = read_one(tmp_path, {**TACO, **wrong})
        assert isinstance(item, Skipped) and item.reason == reason


def test_code_contests(tmp_path):
    row = {
        "name": "1_A. Sum",
        "description": "Print the sum.",
        "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["5 5\n"], "output": ["10\n"]},
        "source": 2,
        "difficulty": 7,
        "solutions": {
            "language": [2, 3],
            "solution": ["int main", "print(sum(map(int, input().split())))"],
        },
        "input_file": "",
        "time_limit": {"seconds": 1, "nanos": 0},
    }
    prompt = good(tmp_path, row)
    assert prompt.reference == {"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]}
    assert solved(prompt, prompt.solution) == 1.0
    item = read_one(tmp_path, {**row, "input_file": "input.txt"})
    assert isinstance(item, Skipped) and item.reason == "tests through files"
    empty = {"input": None, "output": None}
    none = {**row, "public_tests": empty, "generated_tests": None}
    item = read_one(tmp_path, none)
    assert isinstance(item, Skipped) and item.reason == "no tests"


def pack(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def lcb(private: str, **changes: Any) -> dict[str, Any]:
    test = {"input": "1\n[2, 3]", "output": "[3, 4]", "testtype": "functional"}
    return {
        "question_title": "add",
        "question_content": "Add a to all.",
        "platform": "leetcode",
        "question_id": "3233",
        "contest_date": "2024-08-01T00:00:00",
        "starter_code": "class Solution:\n    def add(self, a, b):\n        ",
        "difficulty": "easy",
        "public_test_cases": json.dumps([test]),
        "private_test_cases": private,
        "metadata": json.dumps({"func_name": "add"}),
    } | changes


def test_live_code_bench(tmp_path):
    private = json.dumps([{"input": "0\n[]", "output": "[]", "testtype": "functional"}])
    program = "class Solution:\n    def add(self, a, b): return [a + x for x in b]"
    for packed in (private, pack(private)):
        prompt = good(tmp_path, lcb(packed))
        assert prompt.reference["inputs"] == [[1, [2, 3]], [0, []]]
        assert solved(prompt, program) == 1.0
    stdin = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
    changes = {"public_test_cases": json.dumps(stdin), "starter_code": "", "metadata": "{}"}
    prompt = good(tmp_path, lcb(pack(json.dumps(stdin * 3)), **changes))
    assert len(prompt.reference["inputs"]) == 4 and "fn_name" not in prompt.reference
    for private, changes in (("", {"metadata": "{}"}), (pack("[1, 2]"), {}), (pack("{}"), {})):
        assert isinstance(read_one(tmp_path, lcb(private, **changes)), Skipped)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_a_malicious_pickle_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists(), "the trap must work where nothing stops it"
    marker.unlink()
    item = read_one(tmp_path, lcb(pack(Malicious(marker))))
    assert isinstance(item, Skipped) and item.reason == "unreadable tests"
    assert "refused to load" in item.detail and not marker.exists()


def test_broken_packages_are_bad_rows():
    sound = base64.b64decode(pack("[]"))
    packages = [b"", b"x", sound[:-4], zlib.compress(b"junk"), zlib.compress(b"\x80\x04.")]
    packages += [zlib.compress(pickle.dumps(value)) for value in (7, ["[]"], {"a": 1}, None)]
    for package in packages:
        with pytest.raises(BadRow, match="unreadable tests"):
            unpack_tests(base64.b64encode(package).decode())
    with pytest.raises(BadRow, match="unreadable tests"):
        unpack_tests("no base64 ✗")


def test_a_compression_bomb_is_cut_off(monkeypatch):
    monkeypatch.setattr("prolong_jax.data.programs.MAX_TEST_BYTES", 1000)
    with pytest.raises(BadRow):
        unpack_tests(pack("[" + " " * 10_000_000 + "]"))
    start = time.monotonic()
    assert unpack_tests(pack("[]")) == "[]" and time.monotonic() - start < 1


def test_asserts_become_references(tmp_path):
    row = {
        "task_id": "HumanEval/0",
        "prompt": 'def inc(x):\n    """Adds one."""\n',
        "entry_point": "inc",
        "canonical_solution": "    return x + 1\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(0) == 1\n",
    }
    prompt = good(tmp_path, row)
    assert solved(prompt, prompt.solution) == 1.0 and solved(prompt, "def inc(x): return 2") == 0.5
    sums = {
        "text": "Add two numbers.",
        "code": "def add(a, b):\r\n    return a + b",
        "task_id": 1,
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3"],
        "challenge_test_list": [],
    }
    prompt = good(tmp_path, sums)
    assert "assert add(1, 2)" in prompt.messages[0]["content"]
    assert solved(prompt, prompt.solution) == 1.0
    for bad in ({**row, "test": None}, {**row, "test": "def ("}, {**sums, "test_list": []}):
        assert isinstance(read_one(tmp_path, bad), Skipped)
