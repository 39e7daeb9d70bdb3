import dataclasses
import json
import random

import pytest

from prolong_jax import replay, stages
from prolong_jax.config import ResetSettings, RunConfig, StageSettings, ValidationSettings
from prolong_jax.reset_rules import KL_SCALE, Evaluation, History
from prolong_jax.stages import Decision, Progress

HEALTHY = {"update/kl_ref": 0.01, "update/entropy": 1.0, "response/terminated": 1.0}


def play(run: RunConfig, scores, steps: int, rows=None, width=0.0, requests=None):
    """Plays a run whose n-th evaluation gives scores[n] and whose n-th step gives rows[n].

    Returns the resets and changes of stage as (step, reason, advance), and all decisions.
    """
    progress, history, events, decisions = Progress(), History(), [], []
    scores, requests = iter(scores), requests or {}
    for n in range(steps):
        request = frozenset(requests.get(n, ()))
        decision = stages.decide(run, progress, history, request)
        decisions.append(decision)
        if decision.finish:
            return [*events, (n, "finish")], decisions
        if decision.reset or decision.advance:
            events.append((n, decision.reset, decision.advance))
        progress, history = stages.apply(run, progress, history, decision)
        evaluation = None
        if stages.is_evaluation_due(run, n + 1):
            score = next(scores)
            evaluation = Evaluation(n + 1, score, score - width, score + width)
        row = HEALTHY if rows is None else rows[n]
        over = run.stages[progress.stage].reset.over
        progress, history = stages.record(progress, history, row, evaluation, over)
    return events, decisions


def one_stage(**reset) -> RunConfig:
    return RunConfig(
        validation=ValidationSettings(every=2),
        stages=(StageSettings(reset=ResetSettings(**reset)),),
    )


def healthy(steps: int, **changes):
    """Rows of a healthy run; `changes` maps a signal to {step: value}, by the end of its name."""
    rows = [dict(HEALTHY) for _ in range(steps)]
    for end, values in changes.items():
        (name,) = (name for name in HEALTHY if name.endswith(end))
        for step, value in values.items():
            rows[step - 1][name] = value
    return rows


def test_a_schedule_is_exact():
    for every in (1, 5, 7):
        events, _ = play(one_stage(every=every), [0.0] * 50, 50)
        assert events == [(s, "schedule", False) for s in range(every, 50, every)]


def test_a_schedule_with_the_longest_cooldown_is_exact():
    events, _ = play(one_stage(every=5, cooldown=5), [0.0] * 20, 21)
    assert events == [(s, "schedule", False) for s in (5, 10, 15, 20)]


def test_a_plateau_resets_once_per_window():
    run = one_stage(plateau_window=2, plateau_gain=0.01)
    # The evaluations at steps 6 and 8 bring no gain over the one at 4; after the reset the last
    # score is what the next ones must beat.
    scores = [0.1, 0.5, 0.505, 0.5, 0.5, 0.6, 0.6, 0.6]
    events, decisions = play(run, scores, 17)
    assert events == [(8, "plateau", False), (16, "plateau", False)]
    assert decisions[8].values == {"score": 0.505, "best": 0.5, "not_above": 0.51}


def test_a_gain_within_the_interval_is_a_plateau_and_one_beyond_it_is_not():
    run = one_stage(plateau_window=1, plateau_gain=0.0)
    for gain, resets in ((0.03, True), (0.05, False)):
        scores = [0.2 + gain * i for i in range(10)]
        events, _ = play(run, scores, 19, width=0.04)
        assert bool(events) is resets, (gain, events)


def test_degradation_is_a_score_below_the_best_ones_interval():
    run = one_stage(degradation=0.02)
    for drop, resets in ((0.019, []), (0.03, []), (0.05, [(6, "degradation", False)])):
        events, decisions = play(run, [0.2, 0.5, 0.5 - drop, 0.5], 8, width=0.04)
        assert events == resets
        if resets:
            expected = {"score": 0.5 - drop, "best": 0.5, "below": 0.46}
            assert decisions[6].values == pytest.approx(expected)


def test_high_kl_is_judged_by_the_mean_of_the_last_steps():
    run = one_stage(max_kl=0.1, over=3)
    one = healthy(20, kl_ref={10: 0.25})
    assert play(run, [0.1] * 20, 20, one)[0] == []
    events, decisions = play(run, [0.1] * 20, 20, healthy(20, kl_ref={10: 0.25, 11: 0.25}))
    assert events == [(11, "kl", False)]
    assert decisions[11].values == pytest.approx({"kl": 0.17, "above": 0.1})


def test_a_spike_of_the_kl_is_measured_against_the_steps_before():
    run = one_stage(kl_spike=4.0, over=2)
    spike, steps = KL_SCALE + 5, KL_SCALE + 10
    high = {spike: 0.041, spike - 1: 0.041}
    assert play(run, [0.1] * 99, steps, healthy(steps, kl_ref=high))[0] == [
        (spike, "kl spike", False)
    ]
    assert play(run, [0.1] * 99, steps, healthy(steps, kl_ref={spike: 0.041}))[0] == []  # alone
    early = high | {10: 9.0}  # at step 10 there is no scale yet; then it is large
    assert play(run, [0.1] * 99, steps, healthy(steps, kl_ref=early))[0] == []


def test_growth_of_the_kl_after_a_reset_is_no_spike():
    steps = 100
    rows = healthy(steps, kl_ref={n: 1e-3 * n for n in range(1, steps + 1)})
    assert play(one_stage(kl_spike=3.0), [0.1] * 99, steps, rows)[0] == []


@pytest.mark.parametrize(
    "reset, signal, bad, reason",
    [
        ({"min_entropy": 0.3}, "entropy", 0.2, "entropy"),
        ({"max_unterminated": 0.4}, "terminated", 0.5, "unterminated"),
    ],
)
def test_low_entropy_and_responses_without_an_end(reset, signal, bad, reason):
    run = one_stage(**reset, over=2)
    events, _ = play(run, [0.1] * 9, 9, healthy(9, **{signal: {3: bad}}))
    assert events == []
    # Both go on to be bad after the reset: after `over` more steps the rule asks again.
    events, _ = play(run, [0.1] * 9, 9, healthy(9, **{signal: dict.fromkeys(range(3, 10), bad)}))
    assert [(step, why) for step, why, _ in events] == [(4, reason), (6, reason), (8, reason)]


def test_steps_without_an_update_have_no_kl():
    rows = healthy(9, kl_ref={4: float("nan"), 5: None, 6: 0.3})
    events, _ = play(one_stage(max_kl=0.1, over=2), [0.1] * 9, 9, rows)
    assert events == [(6, "kl", False)]  # the mean of steps 3 and 6


RULE = {
    "degradation": {"degradation": 0.01},
    "kl": {"max_kl": 0.05},
    "kl spike": {"kl_spike": 1.5},
    "entropy": {"min_entropy": 0.5},
    "unterminated": {"max_unterminated": 0.2},
    "plateau": {"plateau_window": 1},
    "schedule": {"every": 9},
}


def wild(seed: int, steps: int):
    """Scores and rows in which every rule finds something to ask for."""
    rng = random.Random(seed)
    rows = [
        {
            "update/kl_ref": rng.expovariate(20),
            "update/entropy": rng.uniform(0.2, 1.0),
            "response/terminated": rng.uniform(0.6, 1.0),
        }
        for _ in range(steps)
    ]
    return [rng.random() for _ in range(steps)], rows


@pytest.mark.parametrize("seed", range(20))
def test_no_rule_resets_inside_the_cooldown(seed):
    rng, (scores, rows) = random.Random(seed), wild(seed, 300)
    names = rng.sample(sorted(RULE), rng.randint(1, len(RULE)))
    settings = {k: v for name in names for k, v in RULE[name].items()}
    cooldown = rng.randint(0, 9)
    events, _ = play(one_stage(**settings, cooldown=cooldown), scores, 300, rows, width=0.01)
    assert {reason for _, reason, _ in events} <= set(names)
    at = [step for step, _, _ in events]
    assert len(at) > 3
    assert all(b - a >= max(1, cooldown) for a, b in zip(at, at[1:], strict=False)), at


@pytest.mark.parametrize("name", sorted(RULE))
def test_every_rule_fires_alone(name):
    scores, rows = wild(3, 200)
    events, decisions = play(one_stage(**RULE[name]), scores, 200, rows)
    assert events and {reason for _, reason, _ in events} == {name}
    assert all(d.values for d in decisions if d.reset)
    assert play(one_stage(), scores, 200, rows)[0] == []  # all rules are off by default


def test_decisions_are_a_function_of_the_record():
    settings = {k: v for rule in RULE.values() for k, v in rule.items()}
    run, (scores, rows) = one_stage(**settings, cooldown=4), wild(1, 200)
    assert play(run, scores, 200, rows) == play(run, scores, 200, rows)


@pytest.mark.parametrize("seed", range(20))
def test_steady_improvement_never_resets(seed):
    """Every gain is beyond the interval, and all signals are healthy."""
    rng, score, scores = random.Random(seed), 0.0, []
    for _ in range(50):
        score += 0.0201 + rng.random() / 50
        scores.append(score)
    settings = {k: v for rule in RULE.values() for k, v in rule.items()} | {"every": 0}
    run = one_stage(**settings | {"plateau_gain": 0.01})
    rows = healthy(100, kl_ref={n: 0.01 + n * 1e-4 for n in range(1, 101)})
    assert play(run, scores, 100, rows, width=0.02)[0] == []


def test_stages_advance_and_reset_at_their_start():
    run = RunConfig(
        validation=ValidationSettings(every=2),
        stages=(
            StageSettings(name="a", steps=3),
            StageSettings(name="b", end_on_plateau=True, reset=ResetSettings(plateau_window=1)),
            StageSettings(name="c", reset_at_start=True, reset=ResetSettings(every=4), steps=7),
        ),
    )
    # Scores come at steps 2, 4, 6: the one at 6 ends stage b, and its plateau counts as the reset.
    events, _ = play(run, [0.1, 0.2, 0.2, 0.9, 0.9, 0.9, 0.9], 20)
    assert events == [(3, "", True), (6, "plateau", True), (10, "schedule", False), (13, "finish")]


def test_a_stage_that_asks_for_it_begins_with_a_reset():
    run = RunConfig(stages=(StageSettings(steps=3), StageSettings(reset_at_start=True)))
    assert play(run, [0.1] * 9, 9)[0] == [(3, "stage", True)]


@pytest.mark.parametrize("optimizer", [True, False])
def test_the_start_of_a_stage_says_what_is_reset_even_where_a_rule_led_to_it(optimizer):
    """As from v2, which keeps the optimizer, to v1: the plateau that ends the first stage."""
    first = ResetSettings(plateau_window=1, optimizer=not optimizer)
    run = RunConfig(
        validation=ValidationSettings(every=2),
        stages=(
            StageSettings(end_on_plateau=True, reset=first),
            StageSettings(reset_at_start=True, reset=ResetSettings(optimizer=optimizer)),
        ),
    )
    events, decisions = play(run, [0.2, 0.2, 0.2], 6)
    assert events == [(4, "plateau", True)] and decisions[4].clear_optimizer is optimizer
    plain = dataclasses.replace(run.stages[1], reset_at_start=False)
    run = dataclasses.replace(run, stages=(run.stages[0], plain))
    assert play(run, [0.2, 0.2, 0.2], 6)[1][4].clear_optimizer is not optimizer


def test_evaluations_of_another_blend_are_not_compared():
    """A change of stage keeps what evaluations found, unless the next stage has others."""
    more = {"validation.samples": 9, "validation.every": 1}  # of the same prompts
    for overrides, resets in (({}, True), (more, True), ({"validation.seed": 8}, False)):
        run = RunConfig(
            validation=ValidationSettings(every=2),
            stages=(
                StageSettings(steps=3),
                StageSettings(reset=ResetSettings(degradation=0.01), overrides=overrides),
            ),
        )
        events, _ = play(run, [0.9, 0.1, 0.2], 6)
        assert any(reason == "degradation" for _, reason, _ in events) is resets


def test_a_person_goes_before_the_rules_and_the_cooldown():
    run = one_stage(every=5, cooldown=5)
    events, decisions = play(run, [0.0] * 20, 14, requests={2: ["reset"], 4: ["reset"]})
    assert [(s, why) for s, why, _ in events] == [(2, "hand"), (4, "hand"), (9, "schedule")]
    two = dataclasses.replace(run, stages=run.stages * 2)
    assert play(two, [0.0] * 20, 4, requests={2: ["advance"]})[0] == [(2, "", True)]


def test_a_decision_taken_again_changes_nothing():
    """A resumed run asks again for the decision of the step that it was saved at."""
    run = one_stage(every=5)
    progress = Progress(step=5)
    applied, history = stages.apply(
        run, progress, History(), stages.decide(run, progress, History())
    )
    assert applied.last_reset == 5
    assert stages.decide(run, applied, history) == Decision()


def test_what_is_reset_is_a_setting():
    for optimizer in (True, False):
        for reference in ("policy", "best"):
            run = one_stage(every=1, optimizer=optimizer, reference=reference)
            decision = stages.decide(run, Progress(step=1), History())
            assert decision == Decision("schedule", {"steps": 1}, reference, optimizer)


def test_the_best_evaluation_is_remembered_over_resets():
    run, progress, history = one_stage(every=3), Progress(), History()
    for n, score in enumerate([0.1, 0.6, 0.3, 0.6, 0.5], 1):
        decision = stages.decide(run, progress, history)
        progress, history = stages.apply(run, progress, history, decision)
        evaluation = Evaluation(n, score, score, score)
        progress, history = stages.record(progress, history, HEALTHY, evaluation)
    assert progress.best == Evaluation(2, 0.6, 0.6, 0.6)


def record_of(run, scores, steps, rows):
    """metrics.jsonl of a played run."""
    _, decisions = play(run, scores, steps, rows, width=0.01)
    table = [{"step": 0, "validation/all/avg": 0.0}]
    for n, (row, decision) in enumerate(zip(rows, decisions, strict=True), 1):
        table.append({"step": n, "reset": decision.reset or None, **row})
        if n % 2 == 0:
            score = scores[n // 2 - 1]
            table[-1] |= {
                f"validation/all/{k}": v
                for k, v in (("avg", score), ("lo", score - 0.01), ("hi", score + 0.01))
            }
    return table, decisions


def test_a_replay_decides_as_the_run_did_and_others_with_other_settings():
    settings = {k: v for rule in RULE.values() for k, v in rule.items()}
    run, (scores, rows) = one_stage(**settings, cooldown=4), wild(1, 120)
    table, decisions = record_of(run, scores, 120, rows)
    assert [decision for _, decision in replay.replay(run, table)] == decisions
    other = [d.reset for _, d in replay.replay(one_stage(every=50), table)]
    assert [n for n, reason in enumerate(other) if reason] == [50, 100]


def test_the_replay_prints_what_was_and_what_would_be(capsys, tmp_path):
    run, (scores, rows) = one_stage(every=6), wild(1, 20)
    table, _ = record_of(run, scores, 20, rows)
    metrics, config = tmp_path / "metrics.jsonl", tmp_path / "config.py"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in table))
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'validation': {'every': 2}, 'stages': [{'reset': {'every': 6}}]})\n"
    )
    argv = [f"--replay={metrics}", f"--config={config}"]
    assert replay.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in lines] == [
        [str(n), "reset", "(schedule)", "steps", "6", "reset", "(schedule)"] for n in (6, 12, 18)
    ]
    assert replay.main([*argv, "--config.stages.0.reset.every=9"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["6", "9", "12", "18"]
    assert replay.main([f"--replay={tmp_path / 'none'}", f"--config={config}"]) == 2
