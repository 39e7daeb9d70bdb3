"""Decoding at real size: python -m experiments.benchmarks.decode [--torch] [--write]

Random weights in the shape of DeepSeek-R1-Distill-Qwen-1.5B in bfloat16 (--shape: another
config.json), every slot taken by a row with the same number of cached tokens. Prints tokens per
second and the share of the bandwidth floor that they reach: bytes of weights and valid cache over
the rate of a copy, which is measured first. --torch decodes as many tokens with
`transformers.generate` in the same process, from prompts of the same length. --small is for a
machine without an accelerator. One device; medians of three.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import report
from prolong_jax import sampler
from prolong_jax.config import ASSETS
from prolong_jax.models.decoder import Model, cast_for_sampling
from prolong_jax.models.hf import read_config
from prolong_jax.next_token import SamplingRule
from prolong_jax.slots import CHUNK

REPEATS = 3
SHAPE = ASSETS / "shapes" / "qwen2_1p5b_r1.json"
CASES = [(64, 2048), (256, 2048), (64, 8192), (256, 8192)]  # slots, cached tokens
SMALL = {"width": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32}
SMALL |= {"ff_dim": 1024, "vocab_size": 16_384}


def copy_rate(size: int) -> float:
    """Bytes per second that a copy reads and writes."""
    x = jnp.ones(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(x))
    times = []
    for _ in range(2 * REPEATS + 1):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)


def step_s(model: Model, params: Any, slots: int, cached: int) -> float:
    """Median seconds of one token of every row, over chunks of CHUNK."""
    config, columns = model.config, -(-(cached + CHUNK) // 128) * 128
    shape = slots, config.num_kv_heads, config.head_dim, columns
    zeros = jax.jit(
        lambda: tuple(
            (jnp.zeros(shape, model.dtype), jnp.zeros((*shape[:2], *shape[:1:-1]), model.dtype))
            for _ in range(config.num_layers)
        )
    )
    cache, rule = zeros(), SamplingRule(stop_ids=(config.vocab_size,))
    keys = np.random.default_rng(0).integers(0, 2**31, (slots, 2)).astype(np.uint32)
    token, position, length, most = (
        np.full(slots, n, np.int32) for n in (1, cached, 0, cached + CHUNK)
    )
    rows = sampler._Rows(keys, token, position, length, most, np.zeros(slots, bool))
    times = []
    for _ in range(REPEATS + 1):  # the first compiles
        start = time.perf_counter()
        at = np.int32(cached), np.int32(0)
        cache, _, _, steps = sampler._decode(model, params, cache, rows, *at, rule, CHUNK)
        done = int(steps)
        times.append((time.perf_counter() - start) / done)
        assert done == CHUNK
    return statistics.median(times[1:])


def torch_network(model: Model) -> Any:
    """The same shape with random weights in `transformers`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape, device = model.config, "cuda" if torch.cuda.is_available() else "cpu"
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.ff_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied_head,
        pad_token_id=0,
        eos_token_id=None,
    )
    kind = torch.bfloat16 if model.dtype == jnp.bfloat16 else torch.float32
    network: Any = Qwen2ForCausalLM(config)
    return network.to(device, kind).eval()


def torch_step_s(network: Any, slots: int, cached: int) -> float:
    """Seconds per token of every row: what CHUNK more tokens take, without the prompt's part."""
    import torch

    tokens = torch.randint(0, network.config.vocab_size, (slots, cached), device=network.device)

    def seconds(new: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            network.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                top_k=0,
            )
        if network.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(1)
    return (seconds(CHUNK + 1) - seconds(1)) / CHUNK


def attempt(function: Callable[[], float]) -> float | None:
    """None where the device has too little memory."""
    try:
        return function()
    except RuntimeError as error:  # both libraries say it so
        if "memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", type=Path, default=SHAPE, help="a Hugging Face config.json")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--write", action="store_true", help="make the figures the baseline")
    args = parser.parse_args()
    config, dtype, cases, copied = read_config(args.shape), jnp.bfloat16, CASES, 2**31
    if args.small:
        config, dtype = dataclasses.replace(config, **SMALL), jnp.float32
        cases, copied = [(16, 256), (64, 256), (16, 1024)], 2**28
    model = Model(config, jnp.dtype(dtype))
    print(f"{jax.devices()[0].device_kind}", flush=True)
    rate = copy_rate(copied)
    figures: dict[str, float] = {"copy_gb_per_s": rate / 1e9}
    params = jax.jit(lambda key: cast_for_sampling(model, model.init(key)))(jax.random.key(0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    if not config.tied_head:
        size -= params["embed"]["embedding"].nbytes  # a step reads few of its rows
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    network = torch_network(model) if args.torch else None
    limits = {}
    for slots, cached in cases:
        name = f"{slots}x{cached}"
        seconds = attempt(lambda s=slots, c=cached: step_s(model, params, s, c))
        if seconds is None:
            print(f"{name}: not enough memory")
            continue
        floor = (size + slots * (cached + CHUNK / 2) * token) / rate
        figures |= {f"{name}_tokens_per_s": slots / seconds, f"{name}_of_floor": floor / seconds}
        limits[f"{name}_of_floor"] = ("at least", 0.6)
        other = network and attempt(lambda s=slots, c=cached: torch_step_s(network, s, c))
        if other:
            figures[f"{name}_over_torch"] = other / seconds
    name = "decode_small" if args.small else "decode"
    raise SystemExit(0 if report(name, figures, {} if args.small else limits, args.write) else 1)


if __name__ == "__main__":
    main()
