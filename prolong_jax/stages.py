"""The controller of a prolonged run: when to evaluate, when to reset, which stage comes next.

Pure: `record`, `decide` and `apply` are functions of values that are part of the checkpoint, so a run
that is resumed, or replayed over its metrics, decides the same:

    python -m prolong_jax.stages --replay=WORKDIR/metrics.jsonl --config=FILE [--config.KEY=VALUE]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prolong_jax.config import ResetSettings, RunConfig, alike, for_stage
from prolong_jax.reset_rules import AFTER_EVALUATION, RULES, Evaluation, History, Values, extended

REQUESTS = ("reset", "advance", "evaluate", "save", "stop")  # what a person may ask for


@dataclass(frozen=True)
class Progress:
    """Where the run stands. `step` counts finished training steps."""

    step: int = 0
    stage: int = 0  # index into RunConfig.stages
    stage_start: int = 0  # step at which the stage began
    last_reset: int = 0  # step of the last reset, or 0
    best: Evaluation | None = None  # of the run


@dataclass(frozen=True)
class Decision:
    """What happens before the next training step."""

    reset: str = ""  # why the reference is reset: a key of RULES, schedule, stage or hand; "": not
    values: Mapping[str, float] = field(default_factory=dict)  # that led to the reset
    reference: str = "policy"  # what it becomes: policy or best
    clear_optimizer: bool = False  # whether the optimizer starts anew as well
    advance: bool = False  # go on to the next stage
    finish: bool = False  # the last stage is over, and the run with it


def is_evaluation_due(run: RunConfig, step: int) -> bool:
    """Whether the policy is evaluated after this many steps."""
    return step > 0 and step % run.validation.every == 0


def record(
    progress: Progress,
    history: History,
    row: Mapping[str, float | None],
    evaluation: Evaluation | None = None,
    over: int = 1,
) -> tuple[Progress, History]:
    """Progress and history after one more step.

    Args:
      row: the step's metrics; what is missing or not finite is passed over.
      evaluation: of the policy, if there was one.
      over: steps that the rules look at, beside those of a KL spike.
    """
    best = progress.best
    if evaluation is not None and (best is None or evaluation.score > best.score):
        best = evaluation
    progress = replace(progress, step=progress.step + 1, best=best)
    return progress, extended(history, row, evaluation, over)


def _asked(rule: ResetSettings, progress: Progress, history: History) -> tuple[str, Values]:
    """The first rule that asks for a reset, in the order of RULES, and its values."""
    since = progress.step - progress.last_reset
    if progress.last_reset and since < rule.cooldown:
        return "", {}
    evaluations = history.evaluations
    evaluated = bool(evaluations) and evaluations[-1].step == progress.step
    for name, asks in RULES.items():
        if (evaluated or name not in AFTER_EVALUATION) and (values := asks(rule, history)):
            return name, values
    scheduled = rule.every > 0 and since >= rule.every
    return ("schedule", {"steps": since}) if scheduled else ("", {})


def decide(
    run: RunConfig,
    progress: Progress,
    history: History,
    request: frozenset[str] = frozenset(),
) -> Decision:
    """What to do before the next step: at most one reset.

    What a person asks for goes first, then the stage's rules, none of them in the cool-down, then
    the start of the next stage, which says what is reset even where another reason led to it.

    Args:
      run: settings of all stages.
      progress, history: as `record` and `apply` left them.
      request: names of REQUESTS.
    """
    stage, is_last = run.stages[progress.stage], progress.stage + 1 == len(run.stages)
    rule, (reason, values) = stage.reset, _asked(stage.reset, progress, history)
    is_over = 0 < stage.steps <= progress.step - progress.stage_start
    is_over |= (stage.end_on_plateau and reason == "plateau") or "advance" in request
    if "reset" in request:
        reason, values = "hand", {}
    if is_over and is_last and "advance" not in request:
        return Decision(finish=True)
    if is_over and not is_last and run.stages[progress.stage + 1].reset_at_start:
        rule, reason = run.stages[progress.stage + 1].reset, reason or "stage"
    if not reason:
        return Decision(advance=is_over and not is_last)
    return Decision(reason, values, rule.reference, rule.optimizer, advance=is_over and not is_last)


def apply(
    run: RunConfig, progress: Progress, history: History, decision: Decision
) -> tuple[Progress, History]:
    """Progress and history once a decision is carried out. After a reset the rules start afresh.

    So they do for evaluations after a change of stage where those of the new one are others.
    """
    if decision.reset:
        progress = replace(progress, last_reset=progress.step)
        history = History(history.evaluations[-1:])
    if decision.advance:
        before = for_stage(run, progress.stage).validation
        progress = replace(progress, stage=progress.stage + 1, stage_start=progress.step)
        if not alike(for_stage(run, progress.stage).validation, before):
            progress, history = replace(progress, best=None), replace(history, evaluations=())
    return progress, history


if __name__ == "__main__":
    from prolong_jax.replay import main

    raise SystemExit(main())
