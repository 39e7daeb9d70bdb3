"""Settings: frozen dataclasses, one per owner. All defaults of the package stand here.

Defaults are those of ProRL v1 (arXiv 2505.24864, section 3.2 and appendix E) where it states them.
"""

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from prolong_jax.presets import PRESETS

DOMAINS = ("math", "code", "stem", "logic", "instruct")
LEVELS = ("easy", "middle", "hard")  # that are trained on
ASSETS = Path(__file__).parent / "assets"
TINY_BASE = str(ASSETS / "tiny_base")


@dataclass(frozen=True)
class ModelSettings:
    path: str = TINY_BASE  # Hugging Face model: directory, 'owner/name' of the hub, or gs://...
    random: bool = False  # weights of the shape in config.json, drawn at random: for benchmarks
    shape: str = ""  # config.json that compile_check reads where `path` is no local directory
    dtype: str = "bfloat16"  # of activations and matrix products: bfloat16 or float32
    attention: str = "auto"  # of packed rows: xla, splash (TPU) or cudnn (GPU); auto: by platform
    remat: str = "layer"  # what is computed again for the gradient: none, dots (all but the
    # products with weights) or layer (everything but the input of each layer)


@dataclass(frozen=True)
class MeshSettings:
    data: int = 1  # rows are split over this axis, weights are not
    fsdp: int = 1  # rows and weights are split over this axis
    tensor: int = 1  # heads and feed-forward are split over this axis, within a process
    # How the processes of a run find each other. "": there is only one; auto: as the TPU pod, GKE
    # or Slurm says; host:port: the first process listens there, and the next two are needed.
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1  # of this process, from 0
    watchdog_s: float = 0.0  # a longer step dumps the stacks of all threads to stderr; 0: never


@dataclass(frozen=True)
class RolloutSettings:
    prompts_per_step: int = 256  # live groups wanted for one step
    group_size: int = 16  # responses per prompt
    temperature: float = 1.2
    max_prompt_len: int = 1024  # tokens
    long_prompts: str = "refuse"  # what to do with longer ones: refuse, or truncate their beginning
    max_response_len: int = 7072  # tokens
    dynamic_sampling: bool = True  # drop groups whose raw rewards are all equal, and draw more
    max_sampling_rounds: int = 4  # rounds of prompts_per_step prompts, at most
    stop_strings: tuple[str, ...] = ()  # that end a response, beside the model's stop tokens
    sample_rows: int = 256  # responses that a process samples at once; bounds its KV cache
    cache_lens: int = (
        8  # sizes of the KV cache, or one more; many compile long, read little in vain
    )
    compile_ahead: bool = True  # compile for all sizes of the cache at the start, not when met


@dataclass(frozen=True)
class LossSettings:
    """The formulas of all names stand in objectives.py and losses.py."""

    policy_loss: str = "ppo_clip"  # a key of objectives.POLICY_LOSSES
    clip_low: float = 0.2
    clip_high: float = 0.4
    dual_clip: float = 3.0  # of policy_loss dual_clip
    kl_coef: float = 1e-4  # a secondary source; the paper does not state it
    kl_estimator: str = "k3"  # k1 (in the reward alone), k2 or k3
    kl_in: str = "loss"  # loss, or reward: lowers the advantages
    correction: str = "tis"  # of the sampler-to-trainer mismatch: a key of objectives.CORRECTIONS
    is_low: float = 0.0  # bounds of the importance weight
    is_high: float = 2.0
    aggregation: str = "token_mean"  # a key of objectives.AGGREGATIONS
    token_constant: float = 0.0  # of token_sum_over_constant; 0: rollout.max_response_len
    entropy_coef: float = 0.0  # reward of a nat of entropy per token
    entropy_target: float = 0.0  # nats; above 0 the coefficient adapts, see adapted_entropy_shift
    entropy_step: float = 0.005  # by so much per step


@dataclass(frozen=True)
class AdvantageSettings:
    estimator: str = "group"  # a key of advantages.ESTIMATORS
    correct_boost: float = 1.0  # factor on the positive advantage of a response with full reward


@dataclass(frozen=True)
class ShapingSettings:
    """Of the reward, once dynamic sampling has looked at it; the formulas stand in shaping.py."""

    stop_properly: float = 1.0  # factor on the reward of unterminated responses; < 0 replaces it
    overlong_filter: bool = False  # leave responses without an end out of the loss
    overlong_buffer: float = 0.0  # share of the budget in which a length is paid less,
    overlong_coef: float = 1.0  # up to this much less
    length_coef: float = 0.0  # of the cosine length reward
    length_min: float = -1.0  # at the longest
    length_max: float = 0.0  # at length 0
    length_on: int = 0  # steps in which it is on, and after them off; 0: always on
    length_off: int = 0
    ngram_size: int = 0  # tokens; 0: no penalty of repetition
    ngram_coef: float = 0.0  # what a response of nothing but repetition would lose


@dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: float = 2e-6
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0  # optimizer steps, counted anew after a reset of the optimizer


@dataclass(frozen=True)
class UpdateSettings:
    num_minibatches: int = 4  # optimizer steps per rollout
    micro_batch_rows: int = 8  # packed rows whose gradient is taken at once
    row_len: int = 8192  # tokens of a packed row
    max_skipped: int = 5  # stop after so many updates in a row with a non-finite gradient


@dataclass(frozen=True)
class SourceSettings:
    """One data set of a run."""

    path: str  # file or directory, local or remote
    weight: float = 1.0  # share of its domain, where the mixture names the domain
    format: str = ""  # key of data.readers.FORMATS; "": by the fields of each row
    split: str = ""
    domain: str = ""  # what the rows count as; "": what the format says
    only: str = ""  # keep the rows of this domain or data_source
    verifier: str = ""  # module with `verify` and `EXAMPLE`; "": that of the domain
    fields: Mapping[str, str] = field(default_factory=dict)  # the format's name: the data's name
    special_judge: str = ""  # JSON lines {"idx", "special_judge"}, by id or else row number
    pass_rates: str = ""  # JSON lines {"id", "pass_rate"}; rows without a record are kept
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0


@dataclass(frozen=True)
class ValidationSettings:
    every: int = 20  # steps between evaluations
    prompts_per_level: int = 16  # of every domain
    samples: int = 4  # responses per prompt during the run
    final_samples: int = 16  # responses per prompt for the base and the final policy
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    seed: int = 7  # of the held-out prompts
    # Instead of the embedded tasks: sets of data.evaluation_sets in a directory, and other sources.
    sets: tuple[str, ...] = ()
    directory: str = ""
    sources: Mapping[str, SourceSettings] = field(default_factory=dict)
    prompts_per_set: int = 64  # of each set and source, drawn by `seed`; 0: all
    max_response_len: int = 0  # tokens; 0: the run's rollout.max_response_len, also in its stages


@dataclass(frozen=True)
class VerifierSettings:
    num_workers: int = 2  # processes
    time_limit_s: float = 10.0  # per response, from the start of its verification
    max_error_rate: float = 0.2  # share of faults of a verifier in one step that stops the run
    allow_rlimits_only: bool = False  # run programs of responses where no sandbox can be had


@dataclass(frozen=True)
class DataSettings:
    sources: Mapping[str, SourceSettings] = field(default_factory=dict)  # none: the embedded tasks
    strict: bool = False  # stop at the first bad row instead of skipping it
    # A prompt is passed over once where the mean reward of its responses in this run is out of
    # range; after that it counts as unknown.
    min_mean_reward: float = 0.0
    max_mean_reward: float = 1.0
    mean_reward_after: int = 0  # responses before the range applies; 0: it never does


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = 20  # steps
    keep: int = 2  # newest checkpoints; with one alone, a damaged file ends the run
    keep_best: bool = True  # also the one with the best validation score, saved when it is found
    keep_every: int = 0  # also those of steps that are a multiple of this; 0: none


@dataclass(frozen=True)
class MetricsSettings:
    wandb: str = "off"  # off, offline or online
    tensorboard: bool = False  # events under the workdir's tensorboard/
    samples_per_step: int = 4  # responses written to samples.jsonl


@dataclass(frozen=True)
class ResetSettings:
    """When the reference becomes the policy. A rule with the value 0 is off.

    ProRL v1 resets where validation degrades or stalls, v2 every 200 to 500 steps or where the KL
    spikes or validation stalls (keeping the optimizer). All other numbers here are ours.
    """

    every: int = 0  # steps since the last reset
    plateau_window: int = 0  # evaluations in a row without a gain over the best one before them,
    plateau_gain: float = 0.01  # which is more than this and beyond the best one's 95% interval
    degradation: float = 0.0  # score this far, and beyond the 95% interval, below the best one
    max_kl: float = 0.0  # nats per token to the reference
    kl_spike: float = 0.0  # nats per token, in multiples of the mean of the 20 steps before
    min_entropy: float = 0.0  # nats per token
    max_unterminated: float = 0.0  # share of responses without an end
    over: int = 5  # steps whose mean is compared with the limits of KL, entropy and termination
    cooldown: int = 0  # steps after a reset in which no rule resets again
    optimizer: bool = True  # v1 clears the optimizer's moments and step count too, v2 keeps them
    reference: str = "policy"  # what it becomes: policy, or best: the best validated checkpoint


@dataclass(frozen=True)
class StageSettings:
    name: str = "all domains"
    steps: int = 0  # 0: until the run ends; after the last stage the run ends
    end_on_plateau: bool = False  # a plateau also ends the stage
    mixture: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(DOMAINS, 1.0))
    levels: Mapping[str, float] = field(
        default_factory=lambda: {"easy": 1.0, "middle": 1.0, "hard": 1.0}
    )
    reset: ResetSettings = field(default_factory=ResetSettings)
    reset_at_start: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)  # e.g. {"loss.kl_coef": 1e-3}


@dataclass(frozen=True)
class RunConfig:
    seed: int = 0
    total_steps: int = 2000
    preset: str = (
        ""  # a key of presets.PRESETS: settings where neither file nor command line has any
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    advantage: AdvantageSettings = field(default_factory=AdvantageSettings)
    shaping: ShapingSettings = field(default_factory=ShapingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    verifiers: VerifierSettings = field(default_factory=VerifierSettings)
    data: DataSettings = field(default_factory=DataSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    stages: tuple[StageSettings, ...] = (StageSettings(),)


# Settings that may differ when a workdir is continued; --allow-changes adds all but the last ones.
MAY_CHANGE = ("total_steps", "mesh", "metrics", "checkpoint", "verifiers")
MAY_CHANGE += ("rollout.compile_ahead",)
NEVER_CHANGE = ("seed", "model.path", "model.random")
# Evaluations that differ in these validation settings alone are compared with one another.
COMPARABLE = ("every", "samples", "final_samples")
_OVERRIDABLE = ("rollout", "loss", "advantage", "shaping", "optimizer", "update", "validation")
# What the settings may be, as the tables of objectives.py and advantages.py have it.
POLICY_LOSSES = (
    "ppo_clip",
    "dual_clip",
    "gspo",
    "gspo_token",
    "gmpo",
    "cispo",
    "sapo",
    "reinforce",
)
KL_ESTIMATORS = ("k1", "k2", "k3")
CORRECTIONS = ("none", "tis", "icepop", "seq_mask_tis")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")
AGGREGATIONS += ("token_sum_over_constant",)
ADVANTAGES = ("group", "group_mean", "leave_one_out", "batch", "group_mean_batch")


def build(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """The settings dataclass `cls` from a nested mapping.

    Raises:
      ValueError: an unknown key (the nearest known one is suggested) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {where + near[0]!r}?" if near else f"known: {', '.join(hints)}."
            raise ValueError(f"config: unknown setting {where + key!r}; {hint}")
        built[key] = _convert(hints[key], value, where + key)
    return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, where + ".")
    elif typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}.{i}") for i, v in enumerate(value))
    elif typing.get_origin(hint) is Mapping and isinstance(value, Mapping):
        item = typing.get_args(hint)[1]
        return {
            k: v if item is Any else _convert(item, v, f"{where}.{k}") for k, v in value.items()
        }
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"config: {where!r} expects {name}, got {value!r}.")


def to_dict(config: Any) -> Any:
    """Nested plain values, as written to config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def for_stage(run: RunConfig, index: int) -> RunConfig:
    """The run's settings with the overrides of one stage applied."""
    values = to_dict(run)
    # Evaluations of all stages have one budget, unless a stage names another one for them.
    validation, rollout = values["validation"], values["rollout"]
    validation["max_response_len"] = validation["max_response_len"] or rollout["max_response_len"]
    for key, value in run.stages[index].overrides.items():
        section, _, name = key.partition(".")
        if section not in _OVERRIDABLE or name not in values[section]:
            raise ValueError(
                f"config: 'stages.{index}.overrides' names {key!r}; expected a setting of "
                f"{', '.join(_OVERRIDABLE)}, such as 'loss.kl_coef'."
            )
        values[section][name] = value
    if values["loss"]["aggregation"] == "token_sum_over_constant":
        longest = float(rollout["max_response_len"])
        values["loss"]["token_constant"] = values["loss"]["token_constant"] or longest
    return build(RunConfig, values)


def alike(one: ValidationSettings, other: ValidationSettings) -> bool:
    """Whether evaluations ask the same prompts and sample in the same way."""
    return one == dataclasses.replace(other, **{name: getattr(one, name) for name in COMPARABLE})


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads an experiment file and applies `key=value` overrides such as `loss.clip_high=0.3`.

    A preset that the file names fills in what the file does not state. One of the overrides replaces
    what the file states; the other overrides, and those of stages, replace what it does.

    Raises:
      ValueError: no such file, no get_config() in it, a bad override, or settings that do not fit.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location("experiment", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--config: expected a Python file, found none at {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: {str(path)!r} defines no get_config(); add one.")
    values = ConfigDict(module.get_config()).to_dict()
    named = [override for override in overrides if override.partition("=")[0] == "preset"]
    for override in named:
        _set(values, override)
    preset = values.get("preset", "")
    if preset:
        _require_one_of("preset", preset, tuple(PRESETS))
        recipe = PRESETS[preset]  # on the command line it goes before the file, in the file behind
        values = _merged(values, recipe) if named else _merged(recipe, values)
    for override in overrides:
        _set(values, override)
    run = build(RunConfig, values)
    check(run)
    return run


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of both; those of `high` go first, also within a section."""
    merged = {**low, **high}
    for key in low.keys() & high.keys():
        if isinstance(low[key], Mapping) and isinstance(high[key], Mapping):
            merged[key] = {**low[key], **high[key]}
    return merged


def parse(argv: Sequence[str], *, workdir: bool = False) -> tuple[RunConfig, Path, bool]:
    """Settings from a command line; where asked for, the workdir, and whether it may change them.

    Raises:
      ValueError: an unknown argument, or settings that `load` refuses.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True, help="experiment file with get_config()")
    if workdir:
        parser.add_argument("--workdir", required=True, type=Path, help="where the run is kept")
        allow = "go on with other settings than before; they are listed and recorded"
        parser.add_argument("--allow-changes", action="store_true", help=allow)
    args, rest = parser.parse_known_args(argv)
    unknown = [arg for arg in rest if not arg.startswith("--config.")]
    if unknown:
        raise ValueError(
            f"unknown argument {unknown[0]!r}; settings are given as --config.KEY=VALUE."
        )
    run = load(args.config, [arg.removeprefix("--config.") for arg in rest])
    return run, args.workdir if workdir else Path(), workdir and args.allow_changes


def _set(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--config.{key}: expected --config.{key}=VALUE.")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    *sections, name = key.split(".")
    node: Any = values
    for section in sections:
        if isinstance(node, list | tuple) and section.isdigit() and int(section) < len(node):
            node = node[int(section)]
        elif isinstance(node, dict):
            node = node.setdefault(section, {})
        else:
            raise ValueError(f"--config.{key}: {section!r} does not exist.")
    if not isinstance(node, dict):
        raise ValueError(f"--config.{key}: {sections[-1]!r} holds a single value, not settings.")
    node[name] = value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"config: {message}")


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    expected = f"{', '.join(known[:-1])} or {known[-1]}"
    _require(value in known, f"{name!r} must be {expected}, got {value!r}.")


def check(run: RunConfig) -> None:
    """Refuses settings that cannot work together.

    Raises:
      ValueError: says which setting, what was expected and what came.
    """
    _require(run.total_steps >= 1, f"'total_steps' must be at least 1, got {run.total_steps}.")
    _require(len(run.stages) > 0, "'stages' is empty; give at least one stage.")
    for name, value, known in (
        ("model.dtype", run.model.dtype, ("float32", "bfloat16")),
        ("model.attention", run.model.attention, ("auto", "xla", "splash", "cudnn")),
        ("model.remat", run.model.remat, ("none", "dots", "layer")),
        ("metrics.wandb", run.metrics.wandb, ("off", "offline", "online")),
        ("rollout.long_prompts", run.rollout.long_prompts, ("refuse", "truncate")),
    ):
        _require_one_of(name, value, known)
    ranges = {
        f"data.sources.{name}": (source.min_pass_rate, source.max_pass_rate)
        for name, source in run.data.sources.items()
    } | {"data": (run.data.min_mean_reward, run.data.max_mean_reward)}
    for where, (low, high) in ranges.items():
        _require(
            0 <= low <= high <= 1,
            f"the range of rewards in {where!r} must lie in [0, 1], got [{low}, {high}].",
        )
    for name, source in run.data.sources.items():
        _require(
            source.weight >= 0,
            f"'data.sources.{name}.weight' must be 0 or more, got {source.weight}.",
        )
    _check_validation(run.validation)
    _check_processes(run.mesh)
    for index, stage in enumerate(run.stages):
        _check_positive(for_stage(run, index))
        _check_sizes(for_stage(run, index))
        _check_objective(for_stage(run, index))
        _check_reset(stage.reset, f"stages.{index}.reset", run.checkpoint)
        last = index == len(run.stages) - 1
        on_plateau = stage.end_on_plateau and stage.reset.plateau_window > 0
        _require(
            last or stage.steps > 0 or on_plateau,
            f"'stages.{index}' never ends, but a stage follows; set its steps, or end_on_plateau "
            "with reset.plateau_window.",
        )
        for key, weights, known in (
            ("mixture", stage.mixture, (*DOMAINS, *run.data.sources)),
            ("levels", stage.levels, LEVELS),
        ):
            where = f"'stages.{index}.{key}'"
            unknown = [name for name in weights if name not in known]
            _require(
                not unknown,
                f"{where} names {', '.join(map(repr, unknown))}; expected one of {', '.join(known)}.",
            )
            _require(
                sum(weights.values()) > 0 and min(weights.values()) >= 0,
                f"{where} has no positive weight, so there is no data to draw.",
            )


def _check_reset(rule: ResetSettings, where: str, checkpoint: CheckpointSettings) -> None:
    for name, value in dataclasses.asdict(rule).items():
        _require(
            isinstance(value, str) or 0 <= value < math.inf,
            f"'{where}.{name}' must be 0 or more, got {value}.",
        )
    _require(rule.over >= 1, f"'{where}.over' must be at least 1, got {rule.over}.")
    _require(
        rule.kl_spike == 0 or rule.kl_spike > 1,
        f"'{where}.kl_spike' must be 0 or more than 1, got {rule.kl_spike}.",
    )
    _require(
        rule.every == 0 or rule.every >= rule.cooldown,
        f"'{where}.every' ({rule.every}) must not be less than its cooldown ({rule.cooldown}).",
    )
    _require(
        rule.reference == "policy" or (rule.reference == "best" and checkpoint.keep_best),
        f"'{where}.reference' must be 'policy', or 'best' together with checkpoint.keep_best, got "
        f"{rule.reference!r}.",
    )


def _check_validation(settings: ValidationSettings) -> None:
    top_k, top_p, min_p = settings.top_k, settings.top_p, settings.min_p
    _require(
        top_k >= 0 and top_p <= 1 and 0 <= min_p < 1,
        "'validation.top_k' must be 0 or more, 'validation.top_p' in (0, 1] and 'validation.min_p' "
        f"in [0, 1), got {top_k}, {top_p} and {min_p}.",
    )
    for name in ("prompts_per_set", "max_response_len"):
        value = getattr(settings, name)
        _require(value >= 0, f"'validation.{name}' must be 0 or more, got {value}.")
    twice = sorted(set(settings.sets).intersection(settings.sources))
    _require(
        not twice,
        f"'validation.sources' and 'validation.sets' both name {', '.join(twice)}; rename the source.",
    )
    _require(
        not settings.sets or bool(settings.directory),
        f"'validation.sets' names {', '.join(settings.sets)}, but 'validation.directory' does not "
        "say where they are; set it.",
    )


def _check_processes(mesh: MeshSettings) -> None:
    _require(mesh.watchdog_s >= 0, f"'mesh.watchdog_s' must be 0 or more, got {mesh.watchdog_s}.")
    if mesh.coordinator in ("", "auto"):
        return
    host, _, port = mesh.coordinator.rpartition(":")
    _require(
        bool(host) and port.isdecimal(),
        f"'mesh.coordinator' must be auto or host:port, got {mesh.coordinator!r}.",
    )
    _require(
        0 <= mesh.process_id < mesh.num_processes,
        f"'mesh.coordinator' {mesh.coordinator!r} needs mesh.process_id from 0 to "
        f"mesh.num_processes - 1, got {mesh.process_id} of {mesh.num_processes}.",
    )


def _check_positive(run: RunConfig) -> None:
    rollout, update, loss, mesh = run.rollout, run.update, run.loss, run.mesh
    positive = {
        "rollout.prompts_per_step": rollout.prompts_per_step,
        "rollout.max_sampling_rounds": rollout.max_sampling_rounds,
        "rollout.max_response_len": rollout.max_response_len,
        "rollout.max_prompt_len": rollout.max_prompt_len,
        "rollout.cache_lens": rollout.cache_lens,
        "rollout.sample_rows": rollout.sample_rows,
        "rollout.temperature": rollout.temperature,
        "loss.is_high": loss.is_high,
        "advantage.correct_boost": run.advantage.correct_boost,
        "update.max_skipped": update.max_skipped,
        "validation.prompts_per_level": run.validation.prompts_per_level,
        "validation.temperature": run.validation.temperature,
        "validation.top_p": run.validation.top_p,
        "verifiers.time_limit_s": run.verifiers.time_limit_s,
        "update.num_minibatches": update.num_minibatches,
        "update.micro_batch_rows": update.micro_batch_rows,
        "optimizer.learning_rate": run.optimizer.learning_rate,
        "optimizer.max_grad_norm": run.optimizer.max_grad_norm,
        "validation.every": run.validation.every,
        "validation.samples": run.validation.samples,
        "validation.final_samples": run.validation.final_samples,
        "verifiers.num_workers": run.verifiers.num_workers,
        "checkpoint.every": run.checkpoint.every,
        "checkpoint.keep": run.checkpoint.keep,
        "mesh.data": mesh.data,
        "mesh.fsdp": mesh.fsdp,
        "mesh.tensor": mesh.tensor,
    }
    for name, value in positive.items():
        _require(
            value > 0 and math.isfinite(value), f"{name!r} must be greater than 0, got {value}."
        )


def _check_sizes(run: RunConfig) -> None:
    rollout, update, mesh = run.rollout, run.update, run.mesh
    _require(
        rollout.group_size >= 2,
        f"'rollout.group_size' must be at least 2, got {rollout.group_size}: "
        "an advantage compares the responses of a group.",
    )
    _require(
        rollout.prompts_per_step % update.num_minibatches == 0,
        f"'rollout.prompts_per_step' ({rollout.prompts_per_step}) must be a multiple of "
        f"'update.num_minibatches' ({update.num_minibatches}).",
    )
    row_devices = mesh.data * mesh.fsdp
    for name, value in (
        ("rollout.prompts_per_step", rollout.prompts_per_step),
        ("update.micro_batch_rows", update.micro_batch_rows),
    ):
        _require(
            value % row_devices == 0,
            f"{name!r} ({value}) must be a multiple of mesh.data * mesh.fsdp ({row_devices}).",
        )
    longest = rollout.max_prompt_len + rollout.max_response_len
    _require(
        update.row_len >= longest,
        f"'update.row_len' ({update.row_len}) must hold rollout.max_prompt_len + "
        f"rollout.max_response_len ({longest}).",
    )
    _require(
        run.optimizer.warmup_steps >= 0,
        f"'optimizer.warmup_steps' must be 0 or more, got {run.optimizer.warmup_steps}.",
    )
    _require(
        "" not in rollout.stop_strings, "'rollout.stop_strings' has an empty one; leave it out."
    )


def _check_objective(run: RunConfig) -> None:
    loss = run.loss
    for name, value, known in (
        ("loss.policy_loss", loss.policy_loss, POLICY_LOSSES),
        ("loss.kl_estimator", loss.kl_estimator, KL_ESTIMATORS),
        ("loss.kl_in", loss.kl_in, ("loss", "reward")),
        ("loss.correction", loss.correction, CORRECTIONS),
        ("loss.aggregation", loss.aggregation, AGGREGATIONS),
        ("advantage.estimator", run.advantage.estimator, ADVANTAGES),
    ):
        _require_one_of(name, value, known)
    _require(
        loss.kl_estimator != "k1" or loss.kl_in == "reward",
        "'loss.kl_estimator' k1 has no expected gradient as a loss; use k2 or k3, or "
        "loss.kl_in='reward'.",
    )
    unbounded = 1.0 if loss.policy_loss == "cispo" else math.nextafter(1.0, 0.0)
    _require(
        0 < loss.clip_low <= unbounded and loss.clip_high > 0,
        f"'loss.clip_low' must be in (0, 1) (1 with cispo alone) and 'loss.clip_high' positive, "
        f"got {loss.clip_low} and {loss.clip_high}.",
    )
    _require(loss.dual_clip > 1, f"'loss.dual_clip' must be above 1, got {loss.dual_clip}.")
    _require(
        0 <= loss.is_low <= min(1.0, loss.is_high),
        f"'loss.is_low' must be from 0 to 1 and at most loss.is_high, got {loss.is_low} and "
        f"{loss.is_high}.",
    )
    _require(
        loss.entropy_target == 0 or loss.entropy_step > 0,
        "'loss.entropy_step' must be above 0 where there is a loss.entropy_target, got "
        f"{loss.entropy_step}.",
    )
    _check_shaping(run.shaping)
    _require_not_negative("loss", loss, "kl_coef", "token_constant", "entropy_coef")
    _require_not_negative("loss", loss, "entropy_target", "entropy_step")


def _require_not_negative(section: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(0 <= value < math.inf, f"'{section}.{name}' must be 0 or more, got {value}.")


def _check_shaping(shaping: ShapingSettings) -> None:
    _require_not_negative("shaping", shaping, "overlong_coef", "length_coef", "length_on")
    _require_not_negative("shaping", shaping, "length_off", "ngram_size", "ngram_coef")
    _require(
        -math.inf < shaping.stop_properly <= 1,
        f"'shaping.stop_properly' must be at most 1, got {shaping.stop_properly}.",
    )
    _require(
        shaping.ngram_coef == 0 or shaping.ngram_size > 0,
        "'shaping.ngram_coef' needs shaping.ngram_size, the tokens of an n-gram.",
    )
    _require(
        shaping.length_off == 0 or shaping.length_on > 0,
        "'shaping.length_off' needs shaping.length_on, the steps before those.",
    )
    _require(
        0 <= shaping.overlong_buffer <= 1,
        f"'shaping.overlong_buffer' must be in [0, 1], got {shaping.overlong_buffer}.",
    )
    _require(
        -math.inf < shaping.length_min <= shaping.length_max < math.inf,
        f"'shaping.length_min' must be at most shaping.length_max, got {shaping.length_min} and "
        f"{shaping.length_max}.",
    )


def verifiers(run: RunConfig) -> list[str]:
    """The verifiers that score a run: those of the domains, and those that its sources name."""
    stages = [for_stage(run, i) for i in range(len(run.stages))]
    tables = [run.data.sources, *(stage.validation.sources for stage in [run, *stages])]
    own = {source.verifier for table in tables for source in table.values()}
    return [*DOMAINS, *sorted(own - {"", *DOMAINS})]


def packing(run: RunConfig) -> dict[str, int]:
    """Sizes of a packed mini-batch, with room for the worst case."""
    rollout, update = run.rollout, run.update
    samples = rollout.prompts_per_step // update.num_minibatches * rollout.group_size
    _, lanes = row_layout(run)
    per_row = min(lanes, update.row_len // (rollout.max_prompt_len + rollout.max_response_len))
    rows = samples // rollout.group_size * -(-rollout.group_size // per_row)
    return {
        "row_len": update.row_len,
        "micro_batch_rows": update.micro_batch_rows,
        "micro_batches": -(-rows // update.micro_batch_rows),
    }


def row_layout(run: RunConfig) -> tuple[int, int]:
    """Of a packed row: slots for prompts that are shared, and lanes, each for one response at least.

    (0, 1), a row without parts, where no lane fits beside a slot: then prompts have one token.
    """
    rollout, row_len = run.rollout, run.update.row_len
    room = row_len - max(1, rollout.max_prompt_len - 1)
    lanes = room // (rollout.max_response_len + 1)
    return (row_len - room // lanes * lanes, lanes) if lanes else (0, 1)


def changes(saved: Mapping[str, Any], run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """(old, new) of every setting in which a run differs from saved ones; None: not there."""
    differing = {}

    def compare(old: Any, new: Any, where: str) -> None:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in {**old, **new}:
                compare(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        elif old != new:
            differing[where] = (old, new)

    compare(saved, to_dict(run), "")
    return differing


def listed(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in differing.items())


def refuse_other(
    run: RunConfig, saved: Mapping[str, Any], workdir: str | Path, allow: bool = False
) -> None:
    """Raises ValueError where a workdir was made with settings that a run cannot change.

    Those in MAY_CHANGE it can, and if `allow` all others but those in NEVER_CHANGE.
    """

    def is_one_of(key: str, names: Sequence[str]) -> bool:
        return any(key == name or key.startswith(name + ".") for name in names)

    differing = {
        key: values
        for key, values in changes(saved, run).items()
        if is_one_of(key, NEVER_CHANGE) or not (allow or is_one_of(key, MAY_CHANGE))
    }
    if differing:
        hint = "" if any(is_one_of(key, NEVER_CHANGE) for key in differing) else ", --allow-changes"
        raise ValueError(
            f"--workdir: {str(workdir)!r} holds a run with other settings: {listed(differing)}; "
            f"give another workdir{hint} or the settings of that run."
        )
