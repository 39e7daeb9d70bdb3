import json
import shutil

import jax
import numpy as np
import pytest

from prolong_jax.config import TINY_BASE
from prolong_jax.models.decoder import Model
from prolong_jax.models.hf import load_params, read_config, save_pretrained
from tests.tiny import MODEL, random_params


def test_round_trip(tmp_path):
    params = random_params()
    save_pretrained(tmp_path, MODEL, params)
    assert read_config(tmp_path) == MODEL.config
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, MODEL), params)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TINY_BASE, tmp_path / "model")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(directory):
    return load_params(directory, Model(read_config(directory)))


def test_broken_directories_are_refused(copy, tmp_path):
    with pytest.raises(ValueError, match="found none in"):
        load(tmp_path / "nowhere")
    edit_config(copy, model_type="mamba")
    with pytest.raises(ValueError, match="expected model_type 'qwen2', .* got 'mamba'"):
        load(copy)
    edit_config(copy, model_type="qwen2", use_sliding_window=True)
    with pytest.raises(ValueError, match="use_sliding_window"):
        load(copy)
    edit_config(copy, use_sliding_window=False, rope_scaling={"rope_type": "longrope"})
    with pytest.raises(ValueError, match="rope_type 'longrope'"):
        load(copy)


def test_broken_tensors_are_refused(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is broken"):
        load(copy)
    weights.write_bytes(whole)
    edit_config(copy, intermediate_size=500)
    with pytest.raises(ValueError, match="has shape .* its config.json asks for"):
        load(copy)
    edit_config(copy, intermediate_size=512, num_hidden_layers=9)
    with pytest.raises(ValueError, match="tensor 'model.layers.4.* is missing"):
        load(copy)
    weights.unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a complete configuration"):
        load(copy)
