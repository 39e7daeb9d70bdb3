import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from prolong_jax import rollout
from prolong_jax.config import MeshSettings, RolloutSettings
from prolong_jax.data.mixture import Position
from prolong_jax.data.prompts import Prompt
from prolong_jax.mesh import make_mesh
from prolong_jax.rollout import Cursor, Group
from tests.tiny import MODEL


def group(scores, number=0, statuses=None, stopped=None, step=1):
    n = len(scores)
    prompt = Prompt(
        str(number), "math", "easy", "math", ({"role": "user", "content": "?"},), {}, "test"
    )
    return Group(
        prompt=prompt,
        prompt_tokens=[1, 2],
        tokens=[[3, 4]] * n,
        logp=[[-0.5, -0.25]] * n,
        stopped=stopped or [True] * n,
        texts=["text"] * n,
        scores=scores,
        statuses=statuses or ["ok"] * n,
        details=[""] * n,
        step=step,
    )


ALIVE, ZERO, ONE, SAME = [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.3, 0.3]


def collect(monkeypatch, rounds, cursor, **settings):
    """Collects with a sampler that yields the given rewards, round after round."""
    asked, rounds = [], iter(rounds)
    stops: Any = type("Tokenizer", (), {"stop_ids": (1,), "pad_id": 0})
    pool: Any = None
    collector = rollout.Collector(MODEL, make_mesh(MeshSettings()), stops, pool, seed=0)

    def next_prompts(position: Position, count: int) -> Any:
        prompts = list(range(position.drawn, position.drawn + count))
        return prompts, Position(position.drawn + count)

    def sampled(collector, params, prompts, *rest):
        asked.append(prompts)
        return [group(s, p) for p, s in zip(prompts, next(rounds), strict=True)]

    monkeypatch.setattr(rollout, "sample_groups", sampled)

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
        assert np.count_nonzero(rollout.advantages(group(scores), RolloutSettings())) == 8


def test_shaping_does_not_wake_a_dead_group():
    uniform = group(ONE, stopped=[True, False])
    settings = RolloutSettings(stop_properly=0.5)
    assert uniform.is_dead
    assert np.ptp(rollout.advantages(uniform, settings)) > 0


def test_faults_of_the_verifier_are_left_out():
    broken = group([1.0, 0.0, 0.0], statuses=["ok", "ok", "error"])
    kept = rollout.conversations(broken, RolloutSettings())
    assert len(kept) == 2 and kept[0].advantage == -kept[1].advantage > 0
    assert group([1.0, 0.0], statuses=["ok", "error"]).is_dead
    late = group([1.0, 0.0], statuses=["ok", "timeout"])
    assert not late.is_dead and len(rollout.conversations(late, RolloutSettings())) == 2


def test_a_group_survives_json():
    before = group([0.1, 1 / 3], stopped=[True, False])
    assert rollout.group_from_dict(json.loads(json.dumps(dataclasses.asdict(before)))) == before
