import random

import pytest

from prolong_jax import stages
from prolong_jax.config import ResetSettings, RunConfig, StageSettings, ValidationSettings
from prolong_jax.stages import Progress


def play(run: RunConfig, scores, steps: int):
    """Replays a run whose n-th evaluation gives scores[n]; returns the resets and stage changes."""
    progress, events, scores = Progress(), [], iter(scores)
    for _ in range(steps):
        decision = stages.decide(run, progress)
        if decision.reset or decision.advance:
            events.append((progress.step, decision.reset, decision.advance))
        progress = stages.apply(progress, decision)
        due = stages.is_evaluation_due(run, progress.step + 1)
        progress = stages.record(progress, next(scores) if due else None)
    return events


def one_stage(**reset) -> RunConfig:
    return RunConfig(
        validation=ValidationSettings(every=2),
        stages=(StageSettings(reset=ResetSettings(**reset)),),
    )


def test_a_schedule_is_exact():
    assert play(one_stage(every=5), [0.0] * 20, 21) == [
        (s, "schedule", False) for s in (5, 10, 15, 20)
    ]


def test_a_plateau_resets_once_per_window():
    run = one_stage(plateau_window=2, plateau_gain=0.01)
    # The evaluations at steps 6 and 8 bring no gain over the one at 4; after the reset the last
    # score is what the next ones must beat.
    scores = [0.1, 0.5, 0.505, 0.5, 0.5, 0.6, 0.6, 0.6]
    assert play(run, scores, 17) == [(8, "plateau", False), (16, "plateau", False)]


@pytest.mark.parametrize("seed", range(20))
def test_steady_improvement_never_resets(seed):
    rng, score, scores = random.Random(seed), 0.0, []
    for _ in range(30):
        score += 0.0101 + rng.random() / 50
        scores.append(score)
    assert play(one_stage(plateau_window=1, plateau_gain=0.01), scores, 60) == []


def test_stages_advance_and_reset_at_their_start():
    run = RunConfig(
        validation=ValidationSettings(every=2),
        stages=(
            StageSettings(name="a", steps=3),
            StageSettings(name="b", end_on_plateau=True, reset=ResetSettings(plateau_window=1)),
            StageSettings(name="c", reset_at_start=True, reset=ResetSettings(every=4)),
        ),
    )
    # Scores come at steps 2, 4, 6: the one at 6 ends stage b, and its plateau counts as the reset.
    assert play(run, [0.1, 0.2, 0.2, 0.9, 0.9, 0.9], 12) == [
        (3, "", True),
        (6, "plateau", True),
        (10, "schedule", False),
    ]


def test_a_stage_that_asks_for_it_begins_with_a_reset():
    run = RunConfig(stages=(StageSettings(steps=3), StageSettings(reset_at_start=True)))
    assert play(run, [0.1] * 9, 9) == [(3, "stage", True)]


def test_a_decision_taken_again_changes_nothing():
    """A resumed run asks again for the decision of the step that it was saved at."""
    run = one_stage(every=5)
    progress = Progress(step=5)
    applied = stages.apply(progress, stages.decide(run, progress))
    assert applied.last_reset == 5
    assert stages.decide(run, applied) == stages.Decision()


def test_clearing_the_optimizer_is_a_setting():
    for optimizer in (True, False):
        decision = stages.decide(one_stage(every=1, optimizer=optimizer), Progress(step=1))
        assert decision == stages.Decision("schedule", optimizer, False)
