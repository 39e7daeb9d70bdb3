"""Hugging Face model directories in and out (config.json, *.safetensors)."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from prolong_jax.mesh import param_shardings
from prolong_jax.model_files import local_directory
from prolong_jax.models.decoder import Model, ModelConfig
from prolong_jax.models.hf_config import parse_config, to_raw
from prolong_jax.models.tensors import Stored, open_tensors, write_tensors
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
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPIED = {".json", ".model", ".txt", ".jinja", ".tiktoken"}  # tokenizer and generation settings


def _hf_name(path: tuple) -> str:
    """The checkpoint's tensor name for a parameter path such as ('layers', 0, 'key', 'kernel')."""
    kind = "bias" if path[-1] == "bias" else "weight"
    if path[0] == "layers":
        return f"model.layers.{path[1]}.{_LAYER_NAMES[path[2]]}.{kind}"
    return {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[
        path[0]
    ] + f".{kind}"


def _hf_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The checkpoint holds matrices as (outputs, inputs), the parameters as (inputs, outputs)."""
    return shape[::-1] if path[-1] == "kernel" else shape


# --- in ------------------------------------------------------------------------------------------


def read_config(directory: str | Path) -> ModelConfig:
    """The model's shape from its config.json, or from a file that is one.

    Raises:
      ValueError: no such file, another architecture, or a setting that is not supported.
    """
    path = Path(directory)
    if path.suffix != ".json":
        path = local_directory(directory, weights=False) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path: expected a Hugging Face model directory with a config.json, "
            f"found none in {str(directory)!r}; give the path of a downloaded checkpoint."
        )
    try:
        return parse_config(json.loads(path.read_text()), str(path))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.path: {path} is not a complete configuration "
            f"({type(error).__name__}: {error}); download the checkpoint again."
        ) from error


def load_model(
    directory: str | Path, dtype: jnp.dtype, mesh: Mesh | None = None, *, random: bool = False
) -> tuple[Model, PyTree]:
    """The model of a directory and its float32 parameters.

    Args:
      directory: local, of the Hugging Face hub, or an address; see `local_directory`.
      dtype: of activations and matrix products.
      mesh: where the parameters are to be; without one, on the default device.
      random: makes random weights in the devices' memory instead of reading any.

    Raises:
      ValueError: as `read_config` and `load_params`.
    """
    model = Model(read_config(directory), dtype)
    if not random:
        return model, load_params(directory, model, mesh)
    shardings = None if mesh is None else param_shardings(mesh, model.shapes())
    return model, jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))


def load_params(directory: str | Path, model: Model, mesh: Mesh | None = None) -> PyTree:
    """Float32 parameters of `model` from the directory's safetensors files, tensor by tensor.

    The host holds one tensor at a time, as it is stored and in float32.

    Raises:
      ValueError: a file or tensor is missing, broken, not known or of another shape.
    """
    stored = _stored_tensors(local_directory(directory))
    shapes = model.shapes()
    wanted: dict[tuple, Any] = dict(flatten_dict(shapes))
    _refuse_unfit(stored, wanted, model.config, directory)
    shardings: dict[tuple, Any] = {}
    if mesh is not None:
        shardings = dict(flatten_dict(param_shardings(mesh, shapes)))
    leaves = {}
    for path in wanted:
        value = stored[_hf_name(path)].read().astype(np.float32, copy=False)
        value = np.ascontiguousarray(value.T) if path[-1] == "kernel" else value
        # Blocks, since a transfer under way keeps its tensor in the host's memory.
        leaves[path] = jax.block_until_ready(_put(value, shardings.get(path)))
        del value  # before the next one is read
    return unflatten_dict(leaves)


def _put(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The array on the devices; a process transfers only the parts of its own devices."""
    if sharding is None:
        return jax.device_put(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _stored_tensors(directory: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, of one file or of the shards that its index names."""
    if (directory / _SINGLE).exists():
        files = [_SINGLE]
    elif (directory / _INDEX).exists():
        try:
            files = sorted(set(json.loads((directory / _INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"model.path: {directory / _INDEX} is broken ({type(error).__name__}: {error}); "
                "download it again."
            ) from error
    else:
        raise ValueError(
            f"model.path: found neither {_SINGLE} nor {_INDEX} in {str(directory)!r}; give a "
            "checkpoint in the safetensors format."
        )
    return {k: v for file in files for k, v in open_tensors(directory / file).items()}


def _refuse_unfit(
    stored: dict[str, Stored], wanted: dict[tuple, Any], config: ModelConfig, where: str | Path
) -> None:
    """Raises ValueError where the files do not hold exactly the tensors of the model."""
    names = {_hf_name(path): _hf_shape(path, leaf.shape) for path, leaf in wanted.items()}
    for name, shape in names.items():
        if name not in stored:
            raise ValueError(
                f"model.path: tensor {name!r} is missing in {str(where)!r}; download it again."
            )
        if stored[name].shape != shape:
            raise ValueError(
                f"model.path: tensor {name!r} in {str(where)!r} has shape {stored[name].shape}, "
                f"its config.json asks for {shape}."
            )
    for name in stored.keys() - names.keys():
        derived = name.endswith("rotary_emb.inv_freq")  # in old Llama checkpoints
        if not derived and not (name == "lm_head.weight" and config.tied_head):
            raise ValueError(
                f"model.path: tensor {name!r} in {str(where)!r} has no place in the model of its "
                "config.json; use the config.json that belongs to the weights."
            )


# --- out -----------------------------------------------------------------------------------------


def save_pretrained(
    directory: str | Path,
    model: Model,
    params: PyTree,
    *,
    source: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a model directory that `transformers` loads, one tensor at a time.

    Args:
      directory: is made where it is missing.
      source: model directory whose config.json, tokenizer and generation settings are copied;
        without one, a config.json is made from the model's shape.
      dtype: of the stored weights: float32 or bfloat16.
      max_shard_bytes: a file holds no more, unless a single tensor is larger.

    Raises:
      ValueError: the source is of another shape, or the directory holds other weights.
    """
    directory = Path(directory)
    stored = np.dtype({"float32": jnp.float32, "bfloat16": jnp.bfloat16}[dtype])
    leaves: dict[tuple, Any] = dict(flatten_dict(params))
    shards = _shards(leaves, stored, max_shard_bytes)
    kept = {file.name for file in directory.glob("*.safetensors*")} - shards.keys() - {_INDEX}
    if kept:
        raise ValueError(
            f"{str(directory)!r} holds other weights ({', '.join(sorted(kept))}); give an empty "
            "directory."
        )
    directory.mkdir(parents=True, exist_ok=True)
    raw = to_raw(model.config) if source is None else _copy_settings(source, directory, model)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
    _write_json(directory / "config.json", raw)
    for file, paths in shards.items():
        shapes = {_hf_name(p): _hf_shape(p, leaves[p].shape) for p in paths}
        values = (_host_value(p, leaves[p], stored) for p in paths)
        write_tensors(directory / file, shapes, stored, values)
    if len(shards) == 1:
        (directory / _INDEX).unlink(missing_ok=True)
        return
    total = sum(leaf.size for leaf in leaves.values()) * stored.itemsize
    weight_map = {_hf_name(path): file for file, paths in shards.items() for path in paths}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / _INDEX, index)


def _shards(
    leaves: dict[tuple, Any], dtype: np.dtype, max_shard_bytes: int
) -> dict[str, list[tuple]]:
    """Paths of the parameters by file name, filled in order."""
    parts: list[list[tuple]] = [[]]
    filled = 0
    for path, leaf in leaves.items():
        size = leaf.size * dtype.itemsize
        if parts[-1] and filled + size > max_shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(path)
        filled += size
    if len(parts) == 1:
        return {_SINGLE: parts[0]}
    count = len(parts)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _host_value(path: tuple, leaf: jax.Array, dtype: np.dtype) -> np.ndarray:
    """A parameter as the checkpoint holds it; narrowed on the device before the transfer."""
    value = np.asarray(leaf.astype(dtype))
    return value.T if path[-1] == "kernel" else value


def _copy_settings(source: str | Path, directory: Path, model: Model) -> dict[str, Any]:
    """Copies tokenizer and generation settings; returns the content of the config.json."""
    source = local_directory(source, weights=False)
    if read_config(source) != model.config:
        raise ValueError(
            f"{str(source)!r} describes a model of another shape than the one to be written; "
            "give the directory that the model was loaded from."
        )
    for file in sorted(source.iterdir()):
        is_settings = file.suffix in _COPIED and file.name not in ("config.json", _INDEX)
        if is_settings and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    return json.loads((source / "config.json").read_text())


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
