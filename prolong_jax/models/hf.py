"""Hugging Face model directories in and out (config.json, *.safetensors)."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prolong_jax.models.decoder import Model, ModelConfig
from prolong_jax.models.hf_config import parse_config, to_raw
from prolong_jax.types import PyTree

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def _hf_name(path: tuple) -> str:
    """The checkpoint's tensor name for a parameter path such as ('layers', 0, 'key', 'kernel')."""
    kind = "bias" if path[-1] == "bias" else "weight"
    if path[0] == "layers":
        return f"model.layers.{path[1]}.{_LAYER_NAMES[path[2]]}.{kind}"
    return {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[
        path[0]
    ] + f".{kind}"


def read_config(directory: str | Path) -> ModelConfig:
    """The model's shape from its config.json.

    Raises:
      ValueError: no such file, another architecture, or a setting that is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path: expected a Hugging Face model directory with a config.json, "
            f"found none in {str(directory)!r}; give the path of a downloaded checkpoint."
        )
    try:
        raw = json.loads(path.read_text())
        return parse_config(raw, str(path))
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"model.path: {path} is not a complete configuration "
            f"({type(error).__name__}: {error}); download the checkpoint again."
        ) from error


def load_model(directory: str | Path, dtype: jnp.dtype) -> tuple[Model, PyTree]:
    """The model of a directory and its float32 parameters; `dtype` is that of its products."""
    model = Model(read_config(directory), dtype)
    return model, load_params(directory, model)


def load_params(directory: str | Path, model: Model) -> PyTree:
    """Float32 parameters of `model` from the directory's safetensors files.

    Raises:
      ValueError: a file or tensor is missing, broken, or of another shape.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"model.path: no *.safetensors file in {str(directory)!r}.")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model.path: {file} is broken ({error}); download it again."
            ) from error
    leaves = {}
    shapes: dict[tuple, Any] = dict(flatten_dict(model.shapes()))
    for path, shape in shapes.items():
        name = _hf_name(path)
        if name not in tensors:
            raise ValueError(f"model.path: tensor {name!r} is missing in {str(directory)!r}.")
        value = np.asarray(tensors[name], np.float32)
        value = value.T if path[-1] == "kernel" else value
        if value.shape != shape.shape:
            raise ValueError(
                f"model.path: tensor {name!r} in {str(directory)!r} has shape {value.shape}, "
                f"its config.json asks for {shape.shape}."
            )
        leaves[path] = np.ascontiguousarray(value)
    return unflatten_dict(leaves)


def save_pretrained(directory: str | Path, model: Model, params: PyTree) -> None:
    """Writes config.json and model.safetensors, which `transformers` loads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, value in flatten_dict(params).items():
        value = np.asarray(value, np.float32)
        tensors[_hf_name(path)] = np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    raw = to_raw(model.config) | {"torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
