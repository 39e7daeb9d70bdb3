"""The training loop: python -m prolong_jax.train --config=FILE --workdir=DIR [--config.KEY=VALUE]

The only file that knows all the others. Read `train_step` first: it is one step of prolonged GRPO.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prolong_jax import groups, processes, stages, startup
from prolong_jax.checkpoint import Checkpointer, params_sha256
from prolong_jax.config import (
    LossSettings,
    OptimizerSettings,
    RunConfig,
    for_stage,
    packing,
    parse,
    row_layout,
    to_dict,
    verifiers,
)
from prolong_jax.control import Control
from prolong_jax.data.mixture import Sources, next_prompts, open_sources, record
from prolong_jax.data.prompts import Prompt
from prolong_jax.evaluate import evaluate, held_out_by_stage, validation_metrics
from prolong_jax.host import Host, combined, report_row
from prolong_jax.mesh import make_mesh
from prolong_jax.metrics import Progress, Writer, final_table, open_writer
from prolong_jax.models.decoder import Model, for_training, sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.optimizer import make_optimizer, opt_state_shardings
from prolong_jax.packing import pack
from prolong_jax.processes import StopSignal, Timer, write_json
from prolong_jax.report import write_report
from prolong_jax.rollout import Collector, collect
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.types import PyTree, TrainState
from prolong_jax.update import make_score, make_update, put_rows, reset_reference
from prolong_jax.verifiers.pool import open_pool

EXIT_BAD_INPUT, EXIT_STOPPED = 2, 75  # 75: stopped by a signal after saving; start again to go on


@dataclass(frozen=True)
class Setup:
    """What stays the same during a run."""

    run: RunConfig
    collector: Collector
    held_out: list[Prompt]  # that the base and the final policy are compared on
    validation: tuple[list[Prompt], ...]  # held-out prompts of each stage
    sources: Sources


@dataclass(frozen=True)
class Outside:
    """What the loop talks to."""

    checkpointer: Checkpointer
    writer: Writer
    view: Progress
    stop: StopSignal
    control: Control


# --- one step ------------------------------------------------------------------------------------


def train_step(
    setup: Setup, state: TrainState, host: Host, timer: Timer
) -> tuple[TrainState, dict[str, Any], list[dict[str, Any]]]:
    """One step: collect live groups, score them, update the policy once per mini-batch.

    Returns:
      The new state, the step's metrics, and rows of samples.jsonl.
    """
    run, mesh = for_stage(setup.run, host.progress.stage), setup.collector.mesh
    stage, step = run.stages[host.progress.stage], host.progress.step + 1

    # Prompts -> samples -> verdicts -> live groups.
    with timer("sample"):
        policy = sampling_copy(setup.collector.model, mesh, state.params)
    kept, sampled = collect(
        setup.collector,
        policy,
        host.cursor,
        functools.partial(next_prompts, setup.sources, seed=run.seed, stage=stage),
        run.rollout,
        step,
        timer,
    )
    groups.refuse_broken_verifiers(sampled, run.verifiers)
    rewards = [(g.prompt.id, np.array(g.scores)[g.scored].tolist()) for g in sampled]
    host.cursor.position = record(host.cursor.position, rewards, run.data)

    # Packed rows, with the logprobs of the policy as it is now and of the reference.
    trained = for_training(setup.collector.model, mesh, run.model, row_layout(run))
    score, update = programs(trained, mesh, run)
    with timer("score"):
        batches = []
        advantage_PG = groups.advantages(kept, run, step)
        items_of = groups.conversations(kept, advantage_PG, run)
        for minibatch in split(items_of, run.update.num_minibatches):
            items = [conversation for group in minibatch for conversation in group]
            if not items:
                continue  # no verdicts, or all filtered
            batch, used = pack(items, **packing(run), layout=trained.layout)
            batches.append((score(state, put_rows(mesh, batch), used), used))
        jax.block_until_ready(batches)

    # One optimizer step per mini-batch, each clipped against the policy before the first.
    with timer("update"):
        updates = []
        for batch, used in batches:
            state, metrics = update(state, batch, used, host.entropy_coef(run.loss))
            updates.append(metrics)
        updates = jax.device_get(updates)

    host.samples += sum(len(group.tokens) for group in sampled)
    host.generated_tokens += sum(len(t) for group in sampled for t in group.tokens)
    host.count_skipped(updates)
    told = combined(updates) | {"update/entropy_coef": host.entropy_coef(run.loss)}
    host.adapt_entropy(run.loss, told.get("update/entropy"))
    row = groups.statistics(kept, sampled, len(host.cursor.surplus), run) | told
    row |= {"stage": stage.name, "stage_index": host.progress.stage}
    shown = sampled[: run.metrics.samples_per_step]
    return state, row, groups.sample_rows(shown, kept, advantage_PG, step)


def split(groups: Sequence[Any], parts: int) -> list[list[Any]]:
    """At most `parts` parts of nearly the same number of groups, none empty."""
    bounds = np.linspace(0, len(groups), min(parts, len(groups)) + 1).round().astype(int)
    return [list(groups[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def programs(model: Model, mesh: Mesh, run: RunConfig) -> tuple[Callable, Callable]:
    """The scoring and update programs; stages with the same settings share their compilation."""
    one_update = run.update.num_minibatches == 1  # of the policy that the old logprobs are those of
    return _programs(model, mesh, run.loss, run.optimizer, run.rollout.temperature, one_update)


@functools.cache
def _programs(
    model: Model,
    mesh: Mesh,
    loss: LossSettings,
    optimizer: OptimizerSettings,
    temperature: float,
    one_update: bool,
) -> tuple[Callable, Callable]:
    step = make_optimizer(optimizer)
    update = make_update(model, step, mesh, loss, temperature, on_policy=one_update)
    return make_score(model, temperature, policy=not one_update), update


# --- the loop ------------------------------------------------------------------------------------


def train(run: RunConfig, workdir: Path, allow_changes: bool = False) -> int:
    """Runs or continues a run in `workdir`. Returns the exit code.

    Raises:
      ValueError: settings, workdir, model, data or devices that do not fit, before any compute.
      RuntimeError: the run cannot go on (non-finite gradients, broken verifiers).
    """
    started = time.monotonic()
    processes.keep_memory_compact()
    processes.start(run.mesh)
    processes.take_compilations()  # from now on they are counted
    startup.refuse_other_workdir(run, workdir, allow_changes)
    mesh = make_mesh(run.mesh)
    dtype = jnp.dtype(run.model.dtype)
    model, params = load_model(run.model.path, dtype, mesh, random=run.model.random)
    tokenizer = ChatTokenizer(run.model.path)
    startup.refuse_unfit_model(run, model, tokenizer)
    sources = open_sources(run, lambda prompt: startup.prompt_len(prompt, tokenizer, run))
    name = "faults.jsonl" if processes.is_first() else f"faults_{jax.process_index()}.jsonl"
    with startup.sole_user(workdir), open_pool(run.verifiers, workdir / name) as pool:
        pool.check(verifiers(run))
        processes.keep_compilations(workdir / "compiled")
        collector = Collector(model, mesh, tokenizer, pool, run.seed)
        for_training(model, mesh, run.model)  # refuses attention that the platform does not have
        setup = Setup(run, collector, *held_out_by_stage(run), sources)
        size = sum(x.size for x in jax.tree.leaves(params)) / 1e6
        print(f"{size:.2f}M parameters from {run.model.path} on {mesh.size} {jax.devices()[0]}")
        with closing(Checkpointer(workdir / "checkpoints", run.checkpoint)) as checkpointer:
            finished = run_from(setup, initial_state(run, params), workdir, checkpointer, started)
    if processes.is_first():
        print(f"report: {write_report(workdir)}")
    if not finished:
        print("stopped and saved; the same command continues this run")
    return 0 if finished else EXIT_STOPPED


def run_from(
    setup: Setup, state: TrainState, workdir: Path, checkpointer: Checkpointer, started: float
) -> bool:
    """Restores the newest checkpoint if there is one, and trains. Returns whether it finished."""
    run, host = setup.run, Host()
    restored = checkpointer.resume(state)
    if restored is not None:
        state, host = restored[0], Host.from_dict(restored[1])
        print(f"continuing from step {host.progress.step} in {workdir}")
    startup.record_settings(run, workdir, host.progress)
    if is_finished(run, host) and (workdir / "summary.json").exists():
        print(f"this run is complete at step {host.progress.step}; raise --config.total_steps")
        return True
    writer = open_writer(
        workdir,
        wandb=run.metrics.wandb,
        config=to_dict(run),
        resume_step=host.progress.step if restored else None,
        active=processes.is_first(),
    )
    host.wall_s += time.monotonic() - started
    with closing(writer), StopSignal() as stop, Control(workdir) as control:
        with Progress(run.total_steps) as view:
            outside = Outside(checkpointer, writer, view, stop, control)
            state = loop(setup, state, host, outside)
            finished = is_finished(run, host)
            if finished:
                finish(setup, state, host, workdir, view)
    return finished


def is_finished(run: RunConfig, host: Host) -> bool:
    return (
        host.progress.step >= run.total_steps
        or stages.decide(run, host.progress, host.history).finish
    )


def loop(setup: Setup, state: TrainState, host: Host, outside: Outside) -> TrainState:
    """Trains until the run is finished or to be stopped; saves in either case."""
    run, checkpointer, timer = setup.run, outside.checkpointer, Timer()
    while not is_finished(run, host) and not outside.stop.agreed():
        processes.watch(run.mesh.watchdog_s)
        if not host.base:
            score_base(setup, state, host, outside, timer)

        # What the controller decides goes before the step, so that a resumed run decides it again.
        request = outside.control.take(host.progress.step)
        if "stop" in request:
            break
        decision = stages.decide(run, host.progress, host.history, request)
        state, event = reset(run, state, host, decision, checkpointer)
        if decision.advance:
            host.cursor.surplus.clear()  # the next stage may have other sizes
        host.progress, host.history = stages.apply(run, host.progress, host.history, decision)

        stage, step, evaluation = host.progress.stage, host.progress.step + 1, None
        stage_run = for_stage(run, stage)
        state, row, samples = train_step(setup, state, host, timer)
        row |= event
        if stages.is_evaluation_due(stage_run, step) or "evaluate" in request:
            table, validation_row = validate(setup, state, stage, step, timer)
            row |= validation_row
            evaluation = stages.Evaluation(step, table["all"]["avg_at_k"], *table["all"]["ci95"])
        past, over = (host.progress, host.history), run.stages[stage].reset.over
        host.progress, host.history = stages.record(*past, row, evaluation, over)
        host.refuse_lost_run(stage_run.update, checkpointer.latest_step)
        row |= setup.collector.pool.take_metrics() | checkpointer.take_metrics()
        report_row(row, host, timer, outside.writer, outside.view)
        outside.writer.samples(samples)
        is_best = evaluation and host.progress.best == evaluation and run.checkpoint.keep_best
        if step % run.checkpoint.every == 0 or is_best or "save" in request:
            with timer("save"):  # told in the next row
                host.save(state, checkpointer)
    if host.progress.step > 0 and checkpointer.latest_step != host.progress.step:
        host.save(state, checkpointer)
    processes.watch(0)
    return state


def score_base(setup: Setup, state: TrainState, host: Host, outside: Outside, timer: Timer) -> None:
    """The evaluation before the first step, with its row of metrics."""
    print(f"scoring the base model on {len(setup.held_out)} held-out prompts")
    pool = setup.collector.pool
    host.base, row = validate(setup, state, None, 0, timer)
    row |= pool.take_metrics() | {"sandbox_tier": pool.sandbox_tier}
    report_row(row, host, timer, outside.writer, outside.view)


def reset(
    run: RunConfig,
    state: TrainState,
    host: Host,
    decision: stages.Decision,
    checkpointer: Checkpointer,
) -> tuple[TrainState, dict[str, Any]]:
    """Carries out the reset of a decision, if there is one. Returns what the step's row says of it."""
    if not decision.reset:
        return state, {"reset": None}
    params, reference, best = state.params, "policy", host.progress.best
    if decision.reference == "best" and best is not None:
        if best.step in checkpointer.steps:
            params, reference = checkpointer.restore_params(state.params, best.step), "best"
        else:
            print(f"the best checkpoint, of step {best.step}, is gone: the reference is the policy")
    optimizer = make_optimizer(for_stage(run, host.progress.stage).optimizer)
    state = reset_reference(state, optimizer, params, clear_optimizer=decision.clear_optimizer)
    event = {"step": host.progress.step, "reason": decision.reset, "values": dict(decision.values)}
    event |= {"reference": reference, "optimizer": decision.clear_optimizer}
    host.resets.append(event)
    what = ["reference"] + ["optimizer"] * decision.clear_optimizer
    return state, {
        "reset": decision.reset, "reset/values": event["values"], "reset/what": what
    }  # fmt: skip


def validate(
    setup: Setup, state: TrainState, stage: int | None, step: int, timer: Timer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table of an evaluation and its metrics, as a stage asks for it, or (None) a run's ends."""
    run, collector = setup.run if stage is None else for_stage(setup.run, stage), setup.collector
    samples = run.validation.final_samples if stage is None else run.validation.samples
    prompts = setup.held_out if stage is None else setup.validation[stage]
    with timer("evaluate"):
        params = sampling_copy(collector.model, collector.mesh, state.params)
        table, sampled = evaluate(collector, params, prompts, samples, run, step, Timer())
    groups.refuse_broken_verifiers(sampled, run.verifiers)
    return table, validation_metrics(table)


def finish(setup: Setup, state: TrainState, host: Host, workdir: Path, view: Progress) -> None:
    """The final evaluation and summary.json."""
    timer = Timer()
    final, _ = validate(setup, state, None, host.progress.step, timer)
    summary = host.summary(timer, final) | {
        "params_sha256": params_sha256(setup.collector.mesh, state.params)
    }
    write_json(workdir / "summary.json", summary)
    view.print(final_table(summary))


# --- start-up ------------------------------------------------------------------------------------


def initial_state(run: RunConfig, params: PyTree) -> TrainState:
    """The policy, a reference equal to it, and a fresh optimizer, sharded alike."""
    optimizer = make_optimizer(for_stage(run, 0).optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    opt_shardings = opt_state_shardings(optimizer, params, shardings)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    return TrainState(params, jax.tree.map(jnp.copy, params), opt_state)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        given = parse(sys.argv[1:] if argv is None else argv, workdir=True)
        return train(*given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is kept", file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        hint = "; the last checkpoint is kept" if isinstance(error, OSError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
