"""avg@k, pass@k and maj@k on held-out prompts, with the sampler and the verifiers of the training.

Alone, for the model that a configuration starts from, for one in the Hugging Face form, or for the
policy of a run, on the validation prompts of the configuration and by its sampling rule:

    python -m prolong_jax.evaluate --config=FILE [--model=DIRECTORY_OR_WORKDIR] [--step=N]
        [--samples=16] [--out=DIRECTORY] [--config.KEY=VALUE]

With --out every response and verdict is kept in responses.jsonl, and the same command goes on where
it was stopped. With --sets=aime24,math,... --data=DIRECTORY the prompts are all those of the named
sets of data/evaluation_sets.py, by the protocol of ProRL: temperature 0.6, top-p 0.95, responses of
up to 32,768 tokens (--max_response_len), 16 samples; the published scores are printed beside ours.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prolong_jax.checkpoint import params_sha256
from prolong_jax.config import DOMAINS, LEVELS, RunConfig, check, for_stage, parse
from prolong_jax.data import evaluation_sets
from prolong_jax.data.procedural import validation_prompts
from prolong_jax.data.prompts import Prompt
from prolong_jax.groups import Group, refuse_broken_verifiers
from prolong_jax.mesh import make_mesh
from prolong_jax.models.decoder import Model, sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.next_token import SamplingRule
from prolong_jax.outcomes import (
    Outcome,
    fingerprint,
    outcomes,
    read_outcomes,
    summarise,
    vote_of,
)
from prolong_jax.policy import is_workdir, restore_policy
from prolong_jax.processes import Timer, exchange, is_first, start, write_json
from prolong_jax.rollout import Collector, Plan, sample_groups
from prolong_jax.startup import lock, prompt_len, refuse_unfit_model
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.types import PyTree
from prolong_jax.verifiers.pool import open_pool

# arXiv 2505.24864, section 3.4.
PAPER_RULE = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "final_samples": 16}
PAPER_LEN = 32_768  # tokens of a response
ROUNDS = 4  # times that the sampler's rows are filled between two writes


# --- in the loop ---------------------------------------------------------------------------------


def held_out_prompts(run: RunConfig) -> list[Prompt]:
    """The validation prompts of a run, or of a stage: the same for every policy it evaluates.

    Raises:
      ValueError: data that cannot be read, or too few embedded tasks.
    """
    settings = run.validation
    if settings.sets or settings.sources:
        return evaluation_sets.held_out(settings)
    return validation_prompts(DOMAINS, LEVELS, settings.prompts_per_level, settings.seed)


def held_out_by_stage(run: RunConfig) -> tuple[list[Prompt], tuple[list[Prompt], ...]]:
    """The held-out prompts of a run, and those of its stages, which may have others."""
    own, budget = held_out_prompts(run), run.validation.max_response_len
    runs = [for_stage(run, i) for i in range(len(run.stages))]
    same = [replace(stage.validation, max_response_len=budget) == run.validation for stage in runs]
    return own, tuple(
        own if is_same else held_out_prompts(stage)
        for stage, is_same in zip(runs, same, strict=True)
    )


def evaluate(
    collector: Collector,
    params: PyTree,
    prompts: Sequence[Prompt],
    samples: int,
    run: RunConfig,
    step: int,
    timer: Timer,
) -> tuple[dict[str, dict[str, Any]], list[Group]]:
    """Samples responses to each prompt, and makes the table of their scores, see `summarise`.

    Args as `respond`. Returns the table and the groups.
    """
    groups = respond(collector, params, prompts, samples, run, step, timer)
    return summarise(list(outcomes(records(groups, collector.tokenizer)))), groups


def respond(
    collector: Collector,
    params: PyTree,
    prompts: Sequence[Prompt],
    samples: int,
    run: RunConfig,
    step: int,
    timer: Timer,
) -> list[Group]:
    """Samples k = `samples` responses to each prompt, and has them verified.

    Args:
      collector: model, tokenizer, verifiers.
      params: the policy, as from `sampling_copy`.
      prompts: held-out prompts.
      samples: k.
      run: for the sampling rule, the response budget and the size of a sampling batch.
      step: training steps so far, part of every sample's key.
      timer: adds up the seconds.
    """
    settings = run.validation
    rule = SamplingRule(
        stop_ids=collector.tokenizer.stop_ids,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
    )
    budget = settings.max_response_len or run.rollout.max_response_len
    plan = Plan(replace(run.rollout, max_response_len=budget), samples, rule, step)
    return sample_groups(collector, params, prompts, plan, timer)


def records(groups: Sequence[Group], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """The rows of responses.jsonl, one for each response."""
    rows = []
    for group in groups:
        prompt = group.prompt
        opening = tokenizer.encode_chat(prompt.messages)[1]
        of_prompt = {key: getattr(prompt, key) for key in ("id", "domain", "level", "source")}
        of_prompt |= {"verifier": prompt.verifier, "task": str(prompt.reference.get("task", ""))}
        of_prompt |= {"fingerprint": fingerprint(prompt), "prompt": prompt.messages[-1]["content"]}
        for index, text in enumerate(group.texts):
            response = {
                "index": index,
                "response": text,
                "score": group.scores[index],
                "status": group.statuses[index],
                "detail": group.details[index],
                "answer": vote_of(prompt.verifier, prompt.reference, opening + text),
                "stopped": group.stopped[index],
                "len": len(group.tokens[index]),
                "nll": -float(sum(group.logp[index])),
            }
            rows.append(of_prompt | response)
    return rows


def validation_metrics(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The table as flat metrics: validation/NAME/avg and so on, pass@k at the largest k as pass."""
    row = {}
    for name, values in table.items():
        low, high = values["ci95"]
        found = {"avg": values["avg_at_k"], "lo": low, "hi": high, "pass": values["pass_at_k"]}
        smaller = list(values["pass_at"].items())[:-1]
        found |= {f"pass@{k}": value for k, value in smaller} | {"k": values["k"]}
        found |= {"maj": values["maj_at_k"]} if "maj_at_k" in values else {}
        found |= {key: values[key] for key in ("len_mean", "terminated", "sampled_nll")}
        row |= {f"validation/{name}/{key}": value for key, value in found.items()}
    return row


# --- alone ---------------------------------------------------------------------------------------


class Kept:
    """The responses in a directory; the first process reads and writes. "": nothing is kept.

    While it is there, no other evaluation can use the directory.
    """

    def __init__(self, out: str, protocol: dict[str, Any]):
        """Takes what an earlier start left.

        Raises:
          ValueError, in all processes: a directory of another evaluation, in use, or damaged.
        """
        self.path = Path(out) / "responses.jsonl" if out else None
        fault, done = "", []
        try:
            done = self._open(Path(out), protocol) if out and is_first() else []
        except (ValueError, OSError) as error:
            fault = str(error)
        fault, done = exchange((fault, done))[0]
        if fault:
            raise ValueError(fault)
        self.done: dict[str, Outcome] = {outcome.id: outcome for outcome in done}

    def _open(self, out: Path, protocol: dict[str, Any]) -> list[Outcome]:
        path, saved = out / "responses.jsonl", out / "protocol.json"
        out.mkdir(parents=True, exist_ok=True)
        if not saved.is_file():
            if any(path.name not in ("protocol.json.tmp", "lock") for path in out.iterdir()):
                raise ValueError(f"--out: {str(out)!r} holds something else; give a new directory.")
        self._lock = open(out / "lock", "a+")
        if holder := lock(self._lock):
            raise ValueError(
                f"--out: {str(out)!r} is in use by {holder}; wait for it, or give another directory."
            )
        if not saved.is_file():
            write_json(saved, protocol)
        try:
            there = json.loads(saved.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"--out: {saved} is damaged ({error}); restore it.") from error
        other = [
            f"{key} ({there.get(key)!r} there, {value!r} here)"
            for key, value in protocol.items()
            if there.get(key) != value and key not in ("model", "step")
        ]
        if other:
            raise ValueError(
                f"--out: {str(out)!r} holds another evaluation: {'; '.join(other)}; give another "
                "directory, or the settings of that evaluation."
            )
        if not path.exists():
            return []
        done, size = read_outcomes(path, protocol["samples"])
        os.truncate(path, size)
        return done

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Whole prompts; they are with the disk before the next ones are sampled."""
        if self.path is not None and is_first():
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        self.done |= {outcome.id: outcome for outcome in outcomes(rows)}


def evaluate_all(
    collector: Collector,
    params: PyTree,
    prompts: Sequence[Prompt],
    samples: int,
    run: RunConfig,
    kept: Kept,
) -> list[Outcome]:
    """Evaluates the prompts that have no outcome yet. Returns those of all, in their order.

    The batches do not depend on what is there already: one of which a prompt is missing is sampled
    as a whole, so that even roundings are those of an uninterrupted evaluation.

    Raises:
      ValueError: a prompt is not what it was when its responses were kept.
      RuntimeError: a verifier failed too often; the responses that it judged are not kept.
    """
    for prompt in prompts:
        if prompt.id in kept.done and kept.done[prompt.id].fingerprint != fingerprint(prompt):
            raise ValueError(
                f"--out: prompt {prompt.id!r} or its reference has changed since it was answered "
                f"there; give another directory than {str(kept.path)!r}."
            )
    size = max(1, ROUNDS * run.rollout.sample_rows // samples) * jax.process_count()
    begin = time.monotonic()
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        missing = {prompt.id for prompt in batch if prompt.id not in kept.done}
        if missing:
            groups = respond(collector, params, batch, samples, run, 0, Timer())
            refuse_broken_verifiers(groups, run.verifiers)
            new = [group for group in groups if group.prompt.id in missing]
            kept.add(records(new, collector.tokenizer))
        minutes = (time.monotonic() - begin) / 60
        print(f"{first + len(batch)} of {len(prompts)} prompts after {minutes:.1f} min")
    return [kept.done[prompt.id] for prompt in prompts]


def load(run: RunConfig, given: str, step: int | None) -> tuple[RunConfig, Model, PyTree, dict]:
    """The model and its weights, the settings with its path, and where it comes from."""
    mesh, workdir = make_mesh(run.mesh), Path(given)
    if given and is_workdir(workdir):
        trained, model, params, step = restore_policy(workdir, step, mesh)
        model = replace(model, dtype=jnp.dtype(run.model.dtype))
        run = replace(run, model=replace(run.model, path=trained.model.path))
    elif step is not None:
        raise ValueError("--step: expected the workdir of a run as --model, got none.")
    else:
        settings = replace(run.model, path=given, random=False) if given else run.model
        run = replace(run, model=settings)
        dtype = jnp.dtype(settings.dtype)
        model, params = load_model(settings.path, dtype, mesh, random=settings.random)
    return run, model, params, {"model": given or run.model.path, "step": step}


def protocol_of(run: RunConfig, samples: int) -> dict[str, Any]:
    """What the responses to a prompt depend on, beside the weights and the prompt."""
    rule = {key: getattr(run.validation, key) for key in ("temperature", "top_p", "top_k", "min_p")}
    sizes = {key: getattr(run.rollout, key) for key in ("max_prompt_len", "long_prompts")}
    return {
        "samples": samples,
        **rule,
        "max_response_len": run.validation.max_response_len or run.rollout.max_response_len,
        **sizes,
        "stop_strings": list(run.rollout.stop_strings),
        "dtype": run.model.dtype,
        "seed": run.seed,
    }


def refuse_long_prompts(prompts: Sequence[Prompt], tokenizer: ChatTokenizer, run: RunConfig):
    """Raises ValueError before any compute where a prompt is longer than the settings allow."""
    lengths = {p.id: prompt_len(p, tokenizer, run) for p in prompts}
    long = [name for name, length in lengths.items() if length > run.rollout.max_prompt_len]
    if long:
        raise ValueError(
            f"rollout.max_prompt_len: {len(long)} prompts have more than "
            f"{run.rollout.max_prompt_len} tokens, the longest {max(lengths.values())} (the first "
            f"is {long[0]!r}); raise it, or set rollout.long_prompts to 'truncate'."
        )


def by_paper(run: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The settings with what the command line says of the prompts and of the protocol."""
    changes: dict[str, Any] = {}
    if args.sets:
        changes = {**PAPER_RULE, "max_response_len": PAPER_LEN, "sources": {}, "prompts_per_set": 0}
        changes |= {"sets": tuple(args.sets.split(","))}
        changes |= {"directory": args.data or run.validation.directory}
    elif args.data:
        raise ValueError("--data: expected --sets, which it is the directory of; add them.")
    if args.samples is not None:
        changes["final_samples"] = args.samples
    if args.max_response_len is not None:
        changes["max_response_len"] = args.max_response_len
    return replace(run, validation=replace(run.validation, **changes))


def fitted(run: RunConfig, model: Model) -> RunConfig:
    """The paper's budget, or less where the model has too few positions for it."""
    room = model.config.max_positions - run.rollout.max_prompt_len
    if run.validation.max_response_len != PAPER_LEN or room >= PAPER_LEN or room < 1:
        return run
    print(f"the model has positions for responses of {room} tokens, fewer than {PAPER_LEN}")
    return replace(run, validation=replace(run.validation, max_response_len=room))


def differences(run: RunConfig, samples: int) -> str:
    """In what an evaluation is not by the paper's protocol."""
    protocol = {**PAPER_RULE, "max_response_len": PAPER_LEN, "samples": 16, "prompts_per_set": 0}
    ours = asdict(run.validation) | {"samples": samples}
    return ", ".join(f"{k} {ours[k]} for {v}" for k, v in protocol.items() if ours[k] != v)


def report(found: Sequence[Outcome], samples: int, run: RunConfig) -> str:
    """The tables as text."""
    table = summarise(found, levels=True)
    lines = [f"{'':34}prompts  avg@{samples:<4} 95% interval     pass@k and maj@k"]
    for name, row in table.items():
        low, high = row["ci95"]
        shares = "  ".join(f"@{k} {value:.3f}" for k, value in row["pass_at"].items())
        shares += f"  maj {row['maj_at_k']:.3f}" if "maj_at_k" in row else ""
        average = f"{row['prompts']:7}  {row['avg_at_k']:.3f}    [{low:.3f}, {high:.3f}]"
        lines.append(f"{name:34}{average}   {shares}")
    if "all" in table:
        row = table["all"]
        lines.append(
            f"responses: {row['len_mean']:.0f} tokens on average, {row['terminated']:.1%} ended "
            f"by themselves; -log p of a sampled token {row['sampled_nll']:.3f} nats on average"
        )
    if faults := sum(len(o.lengths) - len(o.scores) for o in found):
        lines.append(f"{faults} responses were not scored: their verifiers failed")
    other = differences(run, samples)
    for title, published in evaluation_sets.PUBLISHED.items():
        there = [name for name in published if name in run.validation.sets]
        ours = {name: table[f"source/{name}"] for name in there if f"source/{name}" in table}
        if ours:
            lines += [f"\nnot by the paper's protocol: {other}"] if other else []
            lines.append(f"\n{title + ', %':44}ours  R1-Distill-1.5B  Nemotron-1.5B")
        for name, row in ours.items():
            base, trained = published[name]
            lines.append(f"{name:42}{100 * row['avg_at_k']:6.2f}{base:17.2f}{trained:15.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prolong_jax.evaluate", allow_abbrev=False)
    parser.add_argument("--model", default="", help="directory or hub name, or a run's workdir")
    parser.add_argument("--step", type=int, help="of the run's checkpoint; the newest by default")
    parser.add_argument("--out", default="", help="keeps responses; the same command goes on")
    parser.add_argument("--samples", type=int, help="per prompt; validation.final_samples")
    parser.add_argument("--sets", default="", help="comma-separated, by the paper's protocol")
    parser.add_argument("--data", default="", help="directory of the sets")
    parser.add_argument("--max_response_len", type=int, help="tokens")
    parser.epilog = "--config=FILE and --config.KEY=VALUE as in training"
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        run = by_paper(parse(rest)[0], args)
        check(run)
        start(run.mesh)
        prompts = held_out_prompts(run)
        run, model, params, origin = load(run, args.model, args.step)
        run, tokenizer = fitted(run, model), ChatTokenizer(run.model.path)
        refuse_unfit_model(run, model, tokenizer)
        refuse_long_prompts(prompts, tokenizer, run)
        mesh, samples = make_mesh(run.mesh), run.validation.final_samples
        protocol = origin | {"weights_sha256": params_sha256(mesh, params) if args.out else ""}
        kept = Kept(args.out, protocol | protocol_of(run, samples))
        with open_pool(run.verifiers) as pool:
            pool.check({prompt.verifier for prompt in prompts})
            collector = Collector(model, mesh, tokenizer, pool, run.seed)
            params = sampling_copy(model, mesh, params)
            found = evaluate_all(collector, params, prompts, samples, run, kept)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(found, samples, run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
