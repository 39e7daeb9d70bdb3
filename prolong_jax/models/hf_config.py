"""config.json of a Hugging Face model to `ModelConfig` and back.

A key that is not known here is refused: it may change what the model computes.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from prolong_jax.models.decoder import ModelConfig
from prolong_jax.models.rope import RopeScaling, yarn_attention_factor

_READ = """
model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
intermediate_size rms_norm_eps tie_word_embeddings max_position_embeddings rope_theta rope_scaling
rope_parameters""".split()
_OF_FAMILY = {
    "qwen2": set(),
    "qwen3": {"attention_bias"},
    "llama": {"attention_bias", "mlp_bias"},
}
_ARCHITECTURE = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Keys that change nothing in the forward pass: there is no dropout in it, and the window of
# max_window_layers is refused where it is in use.
_HARMLESS = """
_name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
attn_implementation transformers_version transformers.js_config unsloth_version unsloth_fixed
torch_dtype dtype use_bfloat16 torchscript initializer_range attention_dropout max_window_layers
use_cache output_hidden_states output_attentions output_scores return_dict return_dict_in_generate
id2label label2id num_labels problem_type task_specific_params tokenizer_class bos_token_id
eos_token_id pad_token_id sep_token_id decoder_start_token_id do_sample temperature top_k top_p
typical_p num_beams num_return_sequences repetition_penalty length_penalty max_length min_length
""".split()

# Keys with the values that mean what this decoder computes; None is always one of them.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (0, 1),
    "use_sliding_window": (False,),
    "attention_bias": (False,),  # where the family has no such key
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1, 1.0),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "num_experts": (0,),
    "quantization_config": (),
    "auto_map": (),
}

_LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
_YARN = "factor original_max_position_embeddings beta_fast beta_slow truncate attention_factor"
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": set(_LLAMA3.split()),
    "yarn": {*_YARN.split(), "mscale", "mscale_all_dim"},
}


def parse_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape that the content of a config.json describes; `where` names the file in messages.

    Raises:
      ValueError: another architecture, or a key or value that is not supported, by its name.
      KeyError: a key is missing.
    """
    family = raw.get("model_type")
    if family not in _OF_FAMILY:
        raise ValueError(
            f"model.path: expected model_type {', '.join(map(repr, _OF_FAMILY))} in {where}, got "
            f"{family!r}; use a Qwen2, Qwen2.5, Qwen3 (dense) or Llama 3 checkpoint."
        )
    _refuse_unsupported(raw, {*_READ, *_OF_FAMILY[family]}, where)
    attention_bias = bool(raw.get("attention_bias"))
    theta, scaling = _rope(raw, where)
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim")
    if head_dim is None:
        head_dim = 128 if family == "qwen3" else raw["hidden_size"] // heads
    kv_heads = raw.get("num_key_value_heads")
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        ff_dim=raw["intermediate_size"],
        rope_theta=theta,
        norm_eps=raw["rms_norm_eps"],
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        max_positions=raw["max_position_embeddings"],
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
    )


def _refuse_unsupported(raw: Mapping[str, Any], read: set[str], where: str) -> None:
    for key, value in raw.items():
        if key in read or key in _HARMLESS or value is None:
            continue
        if key == "architectures":
            supported = list(value) == [_ARCHITECTURE[raw["model_type"]]]
        elif key == "layer_types":
            supported = set(value) <= {"full_attention"}
        elif key == "sliding_window":  # Qwen: without effect unless the next key turns it on
            supported = raw["model_type"] != "llama"
        elif key in _ACCEPTED:
            supported = value in _ACCEPTED[key]
        else:
            raise ValueError(
                f"model.path: {key} = {value!r} in {where} is not known and may change what the "
                "model computes; remove the key if it does not."
            )
        if not supported:
            raise ValueError(
                f"model.path: {key} = {value!r} in {where} is not supported; use a checkpoint "
                "without it."
            )


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Theta and scaling, from the keys of transformers 5 (rope_parameters) or 4."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise ValueError(
            f"model.path: rope_type {kind!r} in {where} is not supported; expected one of "
            f"{', '.join(_ROPE_KEYS)}."
        )
    values = {key: value for key, value in rope.items() if value is not None}
    general = {"rope_type", "type", "rope_theta"} | (
        {"partial_rotary_factor"} if values.get("partial_rotary_factor") == 1 else set()
    )
    for key in values.keys() - general - _ROPE_KEYS[kind]:
        raise ValueError(
            f"model.path: {key} = {values[key]!r} of the rope scaling {kind!r} in {where} is not "
            "supported; use a checkpoint without it."
        )
    theta = values.get("rope_theta", raw.get("rope_theta"))
    theta = 10_000.0 if theta is None else float(theta)
    fields = {key: values[key] for key in _ROPE_KEYS[kind] & values.keys()}
    if kind in ("llama3", "yarn"):
        length = raw["max_position_embeddings"]
        fields.setdefault("original_max_position_embeddings", length)
        if kind == "yarn":
            fields.setdefault("factor", length / fields["original_max_position_embeddings"])
    if kind != "default":
        fields["factor"] = float(fields["factor"])
    scales = [fields.pop(name, None) for name in ("mscale", "mscale_all_dim")]
    if kind == "yarn":
        fields.setdefault("attention_factor", yarn_attention_factor(fields["factor"], *scales))
    return theta, RopeScaling(kind, **fields)


def to_raw(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a shape: of the first family that has its biases and norms.

    Raises:
      ValueError: no family has them.
    """
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    if config.qk_norm:
        family = "qwen3" if biases in ((False,) * 3, (True, True, False)) else None
    elif biases == (True, False, False):
        family = "qwen2"
    else:
        family = "llama" if config.qkv_bias == config.out_bias else None
    if family is None:
        raise ValueError(
            f"model: no Qwen2, Qwen3 or Llama checkpoint has qkv_bias, out_bias, mlp_bias = "
            f"{biases} with qk_norm = {config.qk_norm}; choose the ones of a family."
        )
    raw = {
        "architectures": [_ARCHITECTURE[family]],
        "model_type": family,
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
    }
    if family == "qwen2":
        raw["use_sliding_window"] = False
    else:
        raw["attention_bias"] = config.qkv_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    scaling = config.rope_scaling
    if scaling.rope_type != "default":
        keys = _ROPE_KEYS[scaling.rope_type]
        raw["rope_scaling"] = {"rope_type": scaling.rope_type} | {
            key: value for key, value in asdict(scaling).items() if key in keys
        }
    return raw
