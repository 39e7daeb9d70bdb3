"""avg@k and pass@k on held-out prompts, with the sampler and the verifiers of the training.

Alone, for the model that a configuration starts from (or another one, by --config.model.path):

    python -m prolong_jax.evaluate --config=experiments/configs/tiny.py [--config.KEY=VALUE]
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from prolong_jax.config import DOMAINS, LEVELS, RunConfig, parse
from prolong_jax.data.procedural import validation_prompts
from prolong_jax.data.prompts import Prompt
from prolong_jax.groups import Group
from prolong_jax.mesh import make_mesh
from prolong_jax.models.decoder import sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.next_token import SamplingRule
from prolong_jax.processes import Timer, start
from prolong_jax.rollout import Collector, Plan, sample_groups
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.types import PyTree
from prolong_jax.verifiers.pool import open_pool

# Scored strictly right or wrong at evaluation (arXiv 2505.24864, section 3.4); the others by
# their continuous reward.
BINARY_DOMAINS = ("math", "code", "stem")
SUBSETS: Mapping[str, Callable[[Prompt], bool]] = {
    **{domain: lambda p, domain=domain: p.domain == domain for domain in DOMAINS},
    "all": lambda p: True,
    "easy_middle": lambda p: p.level in ("easy", "middle"),
    "hard": lambda p: p.level == "hard",
}


def held_out_prompts(run: RunConfig) -> list[Prompt]:
    """The validation prompts of a run: the same for every policy that it evaluates."""
    settings = run.validation
    return validation_prompts(DOMAINS, LEVELS, settings.prompts_per_level, settings.seed)


def evaluate(
    collector: Collector,
    params: PyTree,
    prompts: Sequence[Prompt],
    samples: int,
    run: RunConfig,
    step: int,
    timer: Timer,
) -> tuple[dict[str, dict[str, Any]], list[Group]]:
    """Samples k = `samples` responses to each prompt and summarises their scores.

    Args:
      collector: model, tokenizer, verifiers.
      params: the policy.
      prompts: held-out prompts.
      samples: k.
      run: for the sampling rule and the size of a sampling batch.
      step: training steps so far, part of every sample's key.
      timer: adds up the seconds.

    Returns:
      For each name in SUBSETS: {"avg_at_k", "k", "ci95": [low, high], "pass_at_k"}; and the groups.
    """
    settings = run.validation
    rule = SamplingRule(
        stop_ids=collector.tokenizer.stop_ids,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
    )
    plan = Plan(run.rollout, samples, rule, step)
    groups = sample_groups(collector, params, prompts, plan, timer)
    return summarise(groups), groups


def summarise(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """The table of an evaluation, one row for each subset that has prompts."""
    table = {}
    for name, belongs in SUBSETS.items():
        chosen = [g for g in groups if belongs(g.prompt) and g.scored.any()]
        if not chosen:
            continue
        average = np.array([_scores(g).mean() for g in chosen])
        solved = np.array([(np.array(g.scores)[g.scored] >= 1).any() for g in chosen])
        table[name] = {
            "avg_at_k": float(average.mean()),
            "k": len(chosen[0].scores),
            "ci95": bootstrap_interval(average),
            "pass_at_k": float(solved.mean()),
        }
    return table


def _scores(group: Group) -> np.ndarray:
    scores = np.array(group.scores)[group.scored]
    return (scores >= 1).astype(float) if group.prompt.domain in BINARY_DOMAINS else scores


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> list[float]:
    """95% percentile interval of the mean, by resampling the values (prompts) with replacement."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (resamples, len(values))).mean(axis=1)
    return [float(q) for q in np.quantile(means, (0.025, 0.975))]


def by_level(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """The table of an evaluation, one row for each domain and level."""
    cells: dict[str, list[Group]] = {}
    for group in groups:
        cells.setdefault(f"{group.prompt.domain}/{group.prompt.level}", []).append(group)
    return {name: summarise(chosen)["all"] for name, chosen in cells.items()}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run = parse(sys.argv[1:] if argv is None else argv)[0]
        start(run.mesh)
        mesh, dtype = make_mesh(run.mesh), jnp.dtype(run.model.dtype)
        model, params = load_model(run.model.path, dtype, mesh, random=run.model.random)
        tokenizer = ChatTokenizer(run.model.path)
        with open_pool(run.verifiers) as pool:
            pool.check(DOMAINS)
            collector = Collector(model, mesh, tokenizer, pool, run.seed)
            params = sampling_copy(model, mesh, params)
            prompts, samples = held_out_prompts(run), run.validation.final_samples
            table, groups = evaluate(collector, params, prompts, samples, run, 0, Timer())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'':16}avg@{samples}  95% interval     pass@{samples}")
    for name, row in (table | by_level(groups)).items():
        low, high = row["ci95"]
        print(f"{name:16}{row['avg_at_k']:.3f}   [{low:.3f}, {high:.3f}]   {row['pass_at_k']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
