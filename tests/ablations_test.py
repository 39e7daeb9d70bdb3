"""The ablations: settings, the statistics of their page, and one tiny run of the whole."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.ablation_page import (
    RESAMPLES,
    boundary,
    comparison,
    difference,
    figure,
    interval,
    smooth,
    styles,
)
from experiments.ablations import NAMES, collect, main, nearest, read, run_all, section
from experiments.configs.ablations.base import FILES, HERE, held_out
from prolong_jax.config import check
from prolong_jax.data.procedural import split_of

# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_variants_load_and_have_equal_samples_and_prompts(name):
    ablation = read(name)
    runs = [ablation.run(variant, seed=3) for variant in ablation.variants]
    for run in runs:
        check(run)
        assert run.seed == 3
        assert run.validation == runs[0].validation
        assert run.stages[0].mixture == runs[0].stages[0].mixture
        assert set(ablation.at) <= set(range(0, run.total_steps + 1, run.checkpoint.every))
    per_step = {run.rollout.prompts_per_step * run.rollout.group_size for run in runs}
    assert len(per_step) == 1
    if ablation.equal == "samples":
        assert len({run.total_steps for run in runs}) == 1
    workdirs = {ablation.workdir(Path("x"), variant, 0) for variant in ablation.variants}
    assert len(workdirs) == len(ablation.variants)


def test_ablations_share_the_runs_that_are_the_same():
    def workdir(name, variant):
        return read(name).workdir(Path("x"), variant, 0)

    assert workdir("kl", "0") == workdir("dynamic", "on")
    assert workdir("clip", "0.2/0.4") == workdir("kl_unstable", "0")
    assert workdir("kl", "0") != workdir("kl_unstable", "0")


def test_an_unknown_ablation_is_refused(capsys):
    assert main(["clips"]) == 2
    assert "expected one of clip, kl" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_the_held_out_prompts_are_those_of_the_validation_split(name):
    lines = Path(HERE, name).read_text().splitlines()
    assert lines == held_out(*FILES[name])
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    assert len(set(questions)) == len(questions)
    assert {split_of(question) for question in questions} == {"validation"}


def test_the_checkpoint_nearest_to_a_budget():
    tokens = [10, 20, 30, 40, 50, 60, 75]
    assert nearest(tokens, 34, every=2) == 4
    assert nearest(tokens, 24, every=2) == 2
    assert nearest(tokens, 999, every=2) == 7  # the last one is always kept


# --- statistics ----------------------------------------------------------------------------------


def test_interval_against_a_slow_loop():
    values = np.random.default_rng(5).random((3, 7))
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 3, (RESAMPLES, 3))
    prompts = rng.integers(0, 7, (RESAMPLES, 7))
    means = [sum(values[s, p] for s in seeds[i] for p in prompts[i]) / 21 for i in range(RESAMPLES)]
    low, high = np.quantile(np.array(means), (0.025, 0.975))
    np.testing.assert_allclose(interval(values), (values.mean(), low, high), rtol=1e-12)


def test_interval_covers_the_spread_of_seeds_as_well_as_that_of_prompts():
    of_prompts = interval(np.tile(np.arange(8) / 8, (3, 1)))
    of_seeds = interval(np.tile([[0.2], [0.5], [0.8]], (1, 8)))
    assert of_prompts[2] - of_prompts[1] > 0.3 and of_seeds[2] - of_seeds[1] > 0.3
    assert interval(np.full((3, 8), 0.25)) == (0.25, 0.25, 0.25)


def test_a_difference_is_paired_by_seed_and_prompt():
    rng = np.random.default_rng(1)
    other = {str(s): rng.random(9) for s in range(3)}
    one = {s: values + 0.1 for s, values in other.items()} | {"7": rng.random(9)}
    found = difference(one, other)
    assert found is not None
    np.testing.assert_allclose(found, (0.1, 0.1, 0.1))
    assert difference({"0": np.ones(2)}, {"1": np.ones(2)}) is None


def run_of(solved, samples=4, step=3, entropy=0.5):
    series = {"reward": [0.1, None, 0.4], "entropy": [9.0, entropy, entropy]}
    series |= {"kl": [None, 0.0, 0.2], "tokens": [100, 200, 300], "trained": [8, 8, 0]}
    scores = {str(step): {"samples": samples, "solved": solved}}
    return {"series": series, "resets": [], "scores": scores}


def test_the_table_equals_what_is_computed_by_hand():
    first = {"0": run_of([0, 2], step=2), "1": run_of([4, 2], step=2)}
    second = {"0": run_of([4, 4]), "1": run_of([4, 4])}
    text = comparison({"base": {}, "variants": {"a": first, "b": second}})
    head, _, a, b = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")]
    assert head[3] == "avg@4 [95%]" and head[5] == "pass@4"
    # Up to step 2: 16 trained on, 300 tokens; averages (0 + 1/2) / 2 and (1 + 1/2) / 2.
    assert a[:3] == ["a", "16", "0.3k"] and a[3].startswith("0.500 [")
    assert a[4:7] == ["0.250, 0.750", "0.750", ""]
    assert a[7:] == ["4.750", "0.000"]  # (9 + 0.5) / 2; the KL of a step without one is left out
    assert b[1:4] == ["16", "0.6k", "1.000 [1.000, 1.000]"] and b[6].startswith("+0.500 [")
    assert b[7:] == ["3.333", "0.100"]


def test_the_boundary_counts_what_the_base_never_solved():
    def run(early, late):
        found = run_of(early, samples=16, step=2)
        return found | {"scores": {**found["scores"], "10": {"samples": 16, "solved": late}}}

    base = {"samples": 256, "solved": [0, 0, 64, 256]}
    runs = {"0": run([0, 1, 8, 16], [16, 1, 0, 16]), "1": run([0, 0, 8, 16], [1, 0, 16, 16])}
    text = boundary({"base": base, "variants": {"full": runs}})
    first = [cell.strip() for cell in text.split("\n")[2].split("|")[1:-1]]
    assert first[0] == "1" and first[1].startswith("0.312 [")  # (0 + 0 + 1/4 + 1) / 4
    assert first[3].startswith("0.516 [")  # (33/16 + 33/16) / 8
    assert "never solved 2 in 256 samples" in text
    assert "after 2 steps 1, 0; after 10 steps 2, 1" in text
    assert text.endswith("after 10 steps did not: 1, 0.")


def test_the_figure_has_a_line_for_every_variant():
    runs = {"0": run_of([1]), "1": run_of([1])}
    assert smooth(runs, "reward") == [(1, 0.1), (2, 0.1), (3, 0.25)]
    svg = figure({"variants": {"a": runs, "a, resets": runs, "b": runs}})
    assert svg.count('<path class="curve"') == 3 * 3 + 3
    assert styles(["a", "b", "a, resets"]) == {"a": "c0", "b": "c1", "a, resets": "c0 dashed"}


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_ablation_of_two_steps(tmp_path):
    prompts = tmp_path / "held_out.jsonl"
    prompts.write_text("\n".join(held_out([("math", "easy")], 2, seed=1)))
    small = {
        "total_steps": 2,
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 2,
        "rollout.sample_rows": 4,
        "rollout.max_sampling_rounds": 1,
        "rollout.dynamic_sampling": False,
        "update.num_minibatches": 1,
        "validation.sources.held_out.path": str(prompts),
    }
    variants = {"one": small, "two": {**small, "optimizer.learning_rate": 1e-5}}
    ablation = replace(read("clip"), variants=variants, samples=2)
    assert run_all(ablation, tmp_path / "runs", [0], ["two"])
    found = collect(ablation, tmp_path / "runs")
    (run,) = found["variants"]["two"].values()
    assert run["series"]["trained"] == [4, 4]
    assert len(run["scores"]["2"]["solved"]) == 2
    assert "| two | 8 |" in section(ablation, found)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json*")}
    assert run_all(ablation, tmp_path / "runs", [0], ["two"])  # nothing is left to do
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json*")}
