"""The paper in miniature: every variant of an ablation with every seed, and a page of what came out.

    python -m experiments.ablations NAME --workdir=runs/ablations [--seeds=0,1,2] [--only=VARIANT ...]
    python -m experiments.ablations page [--workdir=runs/ablations]

NAME is a file of experiments/configs/ablations: clip, kl, kl_unstable, temperature, dynamic, prolonged, objective
or group_size. The first command trains and scores what is not there yet, one run after the other in one process,
and goes on where it was stopped; ablations that ask for the same run share it. The second takes what
the runs found into experiments/ablations.json and makes experiments/ABLATIONS.md and its figures of it.
"""

import argparse
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.ablation_page import INTRODUCTION, boundary, comparison, figure
from prolong_jax import evaluate, train
from prolong_jax.checkpoint import Checkpointer
from prolong_jax.config import RunConfig, load
from prolong_jax.data.mixture import Sources
from prolong_jax.groups import refuse_broken_verifiers
from prolong_jax.mesh import make_mesh
from prolong_jax.metrics import read_rows
from prolong_jax.models.decoder import sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.processes import Timer, write_json
from prolong_jax.rollout import Collector
from prolong_jax.startup import sole_user
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.verifiers.pool import Pool, open_pool

CONFIGS = "experiments/configs/ablations"  # from the root of the repository
NAMES = (
    "clip",
    "kl",
    "kl_unstable",
    "temperature",
    "dynamic",
    "prolonged",
    "objective",
    "group_size",
)
SAMPLES = 8  # per held-out prompt at the end
DATA, PAGE = Path("experiments/ablations.json"), Path("experiments/ABLATIONS.md")
FIGURES = Path("experiments/ablation_figures")
DOMAINS = ("math", "stem")  # whose verifiers are needed


@dataclass(frozen=True)
class Ablation:
    """A file of experiments/configs/ablations."""

    name: str
    title: str
    why: str  # question and claim
    seen: str  # what came out, in words
    variants: Mapping[str, Mapping[str, Any]]  # name: settings beside those of the file
    equal: str  # what is equal at the end: samples, or tokens
    at: tuple[int, ...]  # steps whose policies are scored; none: the last alone
    samples: int  # per held-out prompt
    base_samples: int  # the same of the base model; 0: it is not scored

    @property
    def path(self) -> str:
        return f"{CONFIGS}/{self.name}.py"

    def overrides(self, variant: str) -> list[str]:
        return [f"{key}={value!r}" for key, value in self.variants[variant].items()]

    def run(self, variant: str, seed: int) -> RunConfig:
        return load(self.path, [*self.overrides(variant), f"seed={seed}"])

    def workdir(self, root: Path, variant: str, seed: int) -> Path:
        """Named by the stated settings, so that ablations share a run."""
        stated = importlib.import_module(self.module).get_config().to_dict()
        text = json.dumps([stated, dict(self.variants[variant])], sort_keys=True)
        return root / f"{hashlib.sha256(text.encode()).hexdigest()[:10]}-{seed}"

    @property
    def module(self) -> str:
        return f"{CONFIGS}/{self.name}".replace("/", ".")


def read(name: str) -> Ablation:
    """Raises ValueError where there is no such ablation."""
    if name not in NAMES:
        raise ValueError(f"ablations: expected one of {', '.join(NAMES)} or page, got {name!r}.")
    module = importlib.import_module(f"{CONFIGS}/{name}".replace("/", "."))
    return Ablation(
        name,
        module.TITLE,
        (module.__doc__ or "").strip(),
        module.SEEN.strip(),
        module.VARIANTS,
        getattr(module, "EQUAL", "samples"),
        tuple(getattr(module, "AT", ())),
        getattr(module, "SAMPLES", SAMPLES),
        getattr(module, "BASE_SAMPLES", 0),
    )


# --- training and scoring ------------------------------------------------------------------------


def run_all(ablation: Ablation, root: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> bool:
    """Trains and scores what is missing. Returns whether nothing was stopped by a signal.

    Raises:
      ValueError: a variant that is not there.
    """
    chosen = list(only or ablation.variants)
    if unknown := [name for name in chosen if name not in ablation.variants]:
        known = ", ".join(map(repr, ablation.variants))
        raise ValueError(f"--only: expected one of {known}, got {unknown[0]!r}.")
    with open_pool(ablation.run(chosen[0], 0).verifiers) as pool:
        pool.check(DOMAINS)
        if ablation.base_samples:
            score(ablation, chosen[0], root / f"{ablation.name}-base", 0, pool)
        for seed in seeds:
            for variant in chosen:
                print(f"ablation {ablation.name}, variant {variant}, seed {seed}", flush=True)
                workdir = ablation.workdir(root, variant, seed)
                if not train_one(ablation.run(variant, seed), workdir, pool):
                    return False
            for variant in chosen:
                for step in scored_steps(ablation, root, variant, seed):
                    workdir = ablation.workdir(root, variant, seed)
                    score(ablation, variant, workdir, step, pool)
    return True


def train_one(run: RunConfig, workdir: Path, pool: Pool) -> bool:
    """A run as `python -m prolong_jax.train` has it, with verifiers that are there already.

    Returns whether it is finished.
    """
    if (workdir / "summary.json").exists():
        return True
    started, mesh = time.monotonic(), make_mesh(run.mesh)
    model, params = load_model(run.model.path, jnp.dtype(run.model.dtype), mesh)
    with sole_user(workdir):
        collector = Collector(model, mesh, ChatTokenizer(run.model.path), pool, run.seed)
        setup = train.Setup(run, collector, *evaluate.held_out_by_stage(run), Sources())
        with closing(Checkpointer(workdir / "checkpoints", run.checkpoint)) as checkpointer:
            state = train.initial_state(run, params)
            return train.run_from(setup, state, workdir, checkpointer, started)


def scored_steps(ablation: Ablation, root: Path, variant: str, seed: int) -> tuple[int, ...]:
    """The steps of a run whose policies are scored; at equal tokens, the nearest checkpoint."""
    run = ablation.run(variant, seed)
    if ablation.equal == "samples":
        return ablation.at or (run.total_steps,)
    tokens = {v: tokens_of(ablation.workdir(root, v, seed)) for v in ablation.variants}
    return (nearest(tokens[variant], min(t[-1] for t in tokens.values()), run.checkpoint.every),)


def nearest(tokens: Sequence[int], budget: int, every: int) -> int:
    """The step, of those with a checkpoint, whose tokens so far are nearest to a budget."""
    kept = sorted({*range(every, len(tokens) + 1, every), len(tokens)})
    return min(kept, key=lambda step: abs(tokens[step - 1] - budget))


def tokens_of(workdir: Path) -> list[int]:
    """Generated tokens up to every step."""
    rows = read_rows(workdir / "metrics.jsonl")
    return list(accumulate(row["tokens/generated"] for row in rows if row["step"] > 0))


def score(ablation: Ablation, variant: str, workdir: Path, step: int, pool: Pool) -> None:
    """Scores a checkpoint, or the base model (step 0), on the held-out prompts, if need be."""
    out = workdir / f"solved_{step}.json"
    if out.exists():
        return
    run, model, params, _ = evaluate.load(
        ablation.run(variant, 0), str(workdir) if step else "", step or None
    )
    mesh, samples = make_mesh(run.mesh), ablation.samples if step else ablation.base_samples
    collector = Collector(model, mesh, ChatTokenizer(run.model.path), pool, run.seed)
    params, prompts = sampling_copy(model, mesh, params), evaluate.held_out_prompts(run)
    groups = evaluate.respond(collector, params, prompts, samples, run, 0, Timer())
    refuse_broken_verifiers(groups, run.verifiers)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(out, {g.prompt.id: sum(score >= 1 for score in g.scores) for g in groups})


# --- what was found ------------------------------------------------------------------------------


def collect(ablation: Ablation, root: Path) -> dict[str, Any]:
    """The scored runs of an ablation in the form of ablations.json, see ablation_page.py."""
    base = solved_of(root / f"{ablation.name}-base" / "solved_0.json", ablation.base_samples)
    found: dict[str, Any] = {"base": base, "variants": {}}
    for variant in ablation.variants:
        runs = {}
        name = ablation.workdir(root, variant, 0).name.removesuffix("0")
        for path in sorted(root.glob(f"{name}*")):
            steps = sorted(int(p.stem[7:]) for p in path.glob("solved_*.json"))
            steps = [step for step in steps if not ablation.at or step in ablation.at]
            scores = {str(n): solved_of(path / f"solved_{n}.json", ablation.samples) for n in steps}
            if scores:
                seed = path.name.removeprefix(name)
                runs[seed] = series_of(path, ablation.run(variant, int(seed))) | {"scores": scores}
        if runs:
            found["variants"][variant] = runs
    return found


def solved_of(path: Path, samples: int) -> dict[str, Any]:
    """The right responses to each held-out prompt; {} where it was not scored."""
    if not path.exists():
        return {}
    return {"samples": samples, "solved": list(json.loads(path.read_text()).values())}


def series_of(workdir: Path, run: RunConfig) -> dict[str, Any]:
    """What is kept of the steps of a run: "series" by name, and the steps before resets."""
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if row["step"] > 0]
    names = {"reward": "reward/mean", "entropy": "update/entropy", "kl": "update/kl_ref"}
    series: dict[str, list[Any]] = {
        short: [None if row.get(name) is None else float(f"{row[name]:.3g}") for row in rows]
        for short, name in names.items()
    }
    series["tokens"] = [row["tokens/generated"] for row in rows]
    series["trained"] = [row["groups/kept"] * run.rollout.group_size for row in rows]
    return {"series": series, "resets": [row["step"] - 1 for row in rows if row.get("reset")]}


def make_page(root: Path | None) -> None:
    """Takes what the runs found into ablations.json, and makes the page and its figures of that."""
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    parts = [INTRODUCTION]
    for ablation in map(read, NAMES):
        found = collect(ablation, root) if root else {}
        if found.get("variants"):
            known[ablation.name] = json.loads(json.dumps(found))
        if ablation.name in known:
            parts.append(section(ablation, known[ablation.name]))
            image = FIGURES / f"{ablation.name}.svg"
            image.parent.mkdir(exist_ok=True)
            image.write_text(figure(known[ablation.name]), encoding="utf-8")
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in known.items()]
    DATA.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def section(ablation: Ablation, found: dict[str, Any]) -> str:
    """The part of the page about one ablation."""
    lines = [
        f"- `{name}`: {', '.join(ablation.overrides(name)) or 'as the file has it'}"
        for name in found["variants"]
    ]
    return "\n\n".join(
        [
            f"## {ablation.title}",
            ablation.why,
            f"`python -m experiments.ablations {ablation.name} --workdir=runs/ablations`\n\n"
            + "\n".join(lines),
            boundary(found) if found["base"] else comparison(found),
            f"![{ablation.title}: reward, entropy and KL]({FIGURES.name}/{ablation.name}.svg)",
        ]
        + [f"**Seen.** {ablation.seen}"] * bool(ablation.seen)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.ablations", allow_abbrev=False)
    parser.add_argument("name", help="an ablation, or page")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--only", action="append", help="one variant; may be repeated")
    args = parser.parse_args(argv)
    try:
        if args.name == "page":
            make_page(args.workdir if args.workdir.is_dir() else None)
            return 0
        ablation = read(args.name)
        seeds = [int(seed) for seed in args.seeds.split(",")]
        return 0 if run_all(ablation, args.workdir, seeds, args.only) else train.EXIT_STOPPED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
