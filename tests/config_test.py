import dataclasses

import pytest

from prolong_jax.config import (
    DOMAINS,
    LossSettings,
    RunConfig,
    build,
    changes,
    check,
    for_stage,
    load,
    refuse_other,
    row_layout,
    to_dict,
    verifiers,
)
from prolong_jax.presets import PRESETS

TINY = "experiments/configs/tiny.py"


def test_overrides_reach_the_settings():
    run = load(TINY, ["loss.clip_high=0.3", "metrics.wandb=offline", "stages.0.steps=5", "seed=3"])
    assert run.loss.clip_high == 0.3 and run.metrics.wandb == "offline"
    assert run.stages[0].steps == 5 and run.seed == 3
    assert load(TINY, ["rollout.dynamic_sampling=false"]).rollout.dynamic_sampling is False


def test_a_row_has_slots_for_prompts_beside_its_lanes():
    tight = ["rollout.max_prompt_len=1", "rollout.max_response_len=11", "update.row_len=12"]
    assert row_layout(load(TINY, tight)) == (0, 1)
    assert row_layout(load(TINY)) == (64, 4)
    assert row_layout(RunConfig()) == (1023, 1)  # a group shares its prompt with one lane too
    for prompt_len in range(1, 9):
        sizes = {"max_prompt_len": prompt_len, "max_response_len": 11}
        one = [f"rollout.{name}={value}" for name, value in sizes.items()]
        slots, lanes = row_layout(load(TINY, [*one, f"update.row_len={prompt_len + 11}"]))
        assert (lanes, slots) == (1, prompt_len - 1)


def test_round_trip():
    run = load(TINY)
    assert build(RunConfig, to_dict(run)) == run


@pytest.mark.parametrize(
    "override, message",
    [
        ("loss.clip_hihg=0.3", "unknown setting 'loss.clip_hihg'; did you mean 'loss.clip_high'"),
        ("stages.0.stepz=3", "unknown setting 'stages.0.stepz'; did you mean 'stages.0.steps'"),
        ("loss.clip_high=big", "'loss.clip_high' expects float, got 'big'"),
        ("total_steps=1.5", "'total_steps' expects int, got 1.5"),
        ("stages.7.steps=3", "'7' does not exist"),
        ("seed", "expected --config.seed=VALUE"),
        ("seed.x=1", "'seed' expects int, got {'x': 1}"),
        ("total_steps.x=1", "'total_steps' holds a single value"),
        ("update.num_minibatches=5", "must be a multiple of 'update.num_minibatches' (5)"),
        ("mesh.data=5", "must be a multiple of mesh.data * mesh.fsdp (5)"),
        ("update.row_len=100", "'update.row_len' (100) must hold"),
        ("rollout.group_size=1", "'rollout.group_size' must be at least 2, got 1"),
        ("rollout.temperature=0.0", "'rollout.temperature' must be greater than 0"),
        ("loss.kl_estimator=k1", "'loss.kl_estimator' k1 has no expected gradient as a loss"),
        ("loss.clip_low=1.0", "'loss.clip_low' must be in (0, 1)"),
        ("loss.policy_loss=ppo", "'loss.policy_loss' must be ppo_clip, dual_clip, gspo"),
        ("loss.kl_estimator=k4", "'loss.kl_estimator' must be k1, k2 or k3, got 'k4'"),
        ("loss.kl_in=both", "'loss.kl_in' must be loss or reward"),
        ("loss.correction=is", "'loss.correction' must be none, tis, icepop or seq_mask_tis"),
        ("loss.aggregation=mean", "'loss.aggregation' must be token_mean"),
        ("advantage.estimator=z", "'advantage.estimator' must be group, group_mean"),
        ("loss.dual_clip=1.0", "'loss.dual_clip' must be above 1, got 1.0"),
        ("loss.is_low=2.5", "'loss.is_low' must be from 0 to 1 and at most loss.is_high"),
        ("loss.is_high=0.0", "'loss.is_high' must be greater than 0"),
        ("loss.entropy_coef=-0.1", "'loss.entropy_coef' must be 0 or more"),
        ("shaping.overlong_buffer=2.0", "'shaping.overlong_buffer' must be in [0, 1], got 2.0"),
        ("shaping.length_min=1.0", "'shaping.length_min' must be at most shaping.length_max"),
        ("shaping.ngram_coef=-1.0", "'shaping.ngram_coef' must be 0 or more"),
        ("advantage.correct_boost=0.0", "'advantage.correct_boost' must be greater than 0"),
        ("loss.entropy_target=0.3 loss.entropy_step=0.0", "'loss.entropy_step' must be above 0"),
        ("shaping.ngram_coef=0.5", "'shaping.ngram_coef' needs shaping.ngram_size"),
        ("shaping.length_off=500", "'shaping.length_off' needs shaping.length_on"),
        ("shaping.stop_properly=-1e999", "'shaping.stop_properly' must be at most 1, got -inf"),
        ("preset=dapo loss=5", "'loss' expects LossSettings, got 5"),
        ("preset=dappo", "'preset' must be grpo, dapo"),
        ("model.dtype=float16", "'model.dtype' must be float32 or bfloat16"),
        ("metrics.wandb=yes", "'metrics.wandb' must be off, offline or online"),
        ("stages=[]", "'stages' is empty"),
        ("stages.0.mixture={'maths': 1.0}", "names 'maths'; expected one of math"),
        ("stages.0.mixture={'math': 0.0}", "no data to draw"),
        ("stages.0.levels={'beyond': 1.0}", "names 'beyond'; expected one of easy, middle, hard"),
        ("stages=[{'end_on_plateau': True}, {}]", "'stages.0' never ends"),
        ("validation.prompts_per_level=0", "'validation.prompts_per_level' must be greater than 0"),
        ("validation.temperature=0.0", "'validation.temperature' must be greater than 0"),
        ("shaping.stop_properly=2.0", "'shaping.stop_properly' must be at most 1"),
        ("rollout.sample_rows=0", "'rollout.sample_rows' must be greater than 0"),
        ("rollout.stop_strings=['a', '']", "'rollout.stop_strings' has an empty one"),
        ("update.max_skipped=0", "'update.max_skipped' must be greater than 0"),
        ("loss.kl_coef=-1.0", "'loss.kl_coef' must be 0 or more"),
        ("optimizer.warmup_steps=-1", "'optimizer.warmup_steps' must be 0 or more"),
        ("stages.0.steps=0", "'stages.0' never ends"),
        ("data.sources={'a': {'path': 'a', 'weight': -1.0}}", "'data.sources.a.weight' must be 0"),
        (
            "data.max_mean_reward=-0.1",
            "the range of rewards in 'data' must lie in [0, 1], got [0.0, -0.1]",
        ),
        ("stages.1.overrides={'loss.beta': 1}", "names 'loss.beta'; expected a setting of"),
        ("stages.1.overrides={'rollout.group_size': 'x'}", "expects int, got 'x'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(override, message):
    with pytest.raises(ValueError) as error:
        load(
            TINY, override.split(" ") if override.startswith(("loss.ent", "preset")) else [override]
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found none at"):
        load(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="defines no get_config"):
        load(tmp_path / "empty.py")


def test_stage_overrides_apply_to_their_stage_only():
    run = load(TINY, ["stages.1.overrides={'loss.kl_coef': 0.5, 'rollout.group_size': 4}"])
    assert for_stage(run, 1).loss.kl_coef == 0.5 and for_stage(run, 1).rollout.group_size == 4
    assert for_stage(run, 0).loss.kl_coef == run.loss.kl_coef != 0.5


def test_verifiers_of_all_sources_are_asked_for():
    named = "data.sources.x.path=x", "data.sources.x.verifier=mine", "validation.sources.y.path=y"
    later = (
        "stages=[{'overrides': {'validation.sources': {'y': {'path': 'y', 'verifier': 'his'}}}}]"
    )
    assert verifiers(load(TINY, [*named, later])) == [*DOMAINS, "his", "mine"]
    assert verifiers(load(TINY)) == [*DOMAINS]


def test_a_workdir_of_another_run_is_refused():
    run = load(TINY)
    saved = to_dict(run)
    refuse_other(
        load(TINY, ["total_steps=7", "checkpoint.every=3", "metrics.wandb=offline"]), saved, "w"
    )
    other = load(TINY, ["loss.kl_coef=0.01"])
    with pytest.raises(ValueError, match="loss.kl_coef: 0.001 -> 0.01; give another.*--allow-ch"):
        refuse_other(other, saved, "w")
    refuse_other(other, saved, "w", allow=True)
    for never in ("seed=1", "model.path=elsewhere"):
        with pytest.raises(ValueError, match=f"{never.partition('=')[0]}: .* -> .*workdir or the"):
            refuse_other(load(TINY, [never]), saved, "w", allow=True)


def test_changes_are_told_one_by_one():
    saved = to_dict(load(TINY))
    run = load(TINY, ["loss.kl_coef=0.01", "total_steps=7"])
    assert changes(saved, run) == {"loss.kl_coef": (0.001, 0.01), "total_steps": (100, 7)}
    del saved["loss"]["kl_coef"]  # of a version that had no such setting
    assert changes(saved, run)["loss.kl_coef"] == (None, 0.01)
    assert changes(to_dict(run), run) == {}


@pytest.mark.parametrize(
    "override, message",
    [
        ("over=0", "over' must be at least 1"),
        ("max_kl=-1", "max_kl' must be 0 or more"),
        ("kl_spike=0.5", "kl_spike' must be 0 or more than 1"),
        ("cooldown=99", r"every' \(15\) must not be less than its cooldown \(99\)"),
        ("reference=last", "reference' must be 'policy', or 'best'"),
    ],
)
def test_reset_rules_that_make_no_sense_are_refused(override, message):
    with pytest.raises(ValueError, match="'stages.2.reset." + message):
        load(TINY, [f"stages.2.reset.{override}"])
    with pytest.raises(ValueError, match="together with checkpoint.keep_best"):
        load(TINY, ["stages.2.reset.reference=best", "checkpoint.keep_best=False"])


def test_defaults_are_those_of_the_paper():
    run = RunConfig()
    check(run)
    assert (run.loss.clip_low, run.loss.clip_high, run.loss.kl_coef) == (0.2, 0.4, 1e-4)
    assert (run.rollout.prompts_per_step, run.rollout.group_size) == (256, 16)
    assert run.rollout.temperature == 1.2 and run.optimizer.learning_rate == 2e-6
    assert run.update.num_minibatches == 4


def test_the_eight_runs_of_prorl():
    """What appendix E says of them; and v2 and BroRL beside it."""
    v1, v2, brorl = (
        load(f"experiments/configs/{name}_1p5b.py") for name in ("prorl_v1", "prorl_v2", "brorl")
    )
    runs = [for_stage(v1, index) for index in range(8)]
    assert [run.rollout.group_size for run in runs] == [16] * 5 + [32, 32, 16]
    assert [run.rollout.max_prompt_len + run.rollout.max_response_len for run in runs] == [
        8096
    ] * 7 + [16384]
    assert [run.shaping.stop_properly for run in runs] == [1.0] * 3 + [0.0] * 5
    assert ["instruct" in stage.mixture for stage in v1.stages] == [False, False] + [True] * 6
    assert [i + 1 for i, stage in enumerate(v1.stages) if stage.reset_at_start] == [2, 6, 7]
    assert all(stage.reset.optimizer for stage in v1.stages) and v1.stages[-1].steps == 200
    assert (v1.loss.clip_low, v1.loss.clip_high, v1.optimizer.learning_rate) == (0.2, 0.4, 2e-6)
    assert (v2.loss.clip_high, v2.loss.kl_estimator, v2.stages[0].reset.optimizer) == (
        0.28,
        "k2",
        False,
    )
    assert 200 <= v2.stages[0].reset.every <= 500
    assert (brorl.rollout.group_size, brorl.rollout.prompts_per_step) == (512, 128)
    assert brorl.optimizer.learning_rate == pytest.approx(2e-6 * 8**0.5)


def test_a_preset_of_a_file_fills_in_what_the_file_does_not_state(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def get_config():\n"
        "    return {'preset': 'dapo', 'loss': {'kl_coef': 0.5}, 'shaping': {'stop_properly': 0.0}}\n"
    )
    run = load(path, ["loss.clip_high=0.3"])
    assert (run.loss.kl_coef, run.loss.clip_high) == (0.5, 0.3)  # the file's and the command line's
    assert (run.loss.correction, run.rollout.dynamic_sampling) == ("none", True)
    assert (run.shaping.stop_properly, run.shaping.overlong_buffer) == (0.0, 0.2)
    assert build(RunConfig, to_dict(run)) == run  # as a workdir keeps it


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_the_command_line_replaces_what_the_file_states(name):
    assert load(TINY).loss.kl_coef == 1e-3
    run = load(TINY, [f"preset={name}", "rollout.group_size=8"])
    assert PRESETS[name]["loss"].keys() == {f.name for f in dataclasses.fields(LossSettings)}
    for section, settings in PRESETS[name].items():
        for key, value in settings.items():
            if key != "group_size":
                assert getattr(getattr(run, section), key) == value
    assert run.rollout.group_size == 8
    changed = load(TINY, ["loss.kl_coef=0.7", f"preset={name}", "rollout.group_size=8"])
    assert changed == dataclasses.replace(run, loss=dataclasses.replace(run.loss, kl_coef=0.7))


def test_preset_prorl_v1_is_what_the_defaults_are():
    for section, settings in PRESETS["prorl_v1"].items():
        own = dataclasses.asdict(getattr(RunConfig(), section))
        assert {key: own[key] for key in settings} == settings


def test_a_sum_over_a_constant_takes_the_longest_response():
    run = load(TINY, ["preset=dr_grpo", "stages.1.overrides={'rollout.max_response_len': 99}"])
    assert [for_stage(run, i).loss.token_constant for i in range(2)] == [128.0, 99.0]
