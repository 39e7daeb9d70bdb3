"""The training loop: python -m prolong_jax.train --config=FILE --workdir=DIR [--config.KEY=VALUE]

The only file that knows all the others. Read `train_step` first: it is one step of prolonged GRPO.
"""

import dataclasses
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

from prolong_jax import processes, stages
from prolong_jax.checkpoint import Checkpointer, params_sha256
from prolong_jax.config import (
    DOMAINS,
    LossSettings,
    OptimizerSettings,
    RunConfig,
    for_stage,
    packing,
    parse,
    row_layout,
    to_dict,
)
from prolong_jax.data.mixture import Position, Sources, next_prompts, open_sources, record
from prolong_jax.data.prompts import Prompt
from prolong_jax.evaluate import evaluate, held_out_prompts, validation_metrics
from prolong_jax.groups import (
    Group,
    conversations,
    group_from_dict,
    sample_rows,
    statistics,
)
from prolong_jax.mesh import make_mesh
from prolong_jax.metrics import Progress, Writer, final_table, open_writer
from prolong_jax.models.decoder import Model, for_training, sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.optimizer import make_optimizer, opt_state_shardings
from prolong_jax.packing import pack
from prolong_jax.processes import StopSignal, Timer, write_json
from prolong_jax.report import write_report
from prolong_jax.rollout import Collector, Cursor, collect
from prolong_jax.startup import prompt_len, refuse_other_workdir, refuse_unfit_model
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.types import PyTree, TrainState
from prolong_jax.update import make_score, make_update, put_rows, reset_reference
from prolong_jax.verifiers.pool import open_pool

MIN_FAULTS = 8  # of a verifier in one step; fewer never stop a run
EXIT_BAD_INPUT, EXIT_STOPPED = 2, 75  # 75: stopped by a signal after saving; start again to go on


@dataclass(frozen=True)
class Setup:
    """What stays the same during a run."""

    run: RunConfig
    collector: Collector
    validation: list[Prompt]
    sources: Sources


@dataclass
class Host:
    """Host state of a run: with the TrainState, all that a checkpoint holds."""

    progress: stages.Progress = dataclasses.field(default_factory=stages.Progress)
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    base: dict[str, Any] = dataclasses.field(default_factory=dict)  # validation before step 1
    resets: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped_in_a_row: int = 0
    samples: int = 0
    generated_tokens: int = 0
    wall_s: float = 0.0
    rl_wall_s: float = 0.0
    phases_s: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Host":
        progress = values["progress"]
        surplus = [group_from_dict(g) for g in values["cursor"]["surplus"]]
        return cls(
            **values
            | {
                "progress": stages.Progress(**progress | {"scores": tuple(progress["scores"])}),
                "cursor": Cursor(Position(**values["cursor"]["position"]), surplus),
            }
        )


# --- one step ------------------------------------------------------------------------------------


def train_step(
    setup: Setup, state: TrainState, host: Host, timer: Timer
) -> tuple[TrainState, dict[str, Any], list[Group]]:
    """One step: collect live groups, score them, update the policy once per mini-batch.

    Returns:
      The new state, the step's metrics, and the groups that were sampled, dead ones too.
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
    refuse_broken_verifiers(sampled, run)
    rewards = [(g.prompt.id, np.array(g.scores)[g.scored].tolist()) for g in sampled]
    host.cursor.position = record(host.cursor.position, rewards, run.data)

    # Packed rows, with the logprobs of the policy as it is now and of the reference.
    trained = for_training(setup.collector.model, mesh, run.model, row_layout(run))
    score, update = programs(trained, mesh, run)
    with timer("score"):
        batches = []
        for minibatch in split(kept, run.update.num_minibatches):
            items = [c for group in minibatch for c in conversations(group, run.rollout)]
            batch, used = pack(items, **packing(run), layout=trained.layout)
            batches.append((score(state, put_rows(mesh, batch), used), used))
        jax.block_until_ready(batches)

    # One optimizer step per mini-batch, each clipped against the policy before the first.
    with timer("update"):
        updates = []
        for batch, used in batches:
            state, metrics = update(state, batch, used)
            updates.append(metrics)
        updates = jax.device_get(updates)

    host.samples += sum(len(group.tokens) for group in sampled)
    host.generated_tokens += sum(len(t) for group in sampled for t in group.tokens)
    for metrics in updates:
        skipped = metrics["update/skipped_nonfinite"] > 0
        host.skipped_in_a_row = host.skipped_in_a_row + 1 if skipped else 0
    row = statistics(kept, sampled, len(host.cursor.surplus)) | {
        name: float(np.mean([m[name] for m in updates])) for name in (updates or [{}])[0]
    }
    if updates:
        row["update/first_ratio_deviation"] = float(updates[0]["update/ratio_deviation"])
    row |= {"stage": stage.name, "stage_index": host.progress.stage}
    return state, row, sampled


def split(groups: Sequence[Group], parts: int) -> list[list[Group]]:
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


def refuse_broken_verifiers(sampled: Sequence[Group], run: RunConfig) -> None:
    """Raises RuntimeError where a verifier failed (not the response) too often in one step."""
    for name in {g.prompt.verifier for g in sampled}:
        groups = [g for g in sampled if g.prompt.verifier == name]
        failed = [(g, i) for g in groups for i, ok in enumerate(g.scored) if not ok]
        rate = len(failed) / sum(len(g.tokens) for g in groups)
        if len(failed) >= MIN_FAULTS and rate > run.verifiers.max_error_rate:
            group, index = failed[0]
            raise RuntimeError(
                f"verifier {name!r} failed on {rate:.0%} of the responses of one step, more than "
                f"verifiers.max_error_rate = {run.verifiers.max_error_rate:.0%}; the first fault: "
                f"{group.details[index]}"
            )


# --- the loop ------------------------------------------------------------------------------------


def train(run: RunConfig, workdir: Path) -> int:
    """Runs or continues a run in `workdir`. Returns the exit code.

    Raises:
      ValueError: settings, workdir, model, data or devices that do not fit, before any compute.
      RuntimeError: the run cannot go on (non-finite gradients, broken verifiers).
    """
    started = time.monotonic()
    processes.start(run.mesh)
    processes.take_compilations()  # from now on they are counted
    refuse_other_workdir(run, workdir)
    mesh = make_mesh(run.mesh)
    dtype = jnp.dtype(run.model.dtype)
    model, params = load_model(run.model.path, dtype, mesh, random=run.model.random)
    tokenizer = ChatTokenizer(run.model.path)
    refuse_unfit_model(run, model, tokenizer)
    sources = open_sources(run, lambda prompt: prompt_len(prompt, tokenizer, run))
    name = "faults.jsonl" if processes.is_first() else f"faults_{jax.process_index()}.jsonl"
    with open_pool(run.verifiers, workdir / name) as pool:
        pool.check(DOMAINS)
        workdir.mkdir(parents=True, exist_ok=True)
        processes.keep_compilations(workdir / "compiled")
        write_json(workdir / "config.json", to_dict(run))
        collector = Collector(model, mesh, tokenizer, pool, run.seed)
        for_training(model, mesh, run.model)  # refuses attention that the platform does not have
        setup = Setup(run, collector, held_out_prompts(run), sources)
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
    resumed = checkpointer.latest_step is not None
    if resumed:
        state, values = checkpointer.restore(state)
        host = Host.from_dict(values)
        print(f"continuing from step {host.progress.step} in {workdir}")
    if host.progress.step >= run.total_steps and (workdir / "summary.json").exists():
        print(f"this run is complete at step {host.progress.step}; raise --config.total_steps")
        return True
    writer = open_writer(
        workdir,
        wandb=run.metrics.wandb,
        config=to_dict(run),
        resume_step=host.progress.step if resumed else None,
        active=processes.is_first(),
    )
    host.wall_s += time.monotonic() - started
    with closing(writer), StopSignal() as stop, Progress(run.total_steps) as view:
        state = loop(setup, state, host, checkpointer, writer, view, stop)
        finished = host.progress.step >= run.total_steps
        if finished:
            finish(setup, state, host, workdir, view)
    return finished


def loop(
    setup: Setup,
    state: TrainState,
    host: Host,
    checkpointer: Checkpointer,
    writer: Writer,
    view: Progress,
    stop: StopSignal,
) -> TrainState:
    """Trains until the last step or a stop signal to any process; saves in either case."""
    run = setup.run
    while host.progress.step < run.total_steps and not stop.agreed():
        processes.watch(run.mesh.watchdog_s)
        timer = Timer()
        if not host.base:
            print(f"scoring the base model on {len(setup.validation)} held-out prompts")
            host.base, row = validate(setup, state, 0, run.validation.final_samples, timer)
            row |= setup.collector.pool.take_metrics()
            row["sandbox_tier"] = setup.collector.pool.sandbox_tier
            report_row(row, host, timer, writer, view)

        # What the controller decides goes before the step, so that a resumed run decides it again.
        decision = stages.decide(run, host.progress)
        if decision.reset:
            optimizer = make_optimizer(for_stage(run, host.progress.stage).optimizer)
            state = reset_reference(state, optimizer, clear_optimizer=decision.clear_optimizer)
            event = {"step": host.progress.step, "reason": decision.reset}
            host.resets.append(event | {"optimizer": decision.clear_optimizer})
        if decision.advance:
            host.cursor.surplus.clear()  # the next stage may have other sizes
        host.progress = stages.apply(host.progress, decision)

        stage_run, step, score = for_stage(run, host.progress.stage), host.progress.step + 1, None
        state, row, sampled = train_step(setup, state, host, timer)
        if stages.is_evaluation_due(run, step):
            table, validation_row = validate(setup, state, step, run.validation.samples, timer)
            score, row = table["all"]["avg_at_k"], row | validation_row
        host.progress = stages.record(host.progress, score)
        refuse_lost_run(host, run, checkpointer)
        row |= setup.collector.pool.take_metrics() | {"reset": decision.reset or None}
        report_row(row, host, timer, writer, view)
        shown = sampled[: run.metrics.samples_per_step]
        writer.samples(sample_rows(shown, stage_run.rollout, step))
        if step % run.checkpoint.every == 0 or step >= run.total_steps:
            save(state, host, checkpointer)
    if host.progress.step > 0 and checkpointer.latest_step != host.progress.step:
        save(state, host, checkpointer)  # stopped by a signal
    processes.watch(0)
    return state


def save(state: TrainState, host: Host, checkpointer: Checkpointer) -> None:
    begin = time.monotonic()
    checkpointer.save(host.progress.step, state, host.to_dict())
    seconds = time.monotonic() - begin
    host.wall_s += seconds
    host.rl_wall_s += seconds
    add_phases(host, {"save": seconds})


def add_phases(host: Host, phases: dict[str, float]) -> None:
    for phase, seconds in phases.items():
        host.phases_s[phase] = host.phases_s.get(phase, 0.0) + seconds


def report_row(
    row: dict[str, Any], host: Host, timer: Timer, writer: Writer, view: Progress
) -> None:
    """Adds times to a metrics row, writes and shows it."""
    seconds, (phases, timeline) = time.monotonic() - timer.begin, timer.take()
    host.wall_s += seconds
    host.rl_wall_s += seconds
    add_phases(host, phases)
    row |= {f"time/{phase}_s": spent for phase, spent in phases.items()}
    row |= {"step": host.progress.step, "time_s": host.wall_s, "time/step_s": seconds}
    row["time/idle_s"] = max(0.0, seconds - sum(phases.values()))
    row["timeline"] = [[name, round(start, 3), round(end, 3)] for name, start, end in timeline]
    row |= processes.take_compilations()
    if "tokens/generated" in row:
        row["tokens/per_s"] = row["tokens/generated"] / seconds
    writer.step(row)
    view.show(row)


def validate(
    setup: Setup, state: TrainState, step: int, samples: int, timer: Timer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluates the policy on the held-out prompts. Returns the table and its metrics."""
    run, collector = setup.run, setup.collector
    with timer("evaluate"):
        params = sampling_copy(collector.model, collector.mesh, state.params)
        table, groups = evaluate(collector, params, setup.validation, samples, run, step, Timer())
    refuse_broken_verifiers(groups, run)
    return table, validation_metrics(table)


def finish(setup: Setup, state: TrainState, host: Host, workdir: Path, view: Progress) -> None:
    """The final evaluation and summary.json."""
    timer = Timer()
    samples = setup.run.validation.final_samples
    final, _ = validate(setup, state, host.progress.step, samples, timer)
    seconds = time.monotonic() - timer.begin
    add_phases(host, timer.take()[0])
    summary = {
        "steps": host.progress.step,
        "wall_s": host.wall_s + seconds,
        "rl_wall_s": host.rl_wall_s + seconds,
        "samples": host.samples,
        "generated_tokens": host.generated_tokens,
        "params_sha256": params_sha256(setup.collector.mesh, state.params),
        "resets": host.resets,
        "validation": {"base": host.base, "final": final},
        "phases_s": {
            name: host.phases_s.get(name, 0.0)
            for name in ("sample", "verify", "score", "update", "evaluate", "save")
        },
    }
    write_json(workdir / "summary.json", summary)
    view.print(final_table(summary))


def refuse_lost_run(host: Host, run: RunConfig, checkpointer: Checkpointer) -> None:
    """Raises RuntimeError after too many skipped updates in a row."""
    if host.skipped_in_a_row >= run.update.max_skipped:
        raise RuntimeError(
            f"the last {host.skipped_in_a_row} updates, up to step {host.progress.step}, had a "
            f"non-finite gradient and were skipped; the last good checkpoint is of step "
            f"{checkpointer.latest_step}; look at the last rows of metrics.jsonl."
        )


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
        run, workdir = parse(sys.argv[1:] if argv is None else argv, workdir=True)
        return train(run, workdir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is kept", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
