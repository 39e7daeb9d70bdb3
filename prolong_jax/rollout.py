"""One collection: prompts -> samples -> verdicts -> groups -> what the update trains on.

Dynamic sampling (DAPO Eq. 11): groups whose raw rewards are all equal are dropped and more prompts
are drawn, until enough groups live or the rounds are used up. Live groups beyond what a step needs
wait in `Cursor.surplus` for the next one; their older sampler is corrected for by the importance
weight of the loss.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from prolong_jax.advantages import group_advantage, is_dead, stop_properly
from prolong_jax.config import RolloutSettings
from prolong_jax.data.mixture import Position
from prolong_jax.data.prompts import Prompt
from prolong_jax.mesh import by_rows, local_copy, local_mesh
from prolong_jax.models.decoder import Model
from prolong_jax.processes import Timer, share
from prolong_jax.sampler import Samples, SamplingRule, generate, left_pad, sample_keys
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.types import PyTree
from prolong_jax.update import Conversation
from prolong_jax.verifiers import Status
from prolong_jax.verifiers.pool import Pool


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, with their verdicts. Lists are over the G responses."""

    prompt: Prompt
    prompt_tokens: list[int]
    tokens: list[list[int]]  # stop token included
    logp: list[list[float]]  # nats, of the distribution that was sampled
    stopped: list[bool]  # ended by a stop token
    texts: list[str]
    scores: list[float]  # raw rewards in [0, 1]
    statuses: list[str]  # of the verdicts
    details: list[str]
    step: int  # training step whose policy sampled it

    @property
    def scored(self) -> np.ndarray:
        """bool [G]: false where the verifier itself failed."""
        return np.array([status != Status.ERROR for status in self.statuses])

    @property
    def is_dead(self) -> bool:
        return bool(is_dead(np.array(self.scores), self.scored))


@dataclass
class Cursor:
    """Where the collection stands in the data; part of the checkpoint."""

    position: Position = field(default_factory=Position)  # in the data
    surplus: list[Group] = field(default_factory=list)  # live groups that wait, oldest first


@dataclass(frozen=True)
class Collector:
    """What a collection needs from the outside world."""

    model: Model
    mesh: Mesh
    tokenizer: ChatTokenizer
    pool: Pool
    seed: int


def cast_for_sampling(model: Model, params: PyTree) -> PyTree:
    """The weights in the dtype of the products.

    Scales of norms stay in float32, as the trainer has them.
    """

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x if path[-1].key == "scale" else x.astype(model.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def sampling_copy(collector: Collector, params: PyTree) -> PyTree:
    """The weights for the sampler: cast for sampling, and whole on each local device."""
    return local_copy(collector.mesh, cast_for_sampling(collector.model, params))


def prompts_at_once(settings: RolloutSettings, group_size: int, mesh: Mesh) -> int:
    """How many groups are sampled together: a multiple of the devices that share rows."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return devices * max(1, settings.sample_rows // (group_size * devices))


def sample_groups(
    collector: Collector,
    params: PyTree,
    prompts: Sequence[Prompt],
    group_size: int,
    step: int,
    rule: SamplingRule,
    settings: RolloutSettings,
    timer: Timer,
) -> list[Group]:
    """Samples a group for each prompt; every process does its share and gets all groups.

    Raises:
      ValueError: a prompt is longer than `max_prompt_len` tokens.
    """

    def work(mine: Sequence[Prompt]) -> list[Group]:
        return _sample(collector, params, mine, group_size, step, rule, settings, timer)

    return share(prompts, work)


def _sample(
    collector: Collector,
    params: PyTree,
    prompts: Sequence[Prompt],
    group_size: int,
    step: int,
    rule: SamplingRule,
    settings: RolloutSettings,
    timer: Timer,
) -> list[Group]:
    """Samples a group for each prompt on the local devices, `sample_rows` responses at a time.

    Workers verify what is there while sampling goes on; "verify" is the time to wait for the rest.
    """
    mesh = local_mesh(collector.mesh)
    at_once = prompts_at_once(settings, group_size, mesh)
    groups: list[Group] = []
    for start in range(0, len(prompts), at_once):
        chunk = list(prompts[start : start + at_once])
        filled = chunk + [chunk[-1]] * (at_once - len(chunk))  # one shape, one compilation
        encoded = [collector.tokenizer.encode_chat(p.messages) for p in filled]
        ids = [tokens for tokens, _ in encoded]
        numbers = [zlib.crc32(p.id.encode()) for p in filled]
        inputs = (
            *left_pad(ids, settings.max_prompt_len, rule.pad_id),
            sample_keys(collector.seed, step, numbers, group_size),
        )
        with timer("sample"):
            tokens_PS, valid_PS, keys_PG = jax.device_put(inputs, by_rows(mesh))
            samples = generate(collector.model, params, tokens_PS, valid_PS, keys_PG, rule)
        for number, prompt in enumerate(chunk):
            rows = slice(number * group_size, (number + 1) * group_size)
            prompt_tokens, opening = encoded[number]
            group = _unscored(collector, prompt, prompt_tokens, samples, rows, step)
            for i, text in enumerate(group.texts):
                item_id = len(groups), i
                collector.pool.submit(item_id, prompt.verifier, opening + text, prompt.reference)
            groups.append(group)
    with timer("verify"):
        verdicts = dict(collector.pool.as_completed())
    for number, group in enumerate(groups):
        found = [verdicts[number, i] for i in range(group_size)]
        groups[number] = replace(
            group,
            scores=[verdict.score for verdict in found],
            statuses=[str(verdict.status) for verdict in found],
            details=[verdict.detail for verdict in found],
        )
    return groups


def _unscored(
    collector: Collector,
    prompt: Prompt,
    prompt_tokens: list[int],
    samples: Samples,
    rows: slice,
    step: int,
) -> Group:
    """The given rows of the samples as a group that has no verdicts yet."""
    lengths = samples.lengths[rows].tolist()
    tokens = [row[:n].tolist() for row, n in zip(samples.tokens[rows], lengths, strict=True)]
    return Group(
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        logp=[row[:n].tolist() for row, n in zip(samples.logp[rows], lengths, strict=True)],
        stopped=samples.stopped[rows].tolist(),
        texts=[collector.tokenizer.decode(ids) for ids in tokens],
        scores=[],
        statuses=[],
        details=[],
        step=step,
    )


def collect(
    collector: Collector,
    params: PyTree,
    cursor: Cursor,
    next_prompts: Callable[[Position, int], tuple[list[Prompt], Position]],
    settings: RolloutSettings,
    step: int,
    timer: Timer,
) -> tuple[list[Group], list[Group]]:
    """Fills one training step with live groups, and moves the cursor.

    Args:
      collector: model, tokenizer, verifiers.
      params: the policy.
      cursor: position and surplus; changed in place.
      next_prompts: (position, count) -> the prompts there, and the position behind them.
      settings: sizes and dynamic sampling.
      step: training step, part of every sample's key.
      timer: adds up the seconds of each phase.

    Returns:
      The groups to train on, `prompts_per_step` of them unless the rounds ran out, and all groups
      that were sampled in this call.
    """
    rule = SamplingRule(
        max_len=settings.max_response_len,
        stop_ids=collector.tokenizer.stop_ids,
        pad_id=collector.tokenizer.pad_id,
        temperature=settings.temperature,
    )
    wanted, live, sampled = settings.prompts_per_step, list(cursor.surplus), []
    for _ in range(settings.max_sampling_rounds):
        if len(live) >= wanted:
            break
        prompts, cursor.position = next_prompts(cursor.position, wanted)
        groups = sample_groups(
            collector, params, prompts, settings.group_size, step, rule, settings, timer
        )
        sampled += groups
        live += [g for g in groups if not (settings.dynamic_sampling and g.is_dead)]
    cursor.surplus = live[wanted:]
    return live[:wanted], sampled


def advantages(group: Group, settings: RolloutSettings) -> np.ndarray:
    """f64 [G]: advantages from the shaped rewards; the raw ones decided whether the group lives."""
    shaped = stop_properly(
        np.array(group.scores), np.array(group.stopped), coef=settings.stop_properly
    )
    return group_advantage(shaped, group.scored)


def conversations(group: Group, settings: RolloutSettings) -> list[Conversation]:
    """The group as the update wants it; responses that were not scored are left out."""
    prompt = np.array(group.prompt_tokens, np.int32)
    return [
        Conversation(prompt, np.array(tokens, np.int32), np.array(logp, np.float32), float(a))
        for tokens, logp, a, scored in zip(
            group.tokens, group.logp, advantages(group, settings), group.scored, strict=True
        )
        if scored
    ]


def statistics(kept: Sequence[Group], sampled: Sequence[Group], cursor: Cursor) -> dict[str, float]:
    """Metrics of a collection. Rewards are raw and over all that was sampled, dead groups too."""
    rewards: dict[str, list[float]] = {}
    lengths = [len(tokens) for g in sampled for tokens in g.tokens]
    statuses = [status for g in sampled for status in g.statuses]
    for g in sampled:
        rewards.setdefault(g.prompt.domain, []).extend(np.array(g.scores)[g.scored])
    dead = [np.array(g.scores)[g.scored] for g in sampled if g.is_dead]
    row = {f"reward/{domain}": float(np.mean(r)) for domain, r in rewards.items() if r}
    if sampled:
        row |= {
            "reward/mean": float(np.mean([r for rs in rewards.values() for r in rs])),
            "response/len_mean": float(np.mean(lengths)),
            "response/len_max": max(lengths),
            "response/terminated": float(np.mean([s for g in sampled for s in g.stopped])),
        }
    return row | {
        "groups/kept": len(kept),
        "groups/all_zero": sum(len(r) > 0 and r.max() == 0 for r in dead),
        "groups/all_one": sum(len(r) > 0 and r.min() == 1 for r in dead),
        "groups/equal": len(dead),
        "groups/surplus": len(cursor.surplus),
        "verify/timeouts": statuses.count(Status.TIMEOUT),
        "verify/errors": statuses.count(Status.ERROR),
        "tokens/generated": sum(lengths),
    }


def sample_rows(
    groups: Sequence[Group], settings: RolloutSettings, step: int
) -> list[dict[str, Any]]:
    """The first response of each group as a row of samples.jsonl."""
    return [
        {
            "step": step,
            "domain": group.prompt.domain,
            "level": group.prompt.level,
            "prompt": group.prompt.messages[-1]["content"],
            "response": group.texts[0],
            "score": group.scores[0],
            "status": group.statuses[0],
            "detail": group.details[0],
            "advantage": float(advantages(group, settings)[0]),
            "stopped": group.stopped[0],
        }
        for group in groups
    ]


def group_from_dict(values: Mapping[str, Any]) -> Group:
    """The inverse of `dataclasses.asdict` after a JSON round trip."""
    prompt = dict(values["prompt"])
    prompt["messages"] = tuple(prompt["messages"])
    return Group(**{**values, "prompt": Prompt(**prompt)})
