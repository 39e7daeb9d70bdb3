"""Groups of responses: what the verdicts make of them, for the update and for the records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prolong_jax.advantages import group_advantage, is_dead, stop_properly
from prolong_jax.config import RolloutSettings, VerifierSettings
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


def statistics(kept: Sequence[Group], sampled: Sequence[Group], surplus: int) -> dict[str, float]:
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
        "tokens/trained": sum(len(tokens) for g in kept for tokens in [g.prompt_tokens, *g.tokens]),
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
