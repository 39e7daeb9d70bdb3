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
from prolong_jax.types import PyTree

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
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
    """The model's shape from its config.json, or from a file that is one.

    Raises:
      ValueError: no such file, another architecture, or a setting that is not supported.
    """
    path = Path(directory)
    path = path if path.suffix == ".json" else path / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path: expected a Hugging Face model directory with a config.json, "
            f"found none in {str(directory)!r}; give the path of a downloaded checkpoint."
        )
    try:
        raw = json.loads(path.read_text())
        if raw.get("model_type") != "qwen2":
            raise ValueError(
                f"model.path: expected model_type 'qwen2' in {path}, got "
                f"{raw.get('model_type')!r}; use a Qwen2 or Qwen2.5 checkpoint."
            )
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"model.path: rope scaling {rope} in {path} is not supported.")
        if raw.get("use_sliding_window"):
            raise ValueError(f"model.path: use_sliding_window in {path} is not supported.")
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            width=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            ff_dim=raw["intermediate_size"],
            rope_theta=raw.get("rope_theta") or rope["rope_theta"],
            norm_eps=raw["rms_norm_eps"],
            tied_head=raw.get("tie_word_embeddings", False),
            max_positions=raw["max_position_embeddings"],
        )
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"model.path: {path} is not a complete Qwen2 configuration "
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
    config = model.config
    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ff_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_positions,
        "use_sliding_window": False,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
