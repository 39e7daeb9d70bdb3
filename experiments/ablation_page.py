"""Tables, figures and text of the ablations, made of what ablations.json holds.

An ablation is there as {"base": scores, "variants": {variant: {seed: run}}}. A run has
"series" (lists over its steps), "resets" (steps) and "scores": by step, {"samples", "solved"}, where
"solved" counts the right responses to each prompt.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prolong_jax.charts import HEIGHT, WIDTH, Frame, Line, chart, text
from prolong_jax.config import ASSETS
from prolong_jax.scores import pass_at_k

RESAMPLES = 4000
LAST = 10  # steps whose mean entropy and KL are told
OVER = 5  # steps of a moving mean in the figures
PANELS = {
    "reward": "Reward of fresh training prompts",
    "entropy": "Entropy, nats per token",
    "kl": "KL to the reference, nats per token",
}

INTRODUCTION = """# The paper's ablations in miniature

Made by `python -m experiments.ablations page` of [ablations.json](ablations.json); do not edit.

The embedded model (1.08M parameters) on embedded math and STEM tasks: 32 steps, each with 4 prompts of
8 responses and one optimizer step per prompt, unless a variant says otherwise
([base.py](configs/ablations/base.py)). Every variant has the same seeds, training prompts in the same order, and
samples to train on, up to groups that dynamic sampling did not find in its two rounds ("trained on"); "generated" are
tokens, those of dropped groups too.

- **Scores.** avg@k is the mean share of right responses, k samples at temperature 1 to each of 96 held-out
  prompts, whose questions occur in no training prompt; pass@k is without bias. The base model has 0.33.
- **Intervals.** 95%, bootstrap: seeds and prompts are drawn anew, a prompt for all seeds and variants at
  once. Differences are paired by seed and prompt. Three seeds are few, and their bootstrap is too narrow (by about a
  fifth where seeds are all that varies, more for their tails), so the mean of every seed stands beside it.
- **Entropy and KL** are means over the last ten steps and the seeds, in nats per token; after a reset the KL is to the
  new reference.
- **Two learning rates.** At 2e-4 the run is steady. At 5e-4 it runs away from its reference within some twenty steps
  and ends no better than the base: trouble that is real. Settings were sought on other seeds (101 to 103), by training
  rewards alone; then runs were shortened from 40 to 32 steps, for time, after a first look at one of seed 0.
- **Code.** All runs are of one state of the code; later changes of presets leave these settings as they were.

What this can tell: whether a mechanism does at this size what it is said to do, and that the code does it. What it
cannot: sizes of effects for a large model, or anything about thousands of steps. The base has little entropy
(0.1 nats per token) because it was taught by worked responses, answers have some twenty tokens, and 32 steps are
short: what comes out here neither proves nor disproves a claim about 1.5B parameters."""

Scores = Mapping[str, Any]  # {"samples": n, "solved": counts over prompts}
Runs = Mapping[str, Mapping[str, Any]]  # of a variant, by seed
Interval = tuple[float, float, float]  # mean, low, high


# --- statistics ----------------------------------------------------------------------------------


def passes(scores: Scores, k: int) -> np.ndarray:
    """f64 [P]: pass@k of every prompt, without bias; at k = 1 its share of right responses."""
    return np.array([pass_at_k(solved, scores["samples"], k) for solved in scores["solved"]])


def interval(values_SP: np.ndarray) -> Interval:
    """Mean over seeds and prompts, and its 95% bootstrap interval.

    Seeds and prompts are drawn anew, each with replacement, and a prompt is drawn for all seeds at
    once, because all runs answer the same prompts.
    """
    rng = np.random.default_rng(0)
    shares = []
    for size in values_SP.shape:
        drawn = rng.integers(0, size, (RESAMPLES, size))
        shares.append(np.stack([np.bincount(row, minlength=size) for row in drawn]) / size)
    means = ((shares[0] @ values_SP) * shares[1]).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values_SP.mean()), float(low), float(high)


def of_seeds(runs: Runs, step: str, k: int) -> dict[str, np.ndarray]:
    """By seed, pass@k of every prompt after `step`."""
    return {seed: passes(run["scores"][step], k) for seed, run in runs.items()}


def difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> Interval | None:
    """one - other, paired by seed and prompt; None without a seed that both have."""
    both = [seed for seed in one if seed in other]
    return interval(np.stack([one[s] - other[s] for s in both])) if both else None


def final_step(runs: Runs, seed: str) -> str:
    return max(runs[seed]["scores"], key=int)


def at_end(runs: Runs, k: int) -> dict[str, np.ndarray]:
    """By seed, pass@k of every prompt where the run was scored last."""
    return {seed: passes(runs[seed]["scores"][final_step(runs, seed)], k) for seed in runs}


def tail(runs: Runs, name: str) -> float:
    """Mean over seeds of a series' last known values up to the step that was scored."""
    means = []
    for seed, run in runs.items():
        values = run["series"][name][: int(final_step(runs, seed))]
        means.append(np.mean([v for v in values if v is not None][-LAST:]))
    return float(np.mean(means))


def total(runs: Runs, name: str) -> float:
    """Mean over seeds of a series' sum up to the step that was scored."""
    ends = {seed: int(final_step(runs, seed)) for seed in runs}
    return float(np.mean([sum(runs[s]["series"][name][:end]) for s, end in ends.items()]))


# --- text ----------------------------------------------------------------------------------------


def signed(found: Interval | None) -> str:
    return "" if found is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)


def plain(found: Interval) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def comparison(found: Mapping[str, Any]) -> str:
    """The table of an ablation: a row for every variant, compared with the first one."""
    variants: Mapping[str, Runs] = found["variants"]
    first, samples = next(iter(variants.values())), most_samples(found)
    rows = [
        ["variant", "trained on", "generated", f"avg@{samples} [95%]", "by seed"]
        + [f"pass@{samples}", "against the first [95%]", "entropy", "KL"]
    ]
    for name, runs in variants.items():
        averages = at_end(runs, 1)
        by_seed = ", ".join(f"{x.mean():.3f}" for x in averages.values())
        solved = float(np.mean([x.mean() for x in at_end(runs, samples).values()]))
        against = "" if runs is first else signed(difference(averages, at_end(first, 1)))
        rows.append(
            [name, f"{total(runs, 'trained'):,.0f}", f"{total(runs, 'tokens') / 1000:.1f}k"]
            + [plain(interval(np.stack(list(averages.values())))), by_seed, f"{solved:.3f}"]
            + [against, f"{tail(runs, 'entropy'):.3f}", f"{tail(runs, 'kl'):.3f}"]
        )
    return table(rows)


def most_samples(found: Mapping[str, Any]) -> int:
    """Responses to a prompt in the evaluations of an ablation."""
    runs = next(iter(found["variants"].values()))
    return next(iter(next(iter(runs.values()))["scores"].values()))["samples"]


def boundary(found: Mapping[str, Any]) -> str:
    """pass@k of the base and of a run's policies, and what the base never solved."""
    base, (runs,) = found["base"], found["variants"].values()
    early, late = sorted(next(iter(runs.values()))["scores"], key=int)
    rows = [["k", "base", f"{early} steps", f"{late} steps"]]
    rows[0] += [f"{late} - {early} steps [95%]", f"{late} steps - base [95%]"]
    for k in (1, 4, 16, most_samples(found)):
        of_base, before, after = passes(base, k), of_seeds(runs, early, k), of_seeds(runs, late, k)
        rows.append(
            [str(k), plain(interval(of_base[None]))]
            + [plain(interval(np.stack(list(x.values())))) for x in (before, after)]
            + [signed(difference(after, before))]
            + [signed(difference(after, dict.fromkeys(after, of_base)))]
        )
    never = [i for i, solved in enumerate(base["solved"]) if solved == 0]
    told = []
    for step in (early, late):
        scores = {seed: run["scores"][step]["solved"] for seed, run in runs.items()}
        counts = [sum(solved[i] > 0 for i in never) for solved in scores.values()]
        told.append(f"after {step} steps {', '.join(map(str, counts))}")
    lost = [
        sum(b > 0 == a for a, b in zip(run["scores"][late]["solved"], base["solved"], strict=True))
        for run in runs.values()
    ]
    return (
        f"{table(rows)}\n\nOf {len(base['solved'])} prompts the base never solved {len(never)} in "
        f"{base['samples']} samples. Of these, the policies of the seeds solved, in "
        f"{most_samples(found)} samples: {'; '.join(told)}. Prompts that the base solved and the "
        f"policy after {late} steps did not: {', '.join(map(str, lost))}."
    )


# --- figures -------------------------------------------------------------------------------------


def smooth(runs: Runs, name: str) -> list[tuple[int, float | None]]:
    """Mean over seeds of a series, as a moving mean over OVER steps."""
    steps = max(len(run["series"][name]) for run in runs.values())
    points = []
    for end in range(1, steps + 1):
        values = [v for run in runs.values() for v in run["series"][name][max(0, end - OVER) : end]]
        known = [v for v in values if v is not None]
        points.append((end, float(np.mean(known)) if known else None))
    return points


def styles(names: Sequence[str]) -> dict[str, str]:
    """A colour for each variant; one with resets has that of the one without, dashed."""
    plain_names = list(dict.fromkeys(name.removesuffix(", resets") for name in names))
    return {
        name: f"c{plain_names.index(name.removesuffix(', resets')) % 6}"
        + (" dashed" if name.endswith(", resets") else "")
        for name in names
    }


def figure(found: Mapping[str, Any]) -> str:
    """An SVG file of one panel for each series, means over seeds."""
    variants: Mapping[str, Runs] = found["variants"]
    style = styles(list(variants))
    last = max(len(r["series"]["reward"]) for runs in variants.values() for r in runs.values())
    parts = []
    for column, (series, title) in enumerate(PANELS.items()):
        lines = [Line(name, style[name], smooth(runs, series)) for name, runs in variants.items()]
        drawn = re.search(r"<svg [^>]*>(.*)</svg>", chart(title, lines, Frame(last), False), re.S)
        if drawn:
            place = f'<g transform="translate({column * WIDTH} 16)">'
            parts.append(f'{place}<text x="{WIDTH / 2}" y="6">{text(title)}</text>{drawn[1]}</g>')
    x = 50
    for name, look in style.items():
        parts.append(
            f'<g class="{look}"><path class="curve" d="M{x} {HEIGHT + 30}h24"/></g>'
            f'<text style="text-anchor:start" x="{x + 30}" y="{HEIGHT + 34}">{text(name)}</text>'
        )
        x += 60 + 7 * len(name)
    css = (ASSETS / "report.css").read_text(encoding="utf-8")
    size = f"{len(PANELS) * WIDTH} {HEIGHT + 42}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="reward, '
        f'entropy and KL over the steps"><style>{css} svg {{ max-width: none; }}</style>'
        f"{''.join(parts)}</svg>\n"
    )
