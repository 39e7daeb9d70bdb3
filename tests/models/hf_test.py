import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prolong_jax.config import TINY_BASE, MeshSettings
from prolong_jax.mesh import make_mesh, param_shardings
from prolong_jax.model_files import local_directory
from prolong_jax.models.decoder import Model
from prolong_jax.models.hf import load_model, load_params, read_config, save_pretrained
from tests.tiny import MODEL, SHAPE, random_params

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 2,
}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return read_config(tmp_path)


# --- config.json ---------------------------------------------------------------------------------

PUBLISHED = {  # what the files of published models hold beside their sizes
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2
    | {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0",
        "use_cache": True,
        "use_mrope": False,
    },
    "Qwen3-1.7B": QWEN3
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
    },
    "Llama-3.1-8B and R1-Distill-Llama": LLAMA
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "use_cache": True,
    },
    "as transformers 5 writes it": QWEN2
    | {
        "dtype": "float32",
        "layer_types": ["full_attention", "full_attention"],
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "sliding_window": None,
    },
}


@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_configurations_are_read(tmp_path, raw):
    config = read(tmp_path, raw)
    assert config.rope_theta == 500000.0
    assert config.qkv_bias == (raw["model_type"] == "qwen2")
    assert config.qk_norm == (raw["model_type"] == "qwen3")
    assert config.head_dim == raw.get("head_dim", 8)
    assert config.tied_head == raw.get("tie_word_embeddings", False)
    assert hash(config) == hash(read(tmp_path, raw))
    if raw.get("rope_scaling"):
        scaling = config.rope_scaling
        assert {key: getattr(scaling, key) for key in LLAMA3_ROPE} == LLAMA3_ROPE


REFUSED = [
    (QWEN2, {"model_type": "mamba"}, "expected model_type 'qwen2', .* got 'mamba'"),
    (QWEN2, {"model_type": "qwen3_moe"}, "got 'qwen3_moe'"),
    (QWEN2, {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures = "),
    (QWEN2, {"use_sliding_window": True}, "use_sliding_window = True"),
    (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
    (LLAMA, {"sliding_window": 4096}, "sliding_window = 4096"),
    (QWEN2, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    (QWEN2, {"attention_bias": True}, "attention_bias = True"),
    (QWEN2, {"mlp_bias": True}, "mlp_bias = True"),
    (QWEN3, {"mlp_bias": True}, "mlp_bias = True"),
    (QWEN2, {"use_qk_norm": True}, "use_qk_norm = True"),
    (QWEN2, {"use_mrope": True}, "use_mrope = True"),
    (QWEN3, {"num_experts": 8}, "num_experts = 8"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp = 2"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
    (LLAMA, {"add_cross_attention": True}, "add_cross_attention = True"),
    (LLAMA, {"cross_attention_hidden_size": 64}, "cross_attention_hidden_size = 64"),
    (LLAMA, {"tie_encoder_decoder": True}, "tie_encoder_decoder = True"),
    (LLAMA, {"chunk_size_feed_forward": 8}, "chunk_size_feed_forward = 8"),
    (LLAMA, {"pruned_heads": {"0": [1]}}, "pruned_heads = "),
    (LLAMA, {"auto_map": {"AutoModel": "x"}}, "auto_map = "),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = .*'bits'"),
    (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0 .* is not known"),
    (LLAMA, {"logits_scaling": 8.0}, "logits_scaling = 8.0 .* is not known"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    (
        LLAMA,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "full_attention = .* of the rope scaling 'default'",
    ),
    (
        LLAMA,
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5 of the rope scaling 'default'",
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}},
        "beta_fast = 1 of the rope scaling 'linear'",
    ),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "KeyError: 'factor'"),
    (LLAMA, {"hidden_size": None}, "is not a complete configuration"),
]


@pytest.mark.parametrize(("base", "change", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_is_not_supported_is_refused_by_its_name(tmp_path, base, change, message):
    read(tmp_path, base)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, base | change)


# --- in and out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [2**30, 8000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, dtype, max_shard_bytes):
    params = random_params()
    save_pretrained(tmp_path, MODEL, params, dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert read_config(tmp_path) == MODEL.config
    stored = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, MODEL), stored)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 2**30)
    for file in files:  # the library reads them as well, and finds what the index says
        tensors = load_file(file)
        assert all(str(value.dtype) == dtype for value in tensors.values())
        assert sum(v.nbytes for v in tensors.values()) <= max_shard_bytes or len(tensors) == 1


@pytest.mark.parametrize("raw", [QWEN2, QWEN3, LLAMA | {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 8000])
def test_import_and_export_are_equal_tensor_for_tensor(tmp_path, raw, max_shard_bytes):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    raw = raw | {"rope_scaling": LLAMA3_ROPE, "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(source)
    written = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    written.generation_config = GenerationConfig(eos_token_id=[1, 2])
    written.save_pretrained(source, max_shard_size=max_shard_bytes)
    model, params = load_model(source, jnp.dtype(jnp.float32))
    save_pretrained(
        out, model, params, source=source, dtype="bfloat16", max_shard_bytes=max_shard_bytes
    )
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes == 8000)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    again, info = loaded
    assert not any(info.values()), info
    old, new = written.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("random", [False, True])
def test_parameters_arrive_sharded(tmp_path, random):
    save_pretrained(tmp_path, MODEL, random_params())
    if random:
        (tmp_path / "model.safetensors").unlink()
    mesh = make_mesh(MeshSettings(fsdp=4, tensor=2))
    model, params = load_model(tmp_path, jnp.dtype(jnp.float32), mesh, random=random)
    shardings = param_shardings(mesh, model.shapes())
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, params, shardings)
    expected = model.init(jax.random.key(0)) if random else random_params()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


MEMORY = r"""
import re, sys
import jax, jax.numpy as jnp
from prolong_jax.config import MeshSettings
from prolong_jax.mesh import make_mesh
from prolong_jax.models.hf import load_model, load_params, read_config
from prolong_jax.models.decoder import Model
mesh = make_mesh(MeshSettings(fsdp=4, tensor=2))
model = Model(read_config(sys.argv[1]))
model.shapes(), jax.block_until_ready(jnp.ones(8) + 1)

def peak():  # bytes; ru_maxrss would begin with the peak of the parent
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

before = peak()
params = load_params(sys.argv[1], model, mesh)
result = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print(peak() - before - result)
"""


def test_loading_needs_the_memory_of_one_tensor(tmp_path):
    """The peak of a process beyond what it ends with, for 200 MB in seven files."""
    shape = dataclasses.replace(
        SHAPE, vocab_size=8000, width=1024, head_dim=64, num_heads=16, ff_dim=4096, num_layers=7
    )
    model = Model(shape)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), model.shapes())
    save_pretrained(tmp_path, model, params, dtype="bfloat16", max_shard_bytes=32 * 2**20)
    files = list(tmp_path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert size > 200e6 and len(files) >= 7
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    largest = max(x.size for x in jax.tree.leaves(model.shapes())) * 4
    assert int(done.stdout) < 2 * largest < size / 2, f"{int(done.stdout) / 1e6:.0f} MB"


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TINY_BASE, tmp_path / "model")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(directory):
    return load_params(directory, Model(read_config(directory)))


def test_broken_files_are_refused(copy, tmp_path):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b"", whole + b"x"):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="model.safetensors is broken .* download it again"):
            load(copy)
    weights.unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a complete configuration"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="found none in"):
        load(copy)
    with pytest.raises(ValueError, match="found none in"):
        load(tmp_path / "nowhere")


def test_unfit_tensors_are_refused(copy):
    edit_config(copy, intermediate_size=500)
    with pytest.raises(ValueError, match="has shape .* its config.json asks for"):
        load(copy)
    edit_config(copy, intermediate_size=512, num_hidden_layers=9)
    with pytest.raises(ValueError, match="tensor 'model.layers.4.* is missing"):
        load(copy)
    edit_config(copy, num_hidden_layers=3)
    with pytest.raises(ValueError, match="tensor 'model.layers.3.* has no place"):
        load(copy)


def test_broken_shards_are_refused(tmp_path):
    save_pretrained(tmp_path, MODEL, random_params(), max_shard_bytes=20_000)
    index, first = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("*00001-of*"))[0]
    shutil.move(first, tmp_path / "aside")
    with pytest.raises(ValueError, match=f"{first.name} is broken"):
        load(tmp_path)
    shutil.move(tmp_path / "aside", first)
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json is broken"):
        load(tmp_path)


def test_numbers_of_other_types_are_refused(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    with pytest.raises(ValueError, match="is of type I32; expected one of F64, F32, F16, BF16"):
        load(copy)


def test_a_directory_with_other_weights_is_not_mixed_up(tmp_path):
    save_pretrained(tmp_path, MODEL, random_params())
    save_pretrained(tmp_path, MODEL, random_params(1))  # the same file again
    with pytest.raises(ValueError, match=r"holds other weights \(model.safetensors\)"):
        save_pretrained(tmp_path, MODEL, random_params(), max_shard_bytes=20_000)
    with pytest.raises(ValueError, match="a model of another shape"):
        save_pretrained(tmp_path / "new", MODEL, random_params(), source=TINY_BASE)


# --- where the files are -------------------------------------------------------------------------


def test_a_model_at_an_address_is_copied_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = fsspec.filesystem("memory")
    for file in Path(TINY_BASE).iterdir():
        files.pipe(f"/bucket/model/{file.name}", file.read_bytes())
    files.pipe("/bucket/model/pytorch_model.bin", b"x")
    settings = local_directory("memory://bucket/model", weights=False)
    assert not (settings / "model.safetensors").exists()
    model, params = load_model("memory://bucket/model", jnp.dtype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, params, load_params(TINY_BASE, model))
    assert not list(settings.glob("*.bin")) and not list(settings.glob("*.part"))
    monkeypatch.setattr(files.__class__, "get_file", lambda *_: 1 / 0)
    assert local_directory("memory://bucket/model/") == settings


def test_addresses_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="'memory://nowhere' cannot be read"):
        local_directory("memory://nowhere")
    with pytest.raises(ValueError, match="'unknown://x' cannot be read"):
        local_directory("unknown://x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(ValueError, match="needs another package .* `pip install gcsfs`"):
        local_directory("gs://bucket/model")


def test_a_repository_without_a_network_is_refused():
    with pytest.raises(ValueError, match="no directory 'owner/name', nor such a repository"):
        read_config("owner/name")
