"""Verification behind sampling: python -m experiments.benchmarks.overlap

Samples the embedded tasks with a model of the embedded one's shape and random weights, whose responses
have geometric lengths (mean 128, at most 512 tokens), and has every response judged in the real pool:
in one case by a program that takes 200 ms in the sandbox, in the other not at all ("sampling
alone"). Asked: as long as the pool has the capacity, the first takes at most 10% longer. Both cases
alternate in one process, on other prompts in each repetition; wall seconds, medians of REPEATS.
Sampling has one core and the workers have the others, so that they do not compete for one.
"""

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.common import machine, report, wants_to_write
from prolong_jax.config import TINY_BASE, MeshSettings, RolloutSettings
from prolong_jax.data.mixture import prompt_at
from prolong_jax.mesh import make_mesh
from prolong_jax.models.decoder import sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.next_token import SamplingRule
from prolong_jax.processes import Timer
from prolong_jax.rollout import Collector, Plan, sample_groups
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.verifiers import Verdict
from prolong_jax.verifiers.pool import Pool

DELAY_S, WORKERS, REPEATS = 0.2, 16, 5
PROMPTS, GROUP_SIZE = 40, 8
PROGRAM = "```python\nimport time\ndef f(x): time.sleep({delay}); return x  # {number}\n```"
REFERENCE = {"fn_name": "f", "inputs": [[1]], "outputs": [1]}
LIMITS = {"slow_over_none": ("at most", 1.1)}


class SlowPool(Pool):
    """Every item is a program of its own that sleeps in the sandbox."""

    count = 0

    def submit(self, item_id: Any, verifier: str, response: str, reference: Mapping) -> None:
        self.count += 1
        program = PROGRAM.format(delay=DELAY_S, number=self.count)
        super().submit(item_id, "code", program, REFERENCE)


class NoPool:
    """Every item has its verdict at once."""

    def __init__(self):
        self.items: list[Any] = []

    def submit(self, item_id: Any, *_: Any) -> None:
        self.items.append(item_id)

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Any, Verdict]]:
        found, self.items = self.items, []
        return [(item_id, Verdict(1.0)) for item_id in found]

    as_completed = poll


def main() -> None:
    write = wants_to_write(__doc__)
    first, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others or [first])  # the workers' cores
    with SlowPool(WORKERS, time_limit_s=20.0) as slow:
        slow.check(["code"])
        os.sched_setaffinity(0, [first])  # that of sampling, whose threads start after this
        took, late = measure({"none": NoPool(), "slow": slow})
    ratios = [b / a for a, b in zip(took["none"], took["slow"], strict=True)]
    figures = {f"{name}_s": statistics.median(seconds) for name, seconds in took.items()}
    figures |= {"after_sampling_s": late, "slow_over_none": statistics.median(ratios)}
    report("overlap", figures, LIMITS, write)


def measure(pools: Mapping[str, Any]) -> tuple[dict[str, list[float]], float]:
    """Seconds of each step with each pool, and the median of those after sampling with the slow one."""
    mesh, tokenizer = make_mesh(MeshSettings()), ChatTokenizer(TINY_BASE)
    model, _ = load_model(TINY_BASE, jnp.dtype("float32"), mesh)
    params = sampling_copy(model, mesh, model.init(jax.random.key(0)))
    settings = RolloutSettings(
        prompts_per_step=PROMPTS, group_size=GROUP_SIZE, max_prompt_len=64, max_response_len=512,
        sample_rows=64, cache_lens=2, compile_ahead=False,
    )  # fmt: skip
    rule = SamplingRule(tuple(range(model.config.vocab_size // 128)))
    print(
        f"{machine()}, {WORKERS} workers, {PROMPTS * GROUP_SIZE} items of {DELAY_S} s", flush=True
    )
    took: dict[str, list[float]] = {name: [] for name in pools}
    late: list[float] = []
    for step in range(1 + REPEATS):
        numbers = range(step * PROMPTS, (step + 1) * PROMPTS)
        prompts = [prompt_at(n, 0, {"math": 1.0}, {"easy": 1.0}) for n in numbers]
        for name, pool in pools.items():
            timer, start = Timer(), time.perf_counter()
            collector = Collector(model, mesh, tokenizer, pool, 0)
            plan = Plan(settings, GROUP_SIZE, rule, step)
            groups = sample_groups(collector, params, prompts, plan, timer)
            seconds = time.perf_counter() - start
            assert all(g.scores == [1.0] * GROUP_SIZE for g in groups)
            if step:  # the first one compiles
                took[name].append(seconds)
                late += [timer.take()[0]["verify"]] if name == "slow" else []
    return took, statistics.median(late)


if __name__ == "__main__":
    main()
