"""The main job end to end, on small settings of the tiny configuration."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from prolong_jax import train
from prolong_jax.checkpoint import params_sha256
from prolong_jax.config import DOMAINS, TINY_BASE, MeshSettings, VerifierSettings
from prolong_jax.groups import refuse_broken_verifiers
from prolong_jax.host import PHASES
from prolong_jax.mesh import make_mesh
from prolong_jax.metrics import VALIDATION_SETS, read_rows
from prolong_jax.models.hf import load_model
from prolong_jax.verifiers import math
from tests.rollout_test import group

TINY = "experiments/configs/tiny.py"
SMALL = {
    "total_steps": 6,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_sampling_rounds": 2,
    "rollout.cache_lens": 1,
    "update.num_minibatches": 2,
    "update.micro_batch_rows": 8,
    "update.row_len": 256,
    "validation.every": 2,
    "validation.prompts_per_level": 1,
    "validation.samples": 2,
    "validation.final_samples": 2,
    "checkpoint.every": 2,
    "verifiers.num_workers": 1,
    "stages": [
        {"name": "one", "steps": 3},
        {"name": "two", "reset_at_start": True, "reset": {"every": 2}},
    ],
}


def arguments(workdir, **changes):
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    given = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={TINY}", f"--workdir={workdir}", *given]


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def rows_without_times(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    varying = ("time", "tokens/per_s", "verify/queue_depth", "memory", "checkpoint/")
    return [{k: v for k, v in r.items() if not k.startswith(varying)} for r in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train.main(arguments(workdir)) == 0
    return workdir


def test_the_workdir_contract(whole):
    result = summary(whole)
    assert set(result) == {
        "steps", "wall_s", "rl_wall_s", "samples", "generated_tokens", "params_sha256", "resets",
        "validation", "phases_s",
    }  # fmt: skip
    assert result["steps"] == 6 and result["wall_s"] >= result["rl_wall_s"] > 0
    assert set(result["phases_s"]) == {"sample", "verify", "score", "update", "evaluate", "save"}
    assert all(seconds > 0 for seconds in result["phases_s"].values()), result["phases_s"]
    what = {"reference": "policy", "optimizer": True}
    assert result["resets"] == [
        {"step": 3, "reason": "stage", "values": {}, **what},
        {"step": 5, "reason": "schedule", "values": {"steps": 2}, **what},
    ]
    domains = {"math", "code", "stem", "logic", "instruct", "all", "easy_middle", "hard"}
    for when in ("base", "final"):
        assert set(result["validation"][when]) == domains
        for values in result["validation"][when].values():
            assert set(values) - {"maj_at_k"} == {
                "avg_at_k", "k", "ci95", "pass_at_k", "pass_at", "prompts", "len_mean",
                "terminated", "sampled_nll",
            }  # fmt: skip
            assert values["ci95"][0] <= values["avg_at_k"] <= values["ci95"][1]
        voting = {n for n, v in result["validation"][when].items() if "maj_at_k" in v}
        assert voting == {"math", "stem", "logic"}
    assert [r["step"] for r in read_rows(whole / "metrics.jsonl")] == list(range(7))
    samples = read_rows(whole / "samples.jsonl")
    assert samples and {"prompt", "response", "score", "status"} <= set(samples[0])
    assert "<svg" in (whole / "report.html").read_text()
    assert json.loads((whole / "config.json").read_text())["loss"]["clip_high"] == 0.4
    assert (whole / "checkpoints" / "6").is_dir()


def test_metrics_of_the_first_step_and_after_a_reset(whole):
    rows = read_rows(whole / "metrics.jsonl")
    for row in rows[1:]:
        assert row["update/first_ratio_deviation"] <= 1e-6
        assert row["update/is_weight"] == pytest.approx(1, abs=0.1)
        assert row["update/skipped_nonfinite"] == 0
    assert rows[3]["update/kl_ref"] > 0
    assert rows[4]["reset"] == "stage" and rows[6]["reset"] == "schedule"
    assert rows[6]["reset/values"] == {"steps": 2}
    assert rows[6]["reset/what"] == ["reference", "optimizer"]
    assert rows[4]["update/kl_ref"] < rows[3]["update/kl_ref"]


# Names of the table that a run on a CPU, with the resets that there are, need not write.
SELDOM = {"reset/what", "reset/values", "mfu"}
PLACES = {"DOMAIN": "|".join(DOMAINS), "VERIFIER": r"\w+", "PHASE": "|".join(PHASES)}
PLACES |= {"SET": "|".join(VALIDATION_SETS), "@K": r"@\d+"}


def test_the_table_of_metrics_is_that_of_a_run(whole):
    text = Path("experiments/METRICS.md").read_text()
    names = re.findall(r"^\| `([^`|]+)` \|[^|]*\|[^|]*\|[^|]+\|$", text, re.MULTILINE)
    assert len(names) == len(set(names)) == text.count("\n| `") > 60
    patterns = {}
    for name in names:
        pattern = re.escape(name)
        for place, allowed in PLACES.items():
            pattern = pattern.replace(place, f"({allowed})")
        patterns[name] = re.compile(pattern)
    written = {name for row in read_rows(whole / "metrics.jsonl") for name in row}
    nameless = {w for w in written if not any(p.fullmatch(w) for p in patterns.values())}
    unwritten = {n for n, p in patterns.items() if not any(map(p.fullmatch, written))}
    assert not nameless and unwritten <= SELDOM, (nameless, unwritten)
    row = read_rows(whole / "metrics.jsonl")[1]
    assert 100 < row["memory/rss_mb"] < 1e5 and 0 < row["time/cpu_s"]
    assert row["time/verdict_mean_s"] <= row["time/verdict_p95_s"] <= row["time/verdict_max_s"]
    assert row["update/learning_rate"] > 0 and row["tokens/trained"] > 0
    assert row["response/clipped"] == 1 - row["response/terminated"]


def test_a_prolonged_run_equals_an_uninterrupted_one(whole, tmp_path):
    assert train.main(arguments(tmp_path, total_steps=4)) == 0  # after the reset at step 3
    assert summary(tmp_path)["steps"] == 4
    assert train.main(arguments(tmp_path, total_steps=6)) == 0
    assert summary(tmp_path)["params_sha256"] == summary(whole)["params_sha256"]
    assert summary(tmp_path)["resets"] == summary(whole)["resets"]
    assert summary(tmp_path)["validation"] == summary(whole)["validation"]
    assert rows_without_times(tmp_path) == rows_without_times(whole)


def test_a_run_that_is_killed_and_stopped_goes_on_bit_for_bit(whole, tmp_path):
    """kill -9 after the second step, SIGTERM after the fourth, then the rest."""
    for number, code, rows in ((signal.SIGKILL, -9, 3), (signal.SIGTERM, 75, 5)):
        command = [sys.executable, "-m", "prolong_jax.train", *arguments(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and process.poll() is None:
            if len(lines(tmp_path / "metrics.jsonl")) >= rows:
                process.send_signal(number)
                break
            time.sleep(0.02)
        assert process.wait(60) == code
        assert rows <= len(lines(tmp_path / "metrics.jsonl")) < 7
    assert train.main(arguments(tmp_path)) == 0
    assert summary(tmp_path)["params_sha256"] == summary(whole)["params_sha256"]
    assert rows_without_times(tmp_path) == rows_without_times(whole)
    assert read_rows(tmp_path / "samples.jsonl") == read_rows(whole / "samples.jsonl")


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_finished_run_is_left_alone(whole, capsys):
    before = (whole / "summary.json").read_text()
    assert train.main(arguments(whole)) == 0
    assert "complete at step 6; raise --config.total_steps" in capsys.readouterr().out
    assert (whole / "summary.json").read_text() == before


def test_another_seed_gives_another_run(whole, tmp_path):
    assert train.main(arguments(tmp_path, total_steps=1, seed=1)) == 0
    ours, theirs = (read_rows(w / "metrics.jsonl")[1] for w in (tmp_path, whole))
    assert ours["update/loss"] != theirs["update/loss"]


def test_a_step_without_anything_to_train_on_changes_no_weights(tmp_path):
    """All responses are cut off, and those are left out of the loss."""
    changes = {"rollout.max_response_len": 4, "rollout.dynamic_sampling": False}
    changes |= {"shaping.overlong_filter": True, "total_steps": 1, "stages": [{"name": "one"}]}
    assert train.main(arguments(tmp_path, **changes)) == 0
    row = read_rows(tmp_path / "metrics.jsonl")[1]
    assert row["groups/kept"] == 4 and "update/grad_norm" not in row
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    _, base = load_model(TINY_BASE, np.dtype("float32"), mesh)
    assert summary(tmp_path)["params_sha256"] == params_sha256(mesh, base)


@pytest.mark.slow
def test_eight_devices_train_like_one(whole, tmp_path):
    """The same prompts and samples at the first step; the update agrees within rounding."""
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    assert train.main(arguments(tmp_path, total_steps=1, **mesh)) == 0
    ours, theirs = (read_rows(w / "metrics.jsonl")[1] for w in (tmp_path, whole))
    for name in ("reward/mean", "tokens/generated", "groups/kept"):
        assert ours[name] == theirs[name]
    for name in ("update/loss", "update/entropy", "update/grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


@pytest.fixture
def sums(tmp_path):
    """A file of sums, one of its rows without an answer, and the settings that train on it."""
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(1, 9)]
    path = tmp_path / "sums.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"question": "?", "answer": None}])
    )
    return {"data__sources": {"sums": {"path": str(path), "domain": "math"}}, "total_steps": 2}


def test_a_run_on_a_file_goes_on_with_the_right_prompts(capsys, tmp_path, sums):
    """Two steps at once, and one after the other: the same prompts, all of the file."""
    sums["stages"] = [{"mixture": {"sums": 1.0}}]
    sums |= {"metrics__samples_per_step": 100, "rollout__dynamic_sampling": False}
    sums |= {"data__mean_reward_after": 1}
    assert train.main(arguments(tmp_path / "once", **sums)) == 0
    assert "8 prompts from sums" in capsys.readouterr().out
    for steps in (1, 2):
        assert train.main(arguments(tmp_path / "twice", **sums | {"total_steps": steps})) == 0
    once, twice = (read_rows(tmp_path / name / "samples.jsonl") for name in ("once", "twice"))
    assert once == twice
    assert sorted(row["prompt"] for row in once) == sorted(
        f"What is {i} + 1? {math.PROMPT_SUFFIX}" for i in range(1, 9)
    )
    (host,) = (tmp_path / "twice" / "checkpoints" / "2" / "host").glob("metadata")
    position = json.loads(host.read_text())["cursor"]["position"]
    assert sorted(count for _, count in position["rewards"].values()) == [4] * 8


def test_many_faults_of_a_verifier_stop_the_run_and_few_do_not():
    def faults(number):
        return [group([0.0] * 20, statuses=["error"] * number + ["ok"] * (20 - number))]

    settings = VerifierSettings()
    assert 0 < settings.max_error_rate < 7 / 20
    refuse_broken_verifiers(faults(7), settings)
    with pytest.raises(RuntimeError, match="verifier 'math' failed on 40% of the responses"):
        refuse_broken_verifiers(faults(8), settings)


# --- bad input -----------------------------------------------------------------------------------


def refusal(capsys, argv):
    """The single sentence that a refused start prints."""
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error, error
    return error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss__clip_hi": 0.3}, "did you mean 'loss.clip_high'"),
        ({"rollout__prompts_per_step": 5}, "must be a multiple of 'update.num_minibatches'"),
        ({"mesh__data": 4, "mesh__tensor": 4}, "wants 16 devices, found 8"),
        ({"mesh__tensor": 3}, "mesh: tensor = 3 does not divide"),
        ({"model__path": "/no/such/model"}, "expected a Hugging Face model directory"),
        (
            {"rollout__max_response_len": 1000, "update__row_len": 2000},
            "512 positions of the model",
        ),
        ({"stages": [{"mixture": {"math": 0.0}}]}, "no data to draw"),
    ],
)
def test_bad_input_is_refused_before_any_compute(capsys, tmp_path, change, message):
    workdir = tmp_path / "run"
    assert message in refusal(capsys, arguments(workdir, **change))
    assert not workdir.exists()


def test_data_that_does_not_fit_is_refused(capsys, tmp_path, sums):
    workdir = tmp_path / "run"
    assert "'code'" in refusal(capsys, arguments(workdir, **sums))  # the mixture's other domains
    only_sums = sums | {"stages": [{"mixture": {"math": 1.0}}]}
    strict = arguments(workdir, **only_sums, data__strict=True)
    assert "of source 'sums' cannot be used" in refusal(capsys, strict)
    missing = only_sums | {"data__sources": {"sums": {"path": "/no/such/file"}}}
    assert "/no/such/file" in refusal(capsys, arguments(workdir, **missing))
    assert not workdir.exists()


def test_bad_command_lines_are_refused(capsys, tmp_path, whole):
    config, workdir = f"--config={TINY}", f"--workdir={tmp_path}"
    assert "unknown argument '--steps=3'" in refusal(capsys, [config, workdir, "--steps=3"])
    assert "found none at" in refusal(capsys, ["--config=nothing.py", workdir])
    other = arguments(whole, loss__clip_low=0.1)
    assert "holds a run with other settings: loss.clip_low" in refusal(capsys, other)
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file; give a directory" in refusal(capsys, [config, f"--workdir={file}"])
    assert "is a file; give a directory" in refusal(capsys, [config, f"--workdir={file}/run"])


def edited_model(tmp_path, **changes):
    directory = shutil.copytree(TINY_BASE, tmp_path / "model")
    for name, values in changes.items():
        path = directory / f"{name}.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}))
    return directory


def test_a_tokenizer_without_a_stop_token_is_refused(capsys, tmp_path):
    directory = edited_model(
        tmp_path, tokenizer_config={"eos_token": None}, generation_config={"eos_token_id": None}
    )
    error = refusal(capsys, arguments(tmp_path / "run", model__path=directory))
    assert "has no stop token; set eos_token" in error


def test_a_tokenizer_without_a_chat_template_is_refused(capsys, tmp_path):
    directory = edited_model(tmp_path, tokenizer_config={"chat_template": None})
    error = refusal(capsys, arguments(tmp_path / "run", model__path=directory))
    assert "has no chat template" in error


def test_a_broken_model_is_refused(capsys, tmp_path):
    directory = edited_model(tmp_path)
    (directory / "model.safetensors").write_bytes(b"rubbish")
    error = refusal(capsys, arguments(tmp_path / "run", model__path=directory))
    assert "model.safetensors is broken" in error


def test_a_verifier_that_cannot_start_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # what workers are started with
    assert "verifier" in refusal(capsys, arguments(tmp_path / "run"))


def test_a_damaged_checkpoint_is_put_aside(capsys, whole, tmp_path):
    """The run goes on from the one before and ends the same; without any, it is refused."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    largest(workdir / "checkpoints" / "6").write_bytes(b"")
    (workdir / "summary.json").unlink()
    assert train.main(arguments(workdir)) == 0
    printed = capsys.readouterr().out
    assert "damaged checkpoints are put aside: step 6 (state" in printed
    assert "the run goes on from step 4 and loses nothing but time" in printed
    assert len(list((workdir / "damaged").glob("6-*"))) == 1
    assert summary(workdir)["params_sha256"] == summary(whole)["params_sha256"]
    assert rows_without_times(workdir) == rows_without_times(whole)
    for step in ("4", "6"):
        largest(workdir / "checkpoints" / step).unlink()
    error = refusal(capsys, arguments(workdir, total_steps=8))
    assert "no checkpoint is whole: step 6 (state" in error and "step 4 (state" in error
    assert len(list((workdir / "damaged").iterdir())) == 3


def largest(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
