"""The order of prompts: deterministic, dealt without gap or overlap, resumable, weights that change."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from prolong_jax.config import DataSettings, SourceSettings, StageSettings
from prolong_jax.data.mixture import (
    Position,
    Sources,
    draw,
    is_in_range,
    load,
    next_prompts,
    prompt_at,
    record,
    source_weights,
    stream_of,
)
from prolong_jax.data.prompts import Prompt, Skipped

SIZES = {"big": 10, "small": 3}
WEIGHTS = {"big": 0.7, "small": 0.3}


def prompt(name: str, i: int) -> Prompt:
    return Prompt(f"{name}/{i}", "math", "", "math", (), {"answer": str(i)}, name)


def streams(seed: int = 0):
    return {n: stream_of([prompt(n, i) for i in range(k)], n, seed) for n, k in SIZES.items()}


def ids(prompts: list[Prompt]) -> list[str]:
    return [p.id for p in prompts]


def test_every_epoch_is_another_order_of_all_prompts():
    stream = streams()["big"]
    epochs = [[stream(epoch * 10 + i).id for i in range(10)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != [streams(seed=1)["big"](i).id for i in range(10)]
    assert stream(3).id == epochs[0][3], "a stream has no memory"


def test_the_order_follows_the_weights_and_the_seed():
    found, position = draw(Position(), 2000, streams(), WEIGHTS, seed=0)
    shares = Counter(p.source for p in found)
    assert abs(shares["big"] / 2000 - 0.7) < 0.04
    assert position == Position(2000, {"big": shares["big"], "small": shares["small"]})
    assert draw(Position(), 2000, streams(), WEIGHTS, seed=0)[0] == found
    assert ids(draw(Position(), 50, streams(), WEIGHTS, seed=1)[0]) != ids(found[:50])


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_the_order_without_gap_or_overlap(processes):
    whole, end = draw(Position(), 96, streams(), WEIGHTS, seed=0)
    shares = [
        draw(Position(), 96, streams(), WEIGHTS, seed=0, process=(i, processes))
        for i in range(processes)
    ]
    assert all(position == end for _, position in shares)
    for i, (share, _) in enumerate(shares):
        assert share == whole[i::processes]


@pytest.mark.parametrize("cut", [0, 1, 7, 39, 40])
def test_a_run_goes_on_exactly_where_it_stopped(cut):
    whole, end = draw(Position(), 40, streams(), WEIGHTS, seed=0)
    first, position = draw(Position(), cut, streams(), WEIGHTS, seed=0)
    kept = json.loads(json.dumps({"drawn": position.drawn, "cursors": dict(position.cursors)}))
    assert len(json.dumps(kept)) < 80, "a position is a few bytes"
    rest, position = draw(Position(**kept), 40 - cut, streams(), WEIGHTS, seed=0)
    assert first + rest == whole and position == end


def test_other_weights_keep_the_cursor_of_each_source():
    first, position = draw(Position(), 20, streams(), WEIGHTS, seed=0)
    middle, position = draw(position, 5, streams(), {"small": 1.0}, seed=0)
    assert {p.source for p in middle} == {"small"}
    last, position = draw(position, 20, streams(), {"big": 1.0}, seed=0)
    big = [p for p in first + middle + last if p.source == "big"]
    assert ids(big) == [streams()["big"](i).id for i in range(len(big))], "no gap, no repetition"
    assert position.drawn == 45 and position.cursors["big"] == len(big)


def test_embedded_tasks_are_a_stream_too():
    embedded = {"embedded": lambda i: prompt_at(i, 0, {"math": 1.0}, {"easy": 1.0})}
    found, _ = draw(Position(), 3, embedded, {"embedded": 1.0}, seed=0)
    assert len(set(ids(found))) == 3


def test_unwanted_prompts_are_passed_over():
    unwanted = {"big/1", "big/2", "big/3"}
    found, position = draw(
        Position(), 14, streams(), {"big": 1.0}, 0, is_wanted=lambda name: name not in unwanted
    )
    assert not unwanted & set(ids(found)) and Counter(ids(found)).most_common()[-1][1] == 2
    assert position.cursors["big"] >= 19
    assert (
        len(draw(Position(), 3, streams(), {"big": 1.0}, 0, is_wanted=lambda name: False)[0]) == 3
    )


def test_online_statistics():
    settings = DataSettings(mean_reward_after=4)
    position = record(Position(7), [("a", [1.0, 0.0]), ("a", [1.0, 1.0]), ("b", [])], settings)
    assert position == Position(7, {}, {"a": (3.0, 4), "b": (0.0, 0)})

    def kept(low, high, prompt_id="a", after=4):
        return is_in_range(position, prompt_id, DataSettings({}, False, low, high, after))

    assert kept(0.1, 0.8) and not kept(0.1, 0.7) and not kept(0.8, 1.0)
    assert kept(0.1, 0.7, after=5) and kept(0.5, 0.6, "new") and kept(0.5, 0.6, "b", after=0)
    assert record(Position(), [("a", [1.0])], DataSettings()) == Position(), "off by default"


def test_a_prompt_that_has_become_too_easy_is_passed_over():
    """Also after a round trip through JSON, as in a checkpoint."""
    settings = DataSettings(max_mean_reward=0.9, mean_reward_after=2)
    shares = {"small": ("math", 1.0)}
    sources = Sources({"small": streams()["small"]}, shares, settings)
    stage = StageSettings(mixture={"math": 1.0})
    position = record(Position(), [("small/1", [1.0, 1.0]), ("small/2", [1.0, 0.0])], settings)
    restored = Position(**json.loads(json.dumps(dataclasses.asdict(position))))
    for start in (position, restored):
        found, end = next_prompts(sources, start, 30, seed=0, stage=stage)
        assert set(ids(found)) == {"small/0", "small/2"}
        assert set(end.rewards) == {"small/2"} and end.drawn == 30
        found, end = next_prompts(sources, end, 30, seed=0, stage=stage)
        assert set(ids(found)) == {"small/0", "small/1", "small/2"}, "unknown again"


def test_weights_by_source_and_by_domain():
    sources = {"deepscaler": ("math", 1.0), "numina": ("math", 3.0), "eurus": ("code", 1.0)}
    assert source_weights({"math": 0.8, "code": 0.2}, sources) == {
        "deepscaler": pytest.approx(0.2),
        "numina": pytest.approx(0.6),
        "eurus": pytest.approx(0.2),
    }
    mixed = source_weights({"math": 0.5, "numina": 0.5}, sources)
    assert mixed == {"numina": 0.5, "deepscaler": 0.5}
    for wrong in ({"stem": 1.0}, {"numna": 1.0}, {"eurus": 1.0, "code": 1.0}):
        with pytest.raises(ValueError, match="mixture: expected sources"):
            source_weights(wrong, sources)


def test_a_source_without_prompts_is_refused():
    with pytest.raises(ValueError, match="'empty' has no usable prompt"):
        stream_of([], "empty", 0)


def loaded(path: Path, **settings) -> list[Prompt | Skipped]:
    strict = settings.pop("strict", False)
    source = SourceSettings(str(path), **settings)
    return list(load("src", source, lambda p: len(p.messages[0]["content"]), 100, strict))


def test_what_a_run_cannot_train_on_is_skipped(tmp_path):
    path, rates = tmp_path / "rows.jsonl", tmp_path / "rates.jsonl"
    asserts = {"asserts": "assert f(1) == 1", "hackable": True}
    rows = [
        {"problem": "1+1?", "answer": "2"},
        {"problem": "1+1?" * 100, "answer": "2"},
        {"domain": "code", "prompt": "Do f.", "reference": asserts},
        {"problem": "2+2?", "answer": "4"},
        {"problem": "2+2?", "answer": None},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    rates.write_text('{"id": "src/0", "pass_rate": 0.05}\n{"id": "src/3", "pass_rate": 1}\n')
    found = loaded(path)
    assert [getattr(item, "reason", "") for item in found] == [
        "",
        "prompt too long",
        "tests for evaluation only",
        "",
        "no answer",
    ]
    found = loaded(path, pass_rates=str(rates), min_pass_rate=0.05, max_pass_rate=0.9)
    assert isinstance(found[0], Prompt) and isinstance(found[3], Skipped)
    assert not found[3].is_bad
    with pytest.raises(ValueError, match="row src/1 of source 'src' cannot be used: prompt too lo"):
        loaded(path, strict=True)
    path.write_text("\n".join(json.dumps(row) for row in [rows[0], rows[4]]))
    with pytest.raises(ValueError, match="row rows.jsonl:2 of source 'src' cannot be used: no ans"):
        loaded(path, strict=True)
