"""One GRPO step beside tunix: python -m experiments.benchmarks.step --tunix_python=VENV/bin/python

The same work for both: 4 layers of width 256 (feed-forward 768, 8 query and 4 kv heads of 32, a
vocabulary of 1,024, tied), 8 prompts of 32 tokens in groups of 8, 128 new tokens, float32, reference
forward pass, AdamW. Each program runs in processes of its own on one core, alternating; figures are
CPU-seconds, medians over processes of medians over steps, warm-up left out. tunix needs an
environment of its own: pip install google-tunix==0.1.7 jax.

--long_tail makes one token in 32 a stop token for ours: lengths are geometric with a mean near 32, at
most 128. tunix decodes until the last response ends, near 128, and trains on padded rows, so that its
figures are those of full lengths. --huge_pages starts both with transparent huge pages for
malloc. --side=ours runs ours alone, --batch_synchronous also decodes without dropping or refilling.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PHASES = ("rollout", "reference", "update")
WARM_UP = 3
LIMITS = {"rollout": 2.5, "reference": 1.8, "update": 3.0, "step": 3.0}


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ours(args: argparse.Namespace) -> dict[str, float]:
    """Median CPU-seconds of the phases of a step, from the parts that the training loop uses."""
    import jax
    import numpy as np

    from prolong_jax.advantages import group_advantage
    from prolong_jax.config import LossSettings, MeshSettings, ModelSettings, OptimizerSettings
    from prolong_jax.mesh import make_mesh
    from prolong_jax.models.decoder import Model, ModelConfig, for_training
    from prolong_jax.next_token import SamplingRule, sample_keys
    from prolong_jax.optimizer import make_optimizer
    from prolong_jax.packing import Conversation, pack
    from prolong_jax.sampler import generate
    from prolong_jax.slots import Request, Slots
    from prolong_jax.types import TrainState
    from prolong_jax.update import make_score, make_update, put_rows

    sizes = {"vocab_size": 1024, "width": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4}
    sizes |= {"head_dim": 32, "ff_dim": 768, "max_positions": 4096}
    shape: Any = {**sizes, "rope_theta": 1e6, "norm_eps": 1e-6, "tied_head": True}
    model = Model(ModelConfig(**shape, qkv_bias=False, qk_norm=True))
    mesh, optimizer = (
        make_mesh(MeshSettings()),
        make_optimizer(OptimizerSettings(learning_rate=1e-3)),
    )
    # A row holds a prompt and its group; with long tails less of one suffices.
    lanes = 3 if args.long_tail else 8
    layout, row_len = (32, lanes), 32 + lanes * 129
    trained = for_training(model, mesh, ModelSettings(dtype="float32", remat="none"), layout)
    params = model.init(jax.random.key(0))
    state = TrainState(params, jax.tree.map(jax.numpy.copy, params), optimizer.init(params))
    score = make_score(trained, 1.0, policy=False)
    loss = LossSettings(kl_coef=1e-3)
    update = make_update(trained, optimizer, mesh, loss, 1.0, on_policy=True)
    rng, stops = np.random.default_rng(0), tuple(range(32)) if args.long_tail else (2000,)
    rule = SamplingRule((2000,) if args.batch_synchronous else stops)  # 2000 is never drawn
    slots = Slots(rows=64, max_prompt_len=32, max_response_len=128)
    rows: list[dict[str, float]] = []
    for step in range(WARM_UP + args.steps):
        begin = cpu_s()
        prompts = [rng.integers(3, 1024, 32).tolist() for _ in range(8)]
        keys = sample_keys(0, step, range(8), 8)
        asked = [Request(i, prompts[i], keys[i], 128) for i in range(8)]
        left, start = iter([asked]), cpu_s()
        samples = list(generate(model, state.params, lambda _, n=left: next(n, []), rule, slots))
        marks = [cpu_s() - start]
        groups: dict[int, list[Any]] = {}
        for sample in samples:  # a synchronous sampler goes on behind the stop token
            ends = np.flatnonzero(np.isin(sample.tokens, stops))[:1] + 1
            kept = int(ends[0]) if len(ends) else 128
            groups.setdefault(sample.id, []).append((sample.tokens[:kept], sample.logp[:kept]))
        items = []
        for i, group in groups.items():
            even = np.array([np.mean(np.array(tokens) % 2 == 0) for tokens, _ in group])
            advantages = group_advantage(even, np.ones(8, bool))
            items += [
                Conversation(np.array(prompts[i]), np.array(t), np.array(logp), float(a))
                for (t, logp), a in zip(group, advantages, strict=True)
            ]
        host, used = pack(
            items,
            row_len=row_len,
            micro_batch_rows=1,
            micro_batches=32,
            layout=trained.layout,
        )
        batch, start = put_rows(mesh, host), cpu_s()
        scored = jax.block_until_ready(score(state, batch, used))
        marks.append(cpu_s() - start)
        start = cpu_s()
        state, _ = jax.block_until_ready(update(state, scored, used))
        marks.append(cpu_s() - start)
        rows.append(dict(zip(PHASES, marks, strict=True)))
        rows[-1]["step"] = cpu_s() - begin
        useful = sum(len(tokens) for group in groups.values() for tokens, _ in group)
        rows[-1] |= {"useful_tokens": useful, "useful_tokens_per_s": useful / marks[0]}
    return summary(rows[WARM_UP:])


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and the peak of memory."""
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return found | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run(side: str, args: argparse.Namespace, *flags: str) -> dict[str, float]:
    """One process on one core; its last line is JSON."""
    here = Path(__file__).parent
    if side == "tunix":
        command = [args.tunix_python, str(here / "step_tunix.py"), f"--steps={args.steps}"]
    else:
        command = [sys.executable, "-m", "experiments.benchmarks.step", "--side=ours"]
        command += [f"--steps={args.steps}", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    if args.huge_pages:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    done = subprocess.run(
        core + command, env=environment, cwd=here.parents[1], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tunix_python", default="", help="of an environment with google-tunix")
    parser.add_argument("--side", default="both", choices=("both", "ours"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3, help="of each program")
    parser.add_argument("--long_tail", action="store_true")
    parser.add_argument("--batch_synchronous", action="store_true")
    parser.add_argument("--huge_pages", action="store_true")
    args = parser.parse_args()
    if args.side == "ours":
        print(json.dumps(ours(args)))
        return
    tail = ["--long_tail"] if args.long_tail else []
    sides = {"tunix": (), "ours": tail}
    if args.long_tail:
        sides["synchronous"] = (*tail, "--batch_synchronous")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(args.processes):
        for side, flags in sides.items():
            found[side].append(run(side, args, *flags))
            print(side, {k: round(v, 3) for k, v in found[side][-1].items()}, flush=True)
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for side, runs in found.items()
    }
    print(f"\n{'CPU-s':12}{'tunix':>9}{'ours':>9}{'ratio':>8}{'wanted':>8}")
    for phase, limit in LIMITS.items():
        one, other = medians["tunix"][phase], medians["ours"][phase]
        print(f"{phase:12}{one:9.3f}{other:9.3f}{one / other:8.2f}{limit:8.1f}")
    print(f"{'peak GB':12}{medians['tunix']['peak_gb']:9.2f}{medians['ours']['peak_gb']:9.2f}")
    if args.long_tail:
        rates = [medians[side]["useful_tokens_per_s"] for side in ("ours", "synchronous")]
        print(
            "useful tokens per CPU-s: ours {:.0f}, synchronous {:.0f}, ratio {:.2f}".format(
                *rates, rates[0] / rates[1]
            )
        )


if __name__ == "__main__":
    main()
