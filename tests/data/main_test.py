"""The command that looks at data, end to end: real files, real tokenizer, real pool."""

import json

import pytest

from prolong_jax.data.__main__ import main

ONE_DOMAIN = "--config.stages.0.mixture={'math': 1.0}"


def test_a_small_file_is_described_and_its_faults_are_found(tmp_path, capsys):
    rows = [{"problem": f"What is {i} + {i}? ü", "answer": str(2 * i)} for i in range(20)]
    rows += [{"problem": "x", "answer": None}, {"problem": "1 " * 3000, "answer": "1"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert main([f"--path={path}", "--golds=5"]) == 0
    said = capsys.readouterr().out
    assert "=== rows.json: 22 rows, 20 prompts" in said
    assert "skipped 1: no answer; the first: rows.json:21" in said
    assert "skipped 1: prompt too long" in said
    assert said.count("[user] What is") == 3 and "ü" in said and "boxed{}" in said
    assert "gold answers: 5 scored, 0 faults, 0 rows have none" in said
    numbers = said.split("prompt tokens: median ")[1].split()
    assert 10 < int(numbers[0].strip(",")) < 200

    tests = json.dumps({"inputs": ["1"], "outputs": ["1"]})
    row = {"question": "Echo.", "input_output": tests, "solutions": json.dumps(["print(2)"])}
    right = {**row, "solutions": json.dumps(["print(input())"])}
    path.write_text(json.dumps([row, right, {**row, "solutions": "[]"}]))
    assert main([f"--path={path}", "--golds=5"]) == 1
    said = capsys.readouterr().out
    assert "gold answers: 2 scored, 1 faults, 1 rows have none" in said
    assert "rows.json/0: gold scores 0 (ok: 0 of 1 tests)" in said

    assert main([f"--path={path}", "--strict", "--only=math"]) == 1, "nothing is left"
    assert main([f"--path={tmp_path}/nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


OWN = """
from prolong_jax.verifiers import Verdict

EXAMPLE = ("12345", {"length": 5})


def verify(response, reference):
    return Verdict(float(len(response) == reference["length"]))
"""


def test_rows_for_a_verifier_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_length.py").write_text(OWN)
    (tmp_path / "by_bool.py").write_text(OWN.replace("Verdict(float(", "((").replace("5})", "6})"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Five letters.", "reference": {"length": 5}}\n')
    assert main([f"--path={path}", "--verifier=by_length", "--domain=logic"]) == 0
    said = capsys.readouterr().out
    assert "1 rows, 1 prompts" in said and "rows.jsonl/0 (logic, rows.jsonl)" in said
    assert "0 scored, 0 faults, 1 rows have none" in said
    assert main([f"--path={path}", "--verifier=by_bool"]) == 2
    assert "by_bool: TypeError: verify: expected a Verdict, got False" in capsys.readouterr().err
    assert main([f"--path={path}", "--verifier=by_nothing"]) == 2
    assert "a module on the Python path, got 'by_nothing'" in capsys.readouterr().err
    config = ["--config=experiments/configs/tiny.py"]
    config += [f"--config.data.sources.rows.{k}" for k in (f"path={path}", "verifier=by_bool")]
    assert main(config) == 2
    assert "by_bool: TypeError" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--config=experiments/configs/tiny.py", "--verifier=by_length"])


def test_strict_stops_at_the_first_bad_row(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "x", "answer": "1"}\n{"problem": "x", "answer": null}\n')
    assert main([f"--path={path}", "--strict"]) == 2
    assert "row rows.jsonl:2" in capsys.readouterr().err


def test_the_embedded_tasks_of_a_configuration(capsys):
    assert main(["--config=experiments/configs/tiny.py", "--golds=9", ONE_DOMAIN]) == 0
    said = capsys.readouterr().out
    assert "=== embedded: 500 rows, 500 prompts" in said and " 0 faults" in said
