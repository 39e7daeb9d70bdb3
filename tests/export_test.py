import dataclasses
import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax.checkpoint import Checkpointer
from prolong_jax.config import TINY_BASE, CheckpointSettings, RunConfig, to_dict
from prolong_jax.export import main
from prolong_jax.models.hf import load_model
from prolong_jax.types import TrainState


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with two checkpoints, whose weights are the base model's plus the step."""
    workdir = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(RunConfig(), checkpoint=CheckpointSettings(keep=5))
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    _, params = load_model(TINY_BASE, jnp.dtype(jnp.float32))
    with closing(Checkpointer(workdir / "checkpoints", config.checkpoint)) as checkpointer:
        for step in (1, 2):
            moved = jax.tree.map(lambda x, step=step: x + step, params)
            moments = {"mu": jax.tree.map(jnp.zeros_like, params)}
            checkpointer.save(step, TrainState(moved, params, moments), {"step": step})
    return workdir, params


@pytest.mark.parametrize(("arguments", "step"), [([], 2), (["--step=1"], 1)])
def test_the_policy_of_a_checkpoint_is_exported(run, arguments, step, tmp_path):
    workdir, params = run
    out = tmp_path / "out"
    assert main([f"--workdir={workdir}", f"--out={out}", "--dtype=float32", *arguments]) == 0
    _, exported = load_model(out, jnp.dtype(jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + step), exported, params)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (type(out)(TINY_BASE) / name).read_bytes()


def test_bfloat16_is_the_default(run, tmp_path):
    workdir, params = run
    assert main([f"--workdir={workdir}", f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, exported = load_model(tmp_path, jnp.dtype(jnp.float32))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, (b + 2).astype(jnp.bfloat16)),
        exported,
        params,
    )


def test_bad_arguments_are_refused(run, tmp_path, capsys):
    workdir, _ = run
    assert main([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert "holds no run with checkpoints" in capsys.readouterr().err
    assert main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--step=7"]) == 2
    assert "no checkpoint of step 7; found: 1, 2." in capsys.readouterr().err
    (tmp_path / "kept.txt").write_text("")
    assert main([f"--workdir={workdir}", f"--out={tmp_path}"]) == 2
    assert "is not an empty directory" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(run, tmp_path, capsys):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "2" / "state")
    assert main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]) == 2
    assert "the checkpoint of step 2 cannot be restored" in capsys.readouterr().err
