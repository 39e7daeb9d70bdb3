import dataclasses
import itertools
import json
import os
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import passk
from prolong_jax.checkpoint import Checkpointer
from prolong_jax.config import (
    TINY_BASE,
    RunConfig,
    build,
    check,
    to_dict,
)
from prolong_jax.data.prompts import Prompt
from prolong_jax.evaluate import held_out_prompts, main, records, validation_metrics
from prolong_jax.groups import Group
from prolong_jax.models.hf import load_model
from prolong_jax.outcomes import outcomes, read_outcomes, summarise, vote_of
from prolong_jax.scores import (
    bootstrap_interval,
    maj_at_k,
    paired_difference,
    pass_at_k,
    powers_of_two,
)
from prolong_jax.startup import lock
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.types import TrainState

TINY = "experiments/configs/tiny.py"
TOKENIZER = ChatTokenizer(TINY_BASE)


def group(domain, level, scores, statuses=None, texts=None, source="procedural", **reference):
    n = len(scores)
    prompt = Prompt(f"{domain}/{level}/{source}", domain, level, domain,
                    ({"role": "user", "content": "?"},), reference, source)  # fmt: skip
    return Group(prompt, [1], [[1, 2]] * n, [[-0.5, -1.5]] * n, [True] * n, texts or [""] * n,
                 scores, statuses or ["ok"] * n, [""] * n, 0)  # fmt: skip


def table_of(*groups):
    return summarise(list(outcomes(records(groups, TOKENIZER))))


# --- estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [i < c for i in range(n)]
        expected = np.mean([any(subset) for subset in itertools.combinations(samples, k)])
        assert pass_at_k(c, n, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    from fractions import Fraction
    from math import comb

    for c, n, k in ((1, 4000, 256), (40, 4000, 256), (2000, 4096, 2), (3, 512, 256), (0, 512, 9)):
        exact = 1 - Fraction(comb(n - c, k), comb(n, k))
        assert pass_at_k(c, n, k) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("c_n_k", [(3, 2, 1), (0, 4, 5), (0, 4, 0), (-1, 4, 2)])
def test_pass_at_k_out_of_range_is_refused(c_n_k):
    with pytest.raises(ValueError, match="pass@k: expected"):
        pass_at_k(*c_n_k)


def test_pass_at_k_is_shown_for_powers_of_two_and_all():
    assert powers_of_two(1) == [1]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["7", "7", "3"], [1, 1, 0], 1.0),
        (["3", "3", "7"], [0, 0, 1], 0.0),
        (["3", "7"], [0, 1], 0.5),  # a tie is shared
        (["3", "7", "8", "7", "3"], [0, 1, 0, 1, 0], 0.5),
        ([None, None, None, "7"], [0, 0, 0, 1], 1.0),  # no answer, no vote
        ([None, None], [0, 0], 0.0),
        (["a", "a", "b"], [0.4, 0.6, 1.0], 0.5),  # continuous: the mean of the elected answer
    ],
)
def test_maj_at_k_by_hand(answers, scores, expected):
    assert maj_at_k(answers, scores) == expected


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval((rng.random(60) < 0.3).astype(float), 400)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199
    assert bootstrap_interval(np.full(10, 0.5)) == [0.5, 0.5]


def test_interval_is_that_of_all_resamples():
    """Three prompts have 27 resamples, each as likely: their quantiles, by enumeration."""
    values = np.array([0.0, 0.3, 1.0])
    means = np.mean(list(itertools.product(values, repeat=3)), axis=1)
    found = bootstrap_interval(values, 100_000)
    expected = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_paired_difference_does_not_see_how_hard_the_prompts_are():
    before = np.linspace(0, 0.9, 50)
    difference, (low, high) = paired_difference(before, before + 0.1)
    assert difference == pytest.approx(0.1) and high - low < 1e-12
    difference, (low, high) = paired_difference(before, before[::-1])
    assert difference == pytest.approx(0) and low < -0.1 and high > 0.1


# --- tables --------------------------------------------------------------------------------------


def test_averages_and_pass_by_hand():
    table = table_of(
        group("math", "easy", [1.0, 0.0, 0.0, 0.0]),
        group("math", "hard", [0.0, 0.0, 0.0, 0.0]),
        group("code", "middle", [0.5, 0.5, 1.0, 1.0]),  # binary at evaluation
        group("logic", "easy", [0.5, 0.5, 0.5, 0.5]),  # continuous
    )
    assert table["math"]["avg_at_k"] == 0.125 and table["math"]["pass_at_k"] == 0.5
    assert table["code"]["avg_at_k"] == 0.5 and table["code"]["pass_at_k"] == 1.0
    assert table["logic"]["avg_at_k"] == 0.5 and table["logic"]["pass_at_k"] == 0.0
    assert table["all"]["avg_at_k"] == (0.25 + 0 + 0.5 + 0.5) / 4
    assert np.isclose(table["easy_middle"]["avg_at_k"], (0.25 + 0.5 + 0.5) / 3)
    assert table["hard"]["avg_at_k"] == 0.0 and table["all"]["k"] == 4
    assert "instruct" not in table and "source/procedural" not in table
    assert table["math"]["pass_at"] == pytest.approx({"1": 0.125, "2": 0.25, "4": 0.5})
    assert table["code"]["pass_at"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0})
    assert table["all"]["len_mean"] == 2 and table["all"]["sampled_nll"] == 1.0
    metrics = validation_metrics(table)
    assert metrics["validation/code/pass@2"] == pytest.approx(5 / 6)
    assert metrics["validation/math/avg"] == 0.125 and metrics["validation/math/k"] == 4
    assert "validation/math/maj" in metrics and "validation/code/maj" not in metrics


def test_a_fault_of_the_verifier_does_not_count_as_a_wrong_answer():
    table = table_of(group("math", "easy", [1.0, 0.0, 0.0], ["ok", "error", "ok"]))
    assert table["math"]["avg_at_k"] == 0.5 and table["math"]["pass_at"]["2"] == 1.0
    assert table_of(group("math", "easy", [0.0], ["error"])) == {}


def test_majority_of_responses():
    right, wrong, thought = r"so</think>\boxed{1/2}", r"</think>\boxed{3}", r"\boxed{9}"
    table = table_of(
        group(
            "math",
            "",
            [1, 1, 0, 0, 0],
            texts=[right, r"</think>\boxed{0.5}", wrong, thought, thought],
        )
    )
    assert table["math"]["maj_at_k"] == 1.0 and table["math"]["avg_at_k"] == pytest.approx(0.4)
    mixed = table_of(group("math", "", [1.0], texts=[right]), group("code", "", [1.0]))
    assert mixed["math"]["maj_at_k"] == 1.0
    assert "maj_at_k" not in mixed["code"] and "maj_at_k" not in mixed["all"]


@pytest.mark.parametrize(
    ("verifier", "response", "expected"),
    [
        ("math", r"a</think>\boxed{1{,}000 }", "1000"),
        ("math", r"\boxed{1,000}", "1000"),
        ("math", r"\boxed{1,2}", "1,2"),
        ("math", r"\boxed{3,4,5}", "3,4,5"),
        ("math", r"\boxed{ 2/4 }", "1/2"),
        ("math", r"\boxed{1/0}", "1/0"),
        ("math", r"\boxed{x + 1}", "x+1"),
        ("math", r"<think>\boxed{5}", None),  # still thinking
        ("math", "5", None),
        ("stem", r"\boxed{84 m}", "84m"),
        ("logic", "<answer>[1, 2]\n</answer>", "[1,2]"),
        ("logic", "<answer></answer>", None),
        ("code", "```python\n```", None),
        ("instruct", "text", None),
    ],
)
def test_what_a_response_votes_for(verifier, response, expected):
    assert vote_of(verifier, {}, response) == expected


def test_a_choice_votes_for_its_letter():
    assert vote_of("stem", {"options": ["x", "y"]}, r"\boxed{\text{B}}") == "B"
    assert vote_of("stem", {"options": ["x", "y"]}, r"\boxed{B or A}") is None


# --- held-out prompts ----------------------------------------------------------------------------


def sums(count: int, first: int = 12) -> list[dict]:
    """Tasks of a kind that the embedded model knows."""
    return [
        {
            "id": str(i),
            "domain": "math",
            "messages": [
                {"role": "user", "content": f"Compute {first + i} + 3. Answer in \\boxed{{}}."}
            ],
            "reference": {"answer": str(first + i + 3)},
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with two small evaluation sets."""
    directory = tmp_path_factory.mktemp("data")
    for name, rows in (("aime24", sums(5)), ("math", sums(3, first=24))):
        (directory / f"{name}.json").write_text(json.dumps(rows))
    return directory


def validation(**settings) -> RunConfig:
    run: RunConfig = build(RunConfig, {"validation": settings})
    check(run)
    return run


def test_held_out_prompts_of_data_sets(data):
    own = {"mine": {"path": str(data / "math.json"), "domain": "stem"}}
    run = validation(sets=["aime24"], directory=str(data), sources=own, prompts_per_set=2)
    prompts = held_out_prompts(run)
    assert prompts == held_out_prompts(run)
    assert [(p.source, p.domain) for p in prompts] == [("aime24", "math")] * 2 + [
        ("mine", "stem")
    ] * 2
    assert len({p.id for p in prompts}) == 4 and prompts[0].id.startswith("aime24/")
    chosen = set()
    for seed in range(8):
        other = dataclasses.replace(run.validation, seed=seed)
        chosen |= {p.id for p in held_out_prompts(dataclasses.replace(run, validation=other))[:2]}
    assert chosen == {f"aime24/{i}" for i in range(5)}
    everything = dataclasses.replace(run.validation, prompts_per_set=0)
    assert len(held_out_prompts(dataclasses.replace(run, validation=everything))) == 8
    assert {p.source for p in held_out_prompts(RunConfig())} == {"procedural"}


def test_unusable_validation_data_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="'validation.directory' does not say where"):
        validation(sets=["aime24"])
    with pytest.raises(ValueError, match="'validation.prompts_per_set' must be 0 or more, got -1"):
        validation(prompts_per_set=-1)
    with pytest.raises(ValueError, match="expected the set 'amc' at"):
        held_out_prompts(validation(sets=["amc"], directory=str(data)))
    one = {"id": "a", "domain": "math", "prompt": "1 + 1?", "reference": {"answer": "2"}}
    (tmp_path / "rows.json").write_text(json.dumps([one]))
    both = {name: {"path": str(tmp_path / "rows.json")} for name in ("mine", "other")}
    assert [p.id for p in held_out_prompts(validation(sources=both))] == ["mine/a", "other/a"]
    twice = [one, one]
    for rows, message in (([{"x": 1}], "'mine' has no usable prompt"), (twice, "two prompts with")):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        with pytest.raises(ValueError, match=message):
            held_out_prompts(validation(sources={"mine": {"path": str(tmp_path / "rows.json")}}))


# --- alone ---------------------------------------------------------------------------------------

SMALL = {"max_prompt_len": 96, "sample_rows": 2, "group_size": 2, "cache_lens": 1}


def arguments(data, out, *more) -> list[str]:
    given = [f"--config.rollout.{key}={value}" for key, value in SMALL.items()]
    given += [f"--config={TINY}", "--sets=aime24,math", f"--data={data}", f"--out={out}"]
    return [*given, "--samples=2", "--max_response_len=24", *more]


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """The kept responses of the base model to both sets; 8 prompts in two batches."""
    out = tmp_path_factory.mktemp("base")
    assert main(arguments(data, out)) == 0
    return out


def test_every_response_is_kept_with_its_verdict(base, data, capsys):
    rows = [json.loads(line) for line in (base / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 2 and [row["index"] for row in rows[:3]] == [0, 1, 0]
    assert {row["source"] for row in rows} == {"aime24", "math"}
    assert all(0 < row["len"] <= 24 and row["nll"] >= 0 and row["response"] for row in rows)
    protocol = json.loads((base / "protocol.json").read_text())
    assert (protocol["temperature"], protocol["top_p"], protocol["samples"]) == (0.6, 0.95, 2)
    assert protocol["max_response_len"] == 24 and len(protocol["weights_sha256"]) == 64
    before = (base / "responses.jsonl").read_bytes()
    assert main(arguments(data, base)) == 0  # nothing is left to do
    table = capsys.readouterr().out
    assert (base / "responses.jsonl").read_bytes() == before
    assert "source/aime24" in table and "28.54" in table and "48.13" in table
    assert 0 < sum(row["score"] for row in rows) < len(rows)
    average = np.mean([row["score"] for row in rows if row["source"] == "math"])
    assert f"{100 * average:6.2f}            82.90          91.89" in table
    assert "31.80" not in table  # of a set that was not asked for


def test_a_stopped_evaluation_goes_on_to_the_same_file(base, data, tmp_path):
    """A process was stopped in the second batch, after 11 responses and a half."""
    cut = 11
    whole = (base / "responses.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "protocol.json").write_bytes((base / "protocol.json").read_bytes())
    (tmp_path / "responses.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:30])
    found, size = read_outcomes(tmp_path / "responses.jsonl", 2)
    assert len(found) == cut // 2 and size == len(b"".join(lines[: cut // 2 * 2]))
    assert main(arguments(data, tmp_path)) == 0
    assert (tmp_path / "responses.jsonl").read_bytes() == whole


def test_another_evaluation_in_the_directory_is_refused(base, data, tmp_path, capsys):
    for change, message in (
        (["--samples=4", "--max_response_len=20"], "samples (2 there, 4 here); max_response_len"),
        (["--config.model.random=True"], "weights_sha256"),
    ):
        assert main(arguments(data, base, *change)) == 2
        assert message in capsys.readouterr().err
    changed = [row | {"reference": {"answer": "1"}} for row in sums(5)]
    (tmp_path / "aime24.json").write_text(json.dumps(changed))
    (tmp_path / "math.json").write_text((data / "math.json").read_text())
    assert main(arguments(tmp_path, base)) == 2
    assert "prompt 'aime24/0' or its reference has changed" in capsys.readouterr().err
    assert main(arguments(data, tmp_path)) == 2
    assert "holds something else" in capsys.readouterr().err
    assert main(arguments(data, base, "--config.rollout.max_prompt_len=8")) == 2
    assert "8 prompts have more than 8 tokens" in capsys.readouterr().err
    assert main(arguments(data, base, "--max_response_len=417")) == 2
    assert "validation.max_response_len = 513 exceeds the 512 positions" in capsys.readouterr().err
    assert main(arguments(data, base, "--step=1")) == 2
    assert "--step: expected the workdir of a run" in capsys.readouterr().err


def test_two_evaluations_do_not_write_to_one_directory(base, data, tmp_path, capsys):
    before = (base / "responses.jsonl").read_bytes()
    with open(base / "lock", "a+") as file:
        assert lock(file) == ""  # as another process holds it
        assert main(arguments(data, base)) == 2
        assert f"in use by process {os.getpid()} on" in capsys.readouterr().err
    assert main(arguments(data, base)) == 0 and (base / "responses.jsonl").read_bytes() == before
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "other").write_text("mine")
    assert main(arguments(data, tmp_path)) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "lock").read_text() == "mine"


def test_the_policy_of_a_run_is_evaluated(base, data, tmp_path):
    run = RunConfig()
    workdir, out = tmp_path / "run", tmp_path / "out"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(run)))
    _, params = load_model(TINY_BASE, jnp.dtype(jnp.float32))
    with closing(Checkpointer(workdir / "checkpoints", run.checkpoint)) as checkpointer:
        checkpointer.save(3, TrainState(params, params, {}), {})
    assert main(arguments(data, out, f"--model={workdir}", "--step=3")) == 0
    assert (out / "responses.jsonl").read_bytes() == (base / "responses.jsonl").read_bytes()
    protocol = json.loads((out / "protocol.json").read_text())
    assert (protocol["model"], protocol["step"]) == (str(workdir), 3)


# --- pass@k of two evaluations -------------------------------------------------------------------


def write_evaluation(out: Path, scores: dict[str, list[float]]) -> Path:
    """An evaluation with the given scores, by domain and number of the prompt."""
    out.mkdir()
    (out / "protocol.json").write_text(json.dumps({"samples": 4}))
    groups = []
    for name, given in scores.items():
        found = group(name.split("/")[0], "", given, source="mine")
        prompt = dataclasses.replace(found.prompt, id=name)
        groups.append(dataclasses.replace(found, prompt=prompt))
    lines = [json.dumps(row) + "\n" for row in records(groups, TOKENIZER)]
    (out / "responses.jsonl").write_text("".join(lines))
    return out


def test_pass_at_k_of_two_evaluations(tmp_path, capsys):
    none, one, all_ = [0.0] * 4, [0.0, 1.0, 0.0, 0.0], [1.0] * 4
    base = write_evaluation(
        tmp_path / "a", {"math/0": none, "math/1": one, "logic/0": one, "code/9": none}
    )
    trained = write_evaluation(
        tmp_path / "b", {"math/0": one, "math/1": all_, "logic/0": [0.9] * 4, "code/8": none}
    )
    svg = tmp_path / "plot.svg"
    assert passk.main([str(base), str(trained), f"--svg={svg}"]) == 0
    text = capsys.readouterr().out
    assert "2 prompts are finished in one of the two only" in text
    math = text.partition("math, 2 prompts\n")[2].splitlines()
    assert math[1].split()[:4] == ["1", "0.125", "0.625", "+0.500"]
    assert math[2].split()[:4] == ["2", "0.250", "0.750", "+0.500"]
    assert math[3].split()[:4] == ["4", "0.500", "1.000", "+0.500"]
    gained, lost = text.split("prompts that the base ")[1:]
    assert gained.startswith("never solved, the trained policy did: math 1\n  math/0 (1 of 4")
    assert lost.startswith("solved, the trained policy never did: logic 1\n  logic/0 (1 of 4")
    drawn = svg.read_text()
    assert drawn.count("<circle") == 2 * 3 * 4  # policies, k, math, logic, all and the source
    assert "trained, pass@4 1.000" in drawn


def test_evaluations_that_cannot_be_compared_are_refused(tmp_path, capsys):
    a = write_evaluation(tmp_path / "a", {"math/0": [0.0] * 4})
    b = write_evaluation(tmp_path / "b", {"math/1": [0.0] * 4})
    c = write_evaluation(tmp_path / "c", {"math/0": [0.0] * 4})
    rows = (c / "responses.jsonl").read_text().replace('"fingerprint": "', '"fingerprint": "x')
    (c / "responses.jsonl").write_text(rows)
    for argv, message in (
        ([a, b], "no prompt in common"),
        ([a, c], "prompt 'math/0' is another one"),
        ([a, tmp_path], "has no protocol.json"),
        ([a, a, "--k=1,8"], "--k: expected numbers from 1 to 4, got '1,8'"),
    ):
        assert passk.main(list(map(str, argv))) == 2
        assert message in capsys.readouterr().err
    (a / "responses.jsonl").write_text("rubbish\n")
    assert passk.main([str(a), str(b)]) == 2
    assert "expected a response in line 1" in capsys.readouterr().err
