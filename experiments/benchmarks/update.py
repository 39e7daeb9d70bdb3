"""Update and scoring at real size: python -m experiments.benchmarks.update [--torch] [--write]

Random weights in the shape of DeepSeek-R1-Distill-Qwen-1.5B (--shape: another config.json), rows of
16k tokens, one response each. Prints tokens per second, and the share of the matrix product rate that
is measured first (MFU; FLOPs by the formula of compile_check, without what is computed again). --torch
does the same work with `transformers` in the same process, on the same device. --small is for a
machine without an accelerator. Medians of three.
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
from prolong_jax.compile_check import forward_flops
from prolong_jax.config import ASSETS, LossSettings, MeshSettings, ModelSettings, OptimizerSettings
from prolong_jax.mesh import make_mesh, param_shardings
from prolong_jax.models.decoder import Model, for_training
from prolong_jax.models.hf import read_config
from prolong_jax.optimizer import make_optimizer
from prolong_jax.packing import Conversation, pack
from prolong_jax.types import TrainState
from prolong_jax.update import make_score, make_update, put_rows

REPEATS, PROMPT = 3, 512
SHAPE = ASSETS / "shapes" / "qwen2_1p5b_r1.json"
LIMITS = {"update_mfu": ("at least", 0.45)}
SMALL = {"width": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
SMALL |= {"ff_dim": 1024, "vocab_size": 16_384}


def seconds(work: Callable[[], Any]) -> float:
    """Median of three, after one that compiles."""
    jax.block_until_ready(work())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(size: int, dtype: jnp.dtype) -> float:
    """FLOP/s of square matrix products on one device."""
    x = jnp.ones((size, size), dtype)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: (x @ y) / size, x))
    return 20 * 2 * size**3 / seconds(lambda: chain(x))


def conversations(count: int, row_len: int, vocab_size: int) -> list[Conversation]:
    rng = np.random.default_rng(0)
    length = row_len - PROMPT if row_len > 2 * PROMPT else row_len // 2

    def tokens(number: int) -> np.ndarray:
        return rng.integers(0, vocab_size, number).astype(np.int32)

    logp = np.full(length, -np.log(vocab_size), np.float32)
    return [
        Conversation(tokens(row_len - length), tokens(length), logp, float(rng.normal()))
        for _ in range(count)
    ]


def ours(model: Model, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of scoring (policy and reference) and of the update, all devices."""
    mesh = make_mesh(MeshSettings(fsdp=jax.device_count()))
    trained = for_training(model, mesh, ModelSettings(remat=args.remat, attention=args.attention))
    optimizer = make_optimizer(OptimizerSettings())
    shardings = param_shardings(mesh, model.shapes())
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    state = TrainState(params, jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params))
    rows = args.rows * jax.device_count()
    items = conversations(rows * args.micro_batches, args.row_len, model.config.vocab_size)
    sizes = {"row_len": args.row_len, "micro_batch_rows": rows, "micro_batches": args.micro_batches}
    host_batch, used = pack(items, **sizes, layout=trained.layout)
    batch = put_rows(mesh, host_batch)
    score = make_score(trained, 1.0)
    update = make_update(trained, optimizer, mesh, LossSettings(), 1.0)
    scored = score(state, batch, used)

    def step() -> Any:
        nonlocal state
        state, metrics = update(state, scored, used)
        return metrics

    tokens = used * rows * args.row_len
    found = {
        "score_tokens_per_s": tokens / seconds(lambda: score(state, batch, used)),
        "update_tokens_per_s": tokens / seconds(step),
    }
    forward = forward_flops(model.config, 1, args.row_len / 2, 1)
    rate = matmul_rate(2048 if args.small else 8192, model.dtype) * jax.device_count()
    found["matmul_tflops"] = rate / 1e12
    found["score_mfu"] = found["score_tokens_per_s"] * 2 * forward / rate
    found["update_mfu"] = found["update_tokens_per_s"] * 3 * forward / rate
    return found


def with_torch(model: Model, args: argparse.Namespace) -> float:
    """Tokens per second of the same update in `transformers`, on one device.

    bfloat16 products, layers computed again, logits in chunks computed again, fused AdamW on float32
    weights.
    """
    import torch
    from torch.utils.checkpoint import checkpoint
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
    )
    config._attn_implementation = "sdpa"
    network: Any = Qwen2ForCausalLM(config)
    network = network.to(device).train()
    network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-6, fused=True)
    items = conversations(args.rows * args.micro_batches, args.row_len, shape.vocab_size)

    def logp(hidden: Any, targets: Any) -> Any:
        logits = network.lm_head(hidden).float()
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    def step() -> None:
        for item in items:
            tokens = torch.tensor(np.append(item.prompt, item.response)[None], device=device)
            with torch.autocast(device, torch.bfloat16, enabled=model.dtype == jnp.bfloat16):
                hidden = network.model(tokens.long()).last_hidden_state[
                    0, len(item.prompt) - 1 : -1
                ]
                targets = torch.tensor(item.response, device=device).long()
                chunks = zip(hidden.split(2048), targets.split(2048), strict=True)
                parts = [checkpoint(logp, *chunk, use_reentrant=False) for chunk in chunks]
            now: Any = torch.cat(parts)
            ratio = torch.exp(now - now.detach())
            (-(ratio * item.advantage).mean() / len(items)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return args.rows * args.micro_batches * args.row_len / seconds(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", type=Path, default=SHAPE, help="a Hugging Face config.json")
    parser.add_argument("--row_len", type=int, default=16_384)
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch, on each device")
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--remat", default="layer")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--write", action="store_true", help="make the figures the baseline")
    args = parser.parse_args()
    config, dtype = read_config(args.shape), jnp.bfloat16
    if args.small:
        config, dtype = dataclasses.replace(config, **SMALL), jnp.float32
        args.row_len = min(args.row_len, 2048)
    model = Model(config, jnp.dtype(dtype))
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, rows of {args.row_len} tokens", flush=True)
    figures = ours(model, args)
    if args.torch:
        figures["torch_update_tokens_per_s"] = with_torch(model, args)
        ratio = figures["update_tokens_per_s"] / figures["torch_update_tokens_per_s"]
        figures["update_over_torch"] = ratio
    name = "update_small" if args.small else "update"
    raise SystemExit(0 if report(name, figures, {} if args.small else LIMITS, args.write) else 1)


if __name__ == "__main__":
    main()
