"""Groups of responses: what the verdicts make of them, for the update and for the records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prolong_jax import shaping
from prolong_jax.advantages import ESTIMATORS, boost_correct, is_dead
from prolong_jax.config import RunConfig, VerifierSettings
from prolong_jax.data.prompts import Prompt
from prolong_jax.packing import Conversation
from prolong_jax.slots import Sample
from prolong_jax.verifiers import Status, Verdict

MIN_FAULTS = 8  # of a verifier in one step; fewer never stop a run


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, with their verdicts. Lists are over the G responses."""

    prompt: Prompt
    prompt_tokens: list[int]
    tokens: list[list[int]]  # stop token included
    logp: list[list[float]]  # nats, of the distribution that was sampled
    stopped: list[bool]  # ended by a stop token or string, not by the budget
    texts: list[str]
    scores: list[float]  # raw rewards in [0, 1]
    statuses: list[str]  # of the verdicts
    details: list[str]
    step: int  # training step whose policy sampled it
    truncated: bool = False  # the prompt lost its beginning

    @property
    def scored(self) -> np.ndarray:
        """bool [G]: false where the verifier itself failed."""
        return np.array([status != Status.ERROR for status in self.statuses])

    @property
    def is_dead(self) -> bool:
        return bool(is_dead(np.array(self.scores), self.scored))


@dataclass
class OpenGroup:
    """A group whose responses or verdicts are still to come, by index of the response."""

    prompt: Prompt
    tokens: list[int]
    truncated: bool
    opening: str  # what the chat template puts in front of each response
    samples: dict[int, Sample] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def closed(self, size: int, step: int) -> Group:
        """The group, once all its responses have verdicts."""
        samples = [self.samples[i] for i in range(size)]
        verdicts = [self.verdicts[i] for i in range(size)]
        return Group(
            prompt=self.prompt,
            prompt_tokens=self.tokens,
            tokens=[sample.tokens for sample in samples],
            logp=[sample.logp for sample in samples],
            stopped=[sample.reason != "length" for sample in samples],
            texts=[self.texts[i] for i in range(size)],
            scores=[verdict.score for verdict in verdicts],
            statuses=[str(verdict.status) for verdict in verdicts],
            details=[verdict.detail for verdict in verdicts],
            step=step,
            truncated=self.truncated,
        )


def shaped_reward(group: Group, run: RunConfig, step: int) -> np.ndarray:
    """f64 [G]: what the responses are trained on in a step; the raw rewards decided who lives."""
    settings, limit = run.shaping, run.rollout.max_response_len
    length = np.array([len(tokens) for tokens in group.tokens])
    reward = shaping.stop_properly(
        np.array(group.scores), np.array(group.stopped), coef=settings.stop_properly
    )
    overlong = shaping.soft_overlong(length, limit=limit, buffer=settings.overlong_buffer)
    reward = reward + settings.overlong_coef * overlong
    if settings.length_coef and shaping.is_on(step, on=settings.length_on, off=settings.length_off):
        ends = {"low": settings.length_min, "high": settings.length_max}
        reward = reward + settings.length_coef * shaping.cosine_length(length, limit=limit, **ends)
    if settings.ngram_size and settings.ngram_coef:
        repeated = [shaping.repetition(tokens, settings.ngram_size) for tokens in group.tokens]
        reward = reward - settings.ngram_coef * np.array(repeated)
    return reward


def advantages(groups: Sequence[Group], run: RunConfig, step: int) -> np.ndarray:
    """f64 [P, G]: of all groups that a step trains on, which some estimators look at together.

    A group that was sampled with another size, before a change of settings, fills its row in part.
    """
    most = max((len(group.scores) for group in groups), default=1)

    def table(rows: Iterable[Sequence[float] | np.ndarray]) -> np.ndarray:
        filled = [np.pad(np.asarray(row, float), (0, most - len(row))) for row in rows]
        return np.array(filled).reshape(-1, most)

    reward = table(shaped_reward(group, run, step) for group in groups)
    scored = table(group.scored for group in groups) > 0
    advantage = ESTIMATORS[run.advantage.estimator](reward, scored)
    raw = table(group.scores for group in groups)
    return boost_correct(advantage, raw, factor=run.advantage.correct_boost)


def is_trained(group: Group, run: RunConfig) -> np.ndarray:
    """bool [G]: false where a response was not scored, or `shaping.overlong_filter` leaves it out."""
    return group.scored & (np.array(group.stopped) | (not run.shaping.overlong_filter))


def conversations(
    groups: Sequence[Group], advantage_PG: np.ndarray, run: RunConfig
) -> list[list[Conversation]]:
    """The responses of each group that are trained on, as the update wants them."""
    return [
        [
            Conversation(
                np.array(group.prompt_tokens, np.int32),
                np.array(group.tokens[i], np.int32),
                np.array(group.logp[i], np.float32),
                float(advantage_G[i]),
            )
            for i in np.flatnonzero(is_trained(group, run))
        ]
        for group, advantage_G in zip(groups, advantage_PG, strict=True)
    ]


def statistics(
    kept: Sequence[Group], sampled: Sequence[Group], surplus: int, run: RunConfig
) -> dict[str, float]:
    """Metrics of a collection. Rewards are raw and over all that was sampled, dead groups too."""
    rewards: dict[str, list[float]] = {}
    lengths = [len(tokens) for g in sampled for tokens in g.tokens]
    statuses = [status for g in sampled for status in g.statuses]
    for g in sampled:
        rewards.setdefault(g.prompt.domain, []).extend(np.array(g.scores)[g.scored])
    trained = [len(g.tokens[i]) for g in kept for i in np.flatnonzero(is_trained(g, run))]
    dead = [np.array(g.scores)[g.scored] for g in sampled if g.is_dead]
    row = {f"reward/{domain}": float(np.mean(r)) for domain, r in rewards.items() if r}
    if sampled:
        row |= {
            "reward/mean": float(np.mean([r for rs in rewards.values() for r in rs])),
            "response/len_mean": float(np.mean(lengths)),
            "response/len_max": max(lengths),
            "response/terminated": float(np.mean([s for g in sampled for s in g.stopped])),
            "response/clipped": float(np.mean([not s for g in sampled for s in g.stopped])),
        }
    return row | {
        "groups/kept": len(kept),
        "groups/all_zero": sum(len(r) > 0 and r.max() == 0 for r in dead),
        "groups/all_one": sum(len(r) > 0 and r.min() == 1 for r in dead),
        "groups/equal": len(dead),
        "groups/surplus": surplus,
        "groups/stale": sum(g.step < max(g.step for g in kept) for g in kept),
        "prompts/truncated": sum(g.truncated for g in sampled),
        "verify/timeouts": statuses.count(Status.TIMEOUT),
        "verify/errors": statuses.count(Status.ERROR),
        "tokens/generated": sum(lengths),
        "tokens/trained": sum(trained) + sum(len(g.prompt_tokens) for g in kept),
    }


def sample_rows(
    groups: Sequence[Group], kept: Sequence[Group], advantage_PG: np.ndarray, step: int
) -> list[dict[str, Any]]:
    """The first response of each group as a row of samples.jsonl.

    Its advantage is 0 where the step was not trained on its group.
    """
    advantage = {id(g): float(a_G[0]) for g, a_G in zip(kept, advantage_PG, strict=True)}
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
            "advantage": advantage.get(id(group), 0.0),
            "stopped": group.stopped[0],
        }
        for group in groups
    ]


def group_from_dict(values: Mapping[str, Any]) -> Group:
    """The inverse of `dataclasses.asdict` after a JSON round trip."""
    prompt = dict(values["prompt"])
    prompt["messages"] = tuple(prompt["messages"])
    return Group(**{**values, "prompt": Prompt(**prompt)})


def refuse_broken_verifiers(sampled: Sequence[Group], settings: VerifierSettings) -> None:
    """Raises RuntimeError where a verifier failed (not the response) too often in one step."""
    for name in {g.prompt.verifier for g in sampled}:
        groups = [g for g in sampled if g.prompt.verifier == name]
        failed = [(g, i) for g in groups for i, ok in enumerate(g.scored) if not ok]
        rate = len(failed) / sum(len(g.tokens) for g in groups)
        if len(failed) >= MIN_FAULTS and rate > settings.max_error_rate:
            group, index = failed[0]
            raise RuntimeError(
                f"verifier {name!r} failed on {rate:.0%} of the responses of one step, more than "
                f"verifiers.max_error_rate = {settings.max_error_rate:.0%}; the first fault: "
                f"{group.details[index]}"
            )
