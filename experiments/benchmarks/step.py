"""One GRPO step beside its peers:

python -m experiments.benchmarks.step --tunix_python=A/bin/python --trl_python=B/bin/python [--write]

The same work for all: 4 layers of width 256 (feed-forward 768, 8 query and 4 kv heads of 32, a
vocabulary of 1,024, tied), 8 prompts of 32 tokens in groups of 8, 128 new tokens, float32, reference
forward pass, AdamW. Each program runs in processes of its own on one core, alternating; figures are
CPU-seconds, medians over processes of medians over steps, warm-up left out. The peers, either or
both, need environments of their own; README.md has the commands that make them.

--long_tail makes one token in 32 a stop token for ours: lengths are geometric with a mean near 32, at
most 128. The peers decode until the last response ends, near 128, and train on padded rows, so that
their figures are those of full lengths. --huge_pages starts all with transparent huge pages for
malloc. --side=ours runs ours alone, --batch_synchronous also decodes without dropping or refilling.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.common import report

PHASES = ("rollout", "reference", "update")
PEERS = ("tunix", "trl")
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
        begin, wall = cpu_s(), time.monotonic()
        prompts = [[1, *rng.integers(3, 1024, 31).tolist()] for _ in range(8)]
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
        rows[-1] |= {"step": cpu_s() - begin, "step_wall": time.monotonic() - wall}
        useful = sum(len(tokens) for group in groups.values() for tokens, _ in group)
        rows[-1] |= {"useful_tokens": useful, "useful_tokens_per_s": useful / marks[0]}
    return summary(rows[WARM_UP:])


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, the peak of memory, and versions."""
    import jax

    found: dict[str, Any] = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {"versions": f"jax {jax.__version__}, python {sys.version.split()[0]}"}


def run(side: str, args: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """One process on one core; its last line is JSON."""
    here = Path(__file__).parent
    if side in PEERS:
        command = [getattr(args, f"{side}_python"), str(here / f"step_{side}.py")]
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


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    """Prints median and range of each side, and by how much ours is smaller."""
    peers = [side for side in found if side in PEERS]
    heads = ["ours", *peers]
    print("\nCPU-s: median of processes (least, most)")
    print(f"{'':10}" + "".join(f"{side:>22}" for side in heads + [f"{p} / ours" for p in peers]))
    for key in (*PHASES, "step", "step_wall", "peak_gb"):
        values = {side: sorted(run[key] for run in found[side]) for side in heads}
        middle = {side: statistics.median(of) for side, of in values.items()}
        cells = [f"{middle[s]:.3f} ({values[s][0]:.3f}, {values[s][-1]:.3f})" for s in heads]
        cells += [f"{middle[peer] / middle['ours']:.2f}" for peer in peers]
        print(f"{key:10}" + "".join(f"{cell:>22}" for cell in cells))
    for side in found:
        print(f"{side}: {found[side][0]['versions']}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One GRPO step beside its peers")
    parser.add_argument("--tunix_python", default="", help="of an environment with google-tunix")
    parser.add_argument("--trl_python", default="", help="of an environment with trl")
    parser.add_argument("--side", default="all", choices=("all", "ours"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3, help="of each program")
    parser.add_argument("--long_tail", action="store_true")
    parser.add_argument("--batch_synchronous", action="store_true")
    parser.add_argument("--huge_pages", action="store_true")
    parser.add_argument("--write", action="store_true", help="make the figures the baseline")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.side == "ours":
        print(json.dumps(ours(args)))
        return
    tail = ("--long_tail",) if args.long_tail else ()
    sides: dict[str, tuple[str, ...]] = {
        peer: () for peer in PEERS if getattr(args, f"{peer}_python")
    }
    sides["ours"] = tail
    if args.long_tail:
        sides["synchronous"] = (*tail, "--batch_synchronous")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(args.processes):
        for side, flags in sides.items():
            found[side].append(run(side, args, *flags))
            shown = {k: round(v, 3) for k, v in found[side][-1].items() if k != "versions"}
            print(side, shown, flush=True)
    table(found)

    def median(side: str, key: str) -> float:
        return statistics.median(run[key] for run in found[side])

    print("\nbeside the baseline, and what is asked:")
    figures = {f"ours_{key}": median("ours", key) for key in (*PHASES, "step", "peak_gb")}
    for peer in PEERS:
        if peer in found:
            figures |= {f"{peer}_by_ours_{k}": median(peer, k) / median("ours", k) for k in LIMITS}
    limits = {f"tunix_by_ours_{key}": ("at least", limit) for key, limit in LIMITS.items()}
    report("step", figures, limits, args.write)
    if args.long_tail:
        rates = [median(side, "useful_tokens_per_s") for side in ("ours", "synchronous")]
        print(
            "useful tokens per CPU-s: ours {:.0f}, synchronous {:.0f}, ratio {:.2f}".format(
                *rates, rates[0] / rates[1]
            )
        )


if __name__ == "__main__":
    main()
