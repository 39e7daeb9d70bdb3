"""The controller of a prolonged run: when to evaluate, when to reset, which stage comes next.

Pure: `record`, `decide` and `apply` are functions of values that are part of the checkpoint, so a run that is
resumed, or replayed over recorded numbers, decides the same.
"""

from dataclasses import dataclass, replace

from prolong_jax.config import ResetSettings, RunConfig


@dataclass(frozen=True)
class Progress:
    """All that the controller remembers. `step` counts finished training steps of the run."""

    step: int = 0
    stage: int = 0  # index into RunConfig.stages
    stage_start: int = 0  # step at which the stage began
    last_reset: int = 0  # step of the last reset, or 0
    scores: tuple[float, ...] = ()  # validation scores since the last reset, oldest first


@dataclass(frozen=True)
class Decision:
    """What happens before the next training step."""

    reset: str = ""  # why the reference becomes the policy: plateau, schedule or stage; "" for no
    clear_optimizer: bool = False  # whether the reset also starts the optimizer anew
    advance: bool = False  # go on to the next stage


def is_evaluation_due(run: RunConfig, step: int) -> bool:
    """Whether the policy is evaluated after this many steps."""
    return step > 0 and step % run.validation.every == 0


def record(progress: Progress, score: float | None) -> Progress:
    """The progress after one more step; its validation score, if the policy was evaluated."""
    scores = progress.scores if score is None else (*progress.scores, score)
    return replace(progress, step=progress.step + 1, scores=scores)


def has_plateaued(scores: tuple[float, ...], rule: ResetSettings) -> bool:
    """True where the last `plateau_window` scores bring no gain over the best one before them."""
    window = rule.plateau_window
    if window == 0 or len(scores) <= window:
        return False
    return max(scores[-window:]) < max(scores[:-window]) + rule.plateau_gain


def decide(run: RunConfig, progress: Progress) -> Decision:
    """What to do before the next step. A plateau is judged right after an evaluation.

    At most one reset: a plateau goes before a schedule, and a schedule before a stage's start.
    """
    stage = run.stages[progress.stage]
    evaluated = is_evaluation_due(run, progress.step)
    plateau = evaluated and has_plateaued(progress.scores, stage.reset)
    scheduled = stage.reset.every > 0 and progress.step - progress.last_reset >= stage.reset.every
    in_stage = progress.step - progress.stage_start
    over = (0 < stage.steps <= in_stage) or (stage.end_on_plateau and plateau)
    advance = over and progress.stage + 1 < len(run.stages)
    rule, reset = stage.reset, "plateau" if plateau else "schedule" if scheduled else ""
    if advance and not reset and run.stages[progress.stage + 1].reset_at_start:
        rule, reset = run.stages[progress.stage + 1].reset, "stage"
    return Decision(reset, bool(reset) and rule.optimizer, advance)


def apply(progress: Progress, decision: Decision) -> Progress:
    """The progress once a decision is carried out. After a reset plateaus are judged afresh."""
    if decision.reset:
        progress = replace(progress, last_reset=progress.step, scores=progress.scores[-1:])
    if decision.advance:
        progress = replace(progress, stage=progress.stage + 1, stage_start=progress.step)
    return progress
