import dataclasses
import json
import math
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import groups, rollout, sampler
from prolong_jax.config import (
    TINY_BASE,
    AdvantageSettings,
    MeshSettings,
    RolloutSettings,
    RunConfig,
    ShapingSettings,
)
from prolong_jax.data.mixture import Position, prompt_at
from prolong_jax.data.prompts import Prompt
from prolong_jax.groups import Group
from prolong_jax.mesh import make_mesh
from prolong_jax.models.decoder import sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.next_token import SamplingRule
from prolong_jax.rollout import Cursor
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.verifiers import Status, Verdict
from tests.tiny import MODEL


def group(scores, number=0, statuses=None, stopped=None, step=1, tokens=None):
    n = len(scores)
    prompt = Prompt(
        str(number), "math", "easy", "math", ({"role": "user", "content": "?"},), {}, "test"
    )
    return Group(
        prompt=prompt,
        prompt_tokens=[1, 2],
        tokens=tokens or [[3, 4]] * n,
        logp=[[-0.5, -0.25]] * n,
        stopped=stopped or [True] * n,
        texts=["text"] * n,
        scores=scores,
        statuses=statuses or ["ok"] * n,
        details=[""] * n,
        step=step,
    )


def items(of, run=None):
    """The conversations of one group."""
    run = run or RunConfig()
    return groups.conversations([of], groups.advantages([of], run, 1), run)[0]


ALIVE, ZERO, ONE, SAME = [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.3, 0.3]


def collect(monkeypatch, rounds, cursor, **settings):
    """Collects with a sampler that yields the given rewards, round after round."""
    asked, rounds = [], iter(rounds)
    stops: Any = type("Tokenizer", (), {"stop_ids": (1,)})
    pool: Any = None
    collector = rollout.Collector(MODEL, make_mesh(MeshSettings()), stops, pool, seed=0)

    def next_prompts(position: Position, count: int) -> Any:
        prompts = list(range(position.drawn, position.drawn + count))
        return prompts, Position(position.drawn + count)

    class Rounds:
        """Goes on to another round whenever it is told that there will be one."""

        def __init__(self, *_):
            pass

        def sample(self, params, prompts, further):
            done = []
            while prompts:
                asked.append(prompts)
                done.append([group(s, p) for p, s in zip(prompts, next(rounds), strict=True)])
                dead = sum(g.is_dead for found in done for g in found)
                prompts = further(len(done), dead) if further else []
            return done

    monkeypatch.setattr(rollout, "_Rounds", Rounds)
    settings = RolloutSettings(prompts_per_step=3, group_size=2, **settings)
    kept, drawn = rollout.collect(collector, {}, cursor, next_prompts, settings, 1, rollout.Timer())
    return [g.prompt.id for g in kept], asked, drawn


def test_refills_until_enough_groups_live_and_keeps_the_surplus(monkeypatch):
    cursor = Cursor()
    rounds = [[ALIVE, ZERO, ONE], [SAME, ALIVE, ALIVE], [ALIVE, ALIVE, ZERO]]
    kept, asked, drawn = collect(monkeypatch, rounds, cursor)
    assert kept == ["0", "4", "5"] and asked == [[0, 1, 2], [3, 4, 5]] and len(drawn) == 6
    assert cursor.position.drawn == 6 and cursor.surplus == []
    kept, asked, _ = collect(monkeypatch, [[ALIVE] * 3, [ALIVE] * 3], cursor)
    assert kept == ["6", "7", "8"]

    cursor = Cursor(surplus=[group(ALIVE, 90), group(ALIVE, 91)])
    kept, asked, _ = collect(monkeypatch, [[ALIVE, ALIVE, ZERO]], cursor)
    assert kept == ["90", "91", "0"] and [g.prompt.id for g in cursor.surplus] == ["1"]
    cursor = Cursor(surplus=[group(ALIVE, n) for n in (90, 91, 92, 93)])
    kept, asked, drawn = collect(monkeypatch, [], cursor)
    assert kept == ["90", "91", "92"] and asked == [] and drawn == []
    assert [g.prompt.id for g in cursor.surplus] == ["93"]


def test_trains_on_what_there_is_when_the_rounds_run_out(monkeypatch):
    cursor = Cursor()
    kept, asked, _ = collect(
        monkeypatch, [[ZERO] * 3, [ALIVE, ZERO, ONE]], cursor, max_sampling_rounds=2
    )
    assert kept == ["3"] and len(asked) == 2 and cursor.position.drawn == 6


def test_without_dynamic_sampling_dead_groups_are_kept(monkeypatch):
    kept, asked, _ = collect(monkeypatch, [[ZERO, ALIVE, ONE]], Cursor(), dynamic_sampling=False)
    assert kept == ["0", "1", "2"] and len(asked) == 1


@pytest.mark.parametrize(
    "scores, dead", [([1.0] + [0.0] * 7, False), ([0.3] * 8, True), ([0.0] * 8, True)]
)
def test_lone_success_lives_and_uniform_rewards_die(scores, dead):
    assert group(scores).is_dead == dead
    if not dead:
        assert np.count_nonzero(groups.advantages([group(scores)], RunConfig(), 1)) == 8


def test_shaping_does_not_wake_a_dead_group():
    uniform = group(ONE, stopped=[True, False])
    run = RunConfig(shaping=ShapingSettings(stop_properly=0.5))
    assert uniform.is_dead
    assert np.ptp(groups.advantages([uniform], run, 1)) > 0


def shaped(run_shaping, step=1, **values):
    run = RunConfig(
        rollout=RolloutSettings(max_response_len=10), shaping=ShapingSettings(**run_shaping)
    )
    return groups.shaped_reward(group([1.0, 1.0, 0.0], **values), run, step)


def test_every_shaping_setting_changes_the_reward():
    ends = {"stopped": [True, True, False], "tokens": [[1, 2], [1, 1, 1, 1], list(range(10))]}
    np.testing.assert_array_equal(shaped({}, **ends), [1, 1, 0])
    np.testing.assert_array_equal(shaped({"stop_properly": -0.5}, **ends), [1, 1, -0.5])
    np.testing.assert_allclose(shaped({"overlong_buffer": 0.8}, **ends), [1, 0.75, -1])
    half = {"overlong_buffer": 0.8, "overlong_coef": 0.5}
    np.testing.assert_allclose(shaped(half, **ends), [1, 0.875, -0.5])
    cosine = {"length_coef": 0.5, "length_min": -1.0, "length_on": 2, "length_off": 3}
    on, off = shaped(cosine, **ends), shaped(cosine, step=3, **ends)
    np.testing.assert_array_equal(off, [1, 1, 0])
    assert 1 > on[0] > on[1] and on[2] == -0.5
    repeated = shaped({"ngram_size": 1, "ngram_coef": 0.4}, **ends)
    np.testing.assert_allclose(repeated, [1, 0.7, 0])


def test_overlong_responses_can_be_left_out_of_the_loss_but_not_of_the_group():
    late = group([1.0, 0.0, 0.0], stopped=[True, True, False])
    run = RunConfig(shaping=ShapingSettings(overlong_filter=True))
    kept, whole = items(late, run), items(late)
    assert (len(kept), len(whole)) == (2, 3)
    assert [c.advantage for c in kept] == [c.advantage for c in whole[:2]]


def test_estimators_over_the_batch_see_all_groups_of_a_step():
    run = RunConfig(advantage=AdvantageSettings("group_mean_batch", correct_boost=2.0))
    sure, even = group([1.0, 0.9, 0.9, 0.8]), group([1.0, 0.0, 1.0, 0.0])
    together = groups.advantages([sure, even], run, 1)
    alone = groups.advantages([sure], run, 1)
    assert not np.allclose(together[0], alone[0])
    std = math.sqrt((2 * 0.1**2 + 4 * 0.5**2) / 7)
    np.testing.assert_allclose(together[1], [1 / std, -0.5 / std] * 2, rtol=1e-5)  # 2 * 0.5


@pytest.mark.parametrize("estimator", ["group", "group_mean_batch"])
def test_groups_of_another_size_are_trained_on_too(estimator):
    """As after a change of the group size, when surplus groups wait."""
    run = RunConfig(advantage=AdvantageSettings(estimator))
    mixed = [group([1.0, 0.0, 0.0]), group([1.0, 0.0])]
    advantage_PG = groups.advantages(mixed, run, 1)
    assert [len(c) for c in groups.conversations(mixed, advantage_PG, run)] == [3, 2]
    if estimator == "group":
        np.testing.assert_allclose(advantage_PG[1, :2], groups.advantages(mixed[1:], run, 1)[0])
    assert advantage_PG[1, 2] == 0
    assert groups.advantages([], run, 1).size == 0


def test_what_is_filtered_is_not_counted_as_trained():
    late = group([1.0, 0.0, 0.0], stopped=[True, True, False])
    run = RunConfig(shaping=ShapingSettings(overlong_filter=True))
    told = [groups.statistics([late], [late], 0, r)["tokens/trained"] for r in (run, RunConfig())]
    assert told == [6, 8]  # a prompt of 2, and 2 of each response


def test_a_sample_that_was_not_trained_on_has_no_advantage():
    kept, other = group([1.0, 0.0]), group([0.0, 1.0, 1.0])
    advantage_PG = groups.advantages([kept], RunConfig(), 1)
    rows = groups.sample_rows([kept, other], [kept], advantage_PG, 1)
    assert rows[0]["advantage"] > 0 and rows[1]["advantage"] == 0


def test_faults_of_the_verifier_are_left_out():
    broken = group([1.0, 0.0, 0.0], statuses=["ok", "ok", "error"])
    kept = items(broken)
    assert len(kept) == 2 and kept[0].advantage == -kept[1].advantage > 0
    assert group([1.0, 0.0], statuses=["ok", "error"]).is_dead
    late = group([1.0, 0.0], statuses=["ok", "timeout"])
    assert not late.is_dead and len(items(late)) == 2


def test_a_group_survives_json():
    before = group([0.1, 1 / 3], stopped=[True, False])
    assert groups.group_from_dict(json.loads(json.dumps(dataclasses.asdict(before)))) == before


# --- with the real sampler and verifiers ------------------------------------------------------------

TASKS = [prompt_at(n, 0, {"math": 1.0, "logic": 1.0}, {"easy": 1.0}) for n in range(9)]
SETTINGS = RolloutSettings(
    prompts_per_step=3,
    group_size=4,
    max_prompt_len=64,
    max_response_len=24,
    sample_rows=8,
    cache_lens=1,
    compile_ahead=False,
)
PLAN = rollout.Plan(SETTINGS, 4, SamplingRule(()), step=1)


class SlowPool:
    """Scores by the text's parity, some time after it was asked, in another order."""

    def __init__(self, delay_s=0.0, scores=None):
        self.waiting, self.delay_s, self.scores = [], delay_s, scores or {}

    def submit(self, item_id, verifier, response, reference):
        score = self.scores.get(item_id[0], float(item_id[1] % 2))
        self.waiting.insert(0, (time.monotonic() + self.delay_s, item_id, score))

    def poll(self, timeout_s=0.0):
        ready = [item for item in self.waiting if item[0] <= time.monotonic()]
        if not ready and timeout_s and self.waiting:
            time.sleep(0.01)
        self.waiting = [item for item in self.waiting if item not in ready]
        return [(item_id, Verdict(score, Status.OK, "")) for _, item_id, score in ready]

    def as_completed(self):
        while self.waiting:
            yield from self.poll(1.0)


@pytest.fixture(scope="module")
def tiny():
    mesh = make_mesh(MeshSettings())
    model, params = load_model(TINY_BASE, jnp.dtype("float32"), mesh)
    return model, mesh, params, ChatTokenizer(TINY_BASE)


def rounds_of(tiny, pool, further=None, plan=PLAN, prompts=TASKS[:3]):
    model, mesh, params, tokenizer = tiny
    collector = rollout.Collector(model, mesh, tokenizer, pool, seed=0)
    rounds = rollout._Rounds(collector, plan, rollout.Timer())
    return rounds.sample(sampling_copy(collector.model, mesh, params), prompts, further)


def test_a_group_has_its_own_samples_and_verdicts(tiny):
    (groups,) = rounds_of(tiny, SlowPool())
    assert [g.prompt.id for g in groups] == [p.id for p in TASKS[:3]]
    for g in groups:
        assert g.scores == [0.0, 1.0, 0.0, 1.0] and g.step == 1 and not g.truncated
        assert g.prompt_tokens == tiny[3].encode_chat(g.prompt.messages)[0]
        assert g.texts == [tiny[3].decode(tokens) for tokens in g.tokens]
        assert g.stopped == [len(tokens) < 24 for tokens in g.tokens]
        assert [len(logp) for logp in g.logp] == [len(tokens) for tokens in g.tokens]
    (alone,) = rounds_of(tiny, SlowPool(), prompts=TASKS[1:2])
    assert alone[0].tokens == groups[1].tokens


def test_responses_are_judged_while_others_are_decoded(tiny, monkeypatch):
    events, decode = [], sampler._decode

    class Watched(SlowPool):
        def submit(self, *item):
            events.append("submit")
            super().submit(*item)

    def watched(*arguments):
        events.append("decode")
        return decode(*arguments)

    monkeypatch.setattr(sampler, "_decode", watched)
    rounds_of(tiny, Watched(), prompts=TASKS[:6])
    assert events.count("submit") == 24
    last = len(events) - events[::-1].index("decode") - 1
    assert events[0] == "decode" and 8 <= events[:last].count("submit") < 24


def test_a_further_round_begins_with_what_verdicts_say_however_long_they_take(tiny):
    asked: dict[float, list] = {0.0: [], 0.05: []}
    for delay_s, calls in asked.items():

        def further(begun, dead, calls=calls):
            calls.append((begun, dead))
            return TASKS[3:6] if begun == 1 and dead else []

        pool = SlowPool(delay_s, scores={0: 1.0, 2: 0.0})
        first, second = rounds_of(tiny, pool, further)
        assert [g.prompt.id for g in first + second] == [p.id for p in TASKS[:6]]
        assert [g.is_dead for g in first] == [True, False, True]
    assert asked[0.0] == asked[0.05] and (1, 1) in asked[0.0]


def test_nothing_waits_for_verdicts_that_cannot_bring_a_further_round(tiny):
    class Watched(SlowPool):
        waits = 0

        def poll(self, timeout_s=0.0):
            self.waits += timeout_s > 0
            return super().poll(timeout_s)

        def as_completed(self):  # after sampling
            while self.waiting:
                yield from super().poll(0.01)

    for least in (1, 9):  # dead groups with which a further round is certain

        def further(begun, dead, least=least):
            return TASKS[3:6] if begun == 1 and dead >= least else []

        pool = Watched(0.3)
        rounds_of(tiny, pool, further)
        assert (pool.waits > 0) == (least == 1)


def test_several_processes_begin_no_round_ahead(monkeypatch):
    rounds = [[ALIVE, ZERO, ONE], [SAME, ALIVE, ALIVE]]
    alone = collect(monkeypatch, rounds, Cursor())
    monkeypatch.setattr(rollout.jax, "process_count", lambda: 2)
    monkeypatch.setattr(rollout, "share", lambda prompts, work: work(prompts))
    monkeypatch.setattr(rollout, "dealt", lambda prompts: prompts)
    assert collect(monkeypatch, rounds, Cursor())[:2] == alone[:2]


def test_what_a_collection_needs_is_compiled_before_it_and_once(tiny, monkeypatch):
    calls, ahead = [], rollout.compile_ahead
    monkeypatch.setattr(rollout, "compile_ahead", lambda *a: (calls.append(a), ahead(*a)))
    plan = replace(PLAN, settings=replace(SETTINGS, compile_ahead=True))
    model, mesh, params, tokenizer = tiny
    pool: Any = SlowPool()
    collector = rollout.Collector(model, mesh, tokenizer, pool, seed=0)
    (before,) = rounds_of(tiny, SlowPool())
    for _ in range(2):
        rounds = rollout._Rounds(collector, plan, rollout.Timer())
        (found,) = rounds.sample(sampling_copy(model, mesh, params), TASKS[:3])
        assert [g.tokens for g in found] == [g.tokens for g in before]
    assert len(calls) == 1


def test_long_prompts_are_refused_or_lose_their_beginning(tiny):
    tokens, _ = tiny[3].encode_chat(TASKS[0].messages)
    short = replace(SETTINGS, max_prompt_len=len(tokens) - 2)
    with pytest.raises(ValueError, match=f"has {len(tokens)} tokens, at most {len(tokens) - 2}"):
        rounds_of(tiny, SlowPool(), plan=replace(PLAN, settings=short), prompts=TASKS[:1])
    cut = replace(PLAN, settings=replace(short, long_prompts="truncate"))
    ((found,),) = rounds_of(tiny, SlowPool(), plan=cut, prompts=TASKS[:1])
    assert found.prompt_tokens == tokens[2:] and found.truncated


def test_the_sampling_copy_is_none_where_the_layout_is_right(tiny):
    model, mesh, params, _ = tiny
    same = sampling_copy(model, mesh, params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True)
    assert all(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in pairs)
    half = replace(model, dtype=jnp.bfloat16)
    kinds = {x.dtype.name for x in jax.tree.leaves(sampling_copy(half, mesh, params))}
    assert kinds == {"bfloat16", "float32"}  # float32: the scales of the norms
