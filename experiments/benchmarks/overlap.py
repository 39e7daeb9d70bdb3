"""Verification behind sampling: python -m experiments.benchmarks.overlap

Samples the embedded tasks with the embedded model, and has every response judged in the real pool:
in one case by a program that takes 200 ms in the sandbox, in the other not at all ("sampling
alone"). Asked: as long as the pool has the capacity, the first takes at most 10% longer. Both cases
alternate in one process, on other prompts in each repetition; wall seconds, medians of REPEATS.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

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
PROMPTS, GROUP_SIZE = 32, 8
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
    mesh, tokenizer = make_mesh(MeshSettings()), ChatTokenizer(TINY_BASE)
    model, params = load_model(TINY_BASE, jnp.dtype("float32"), mesh)
    params = sampling_copy(model, mesh, params)
    settings = RolloutSettings(
        prompts_per_step=PROMPTS, group_size=GROUP_SIZE, max_prompt_len=64, max_response_len=256,
        sample_rows=64, cache_lens=2, compile_ahead=False,
    )  # fmt: skip
    rule = SamplingRule((), 1.0)  # nothing stops: every response has its full length
    print(
        f"{machine()}, {WORKERS} workers, {PROMPTS * GROUP_SIZE} items of {DELAY_S} s", flush=True
    )
    with SlowPool(WORKERS, time_limit_s=20.0) as slow:
        slow.check(["code"])
        took: dict[str, list[float]] = {"none": [], "slow": []}
        late: list[float] = []
        pools: dict[str, Any] = {"none": NoPool(), "slow": slow}
        compiled: set = set()
        for step in range(1 + REPEATS):
            prompts = [
                prompt_at(step * PROMPTS + n, 0, {"math": 1.0}, {"easy": 1.0})
                for n in range(PROMPTS)
            ]
            for name, pool in pools.items():
                timer, start = Timer(), time.perf_counter()
                collector = Collector(model, mesh, tokenizer, pool, 0, compiled)
                plan = Plan(settings, GROUP_SIZE, rule, step)
                groups = sample_groups(collector, params, prompts, plan, timer)
                seconds = time.perf_counter() - start
                assert all(g.scores == [1.0] * GROUP_SIZE for g in groups)
                if step:
                    took[name].append(seconds)
                    late += [timer.take()[0]["verify"]] if name == "slow" else []
    none, other = statistics.median(took["none"]), statistics.median(took["slow"])
    figures = {"none_s": none, "slow_s": other, "after_sampling_s": statistics.median(late)}
    ratios = [b / a for a, b in zip(took["none"], took["slow"], strict=True)]
    report("overlap", figures | {"slow_over_none": statistics.median(ratios)}, LIMITS, write)


if __name__ == "__main__":
    main()
