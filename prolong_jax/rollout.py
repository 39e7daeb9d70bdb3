"""One collection: prompts -> samples -> verdicts -> groups of which enough teach something.

Responses go to the verifiers as they finish, while others are still decoded. Dynamic sampling (DAPO
Eq. 11): groups whose raw rewards are all equal are dropped and a further round of prompts is drawn,
until enough groups live or the rounds are used up. A round that is certain to be needed begins while
the one before is still being decoded. Live groups beyond what a step needs wait in `Cursor.surplus`
for the next one; their older sampler is corrected for by the importance weight of the loss.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from prolong_jax.config import RolloutSettings
from prolong_jax.data.mixture import Position
from prolong_jax.data.prompts import Prompt
from prolong_jax.groups import Group, OpenGroup
from prolong_jax.mesh import local_mesh
from prolong_jax.models.decoder import Model
from prolong_jax.next_token import SamplingRule, sample_keys
from prolong_jax.processes import Timer, dealt, share
from prolong_jax.sampler import compile_ahead, generate
from prolong_jax.slots import Request, Sample, Slots, slots_of
from prolong_jax.tokenizer import ChatTokenizer, stop_finder
from prolong_jax.types import PyTree
from prolong_jax.verifiers import Verdict
from prolong_jax.verifiers.pool import Pool


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
    compiled: set[tuple[SamplingRule, Slots]] = field(default_factory=set)  # ahead of their use


@dataclass(frozen=True)
class Plan:
    """How the responses of a collection are sampled."""

    settings: RolloutSettings
    group_size: int
    rule: SamplingRule
    step: int  # of the training; part of every response's key


def sample_groups(
    collector: Collector, params: PyTree, prompts: Sequence[Prompt], plan: Plan, timer: Timer
) -> list[Group]:
    """Samples a group for each prompt; every process does its share and gets all groups.

    Raises:
      ValueError: a prompt has more than `max_prompt_len` tokens, and is not to be truncated.
    """
    return share(prompts, lambda mine: _Rounds(collector, plan, timer).sample(params, mine)[0])


class _Rounds:
    """Sampling on the local devices, round after round without a pause, verified meanwhile."""

    def __init__(self, collector: Collector, plan: Plan, timer: Timer):
        self.collector, self.plan, self.timer = collector, plan, timer
        self.slots = slots_of(plan.settings, local_mesh(collector.mesh))
        self.groups: list[OpenGroup] = []
        self.sizes: list[int] = []  # groups of each round
        self.complete: list[OpenGroup] = []  # all their responses are there
        self.seen = 0  # of the complete ones, at the last look

    def sample(
        self,
        params: PyTree,
        first: Sequence[Prompt],
        further: Callable[[int, int], Sequence[Prompt]] | None = None,
    ) -> list[list[Group]]:
        """Samples a group for each prompt.

        Args:
          params: the policy, as from `sampling_copy`.
          first: prompts of the first round.
          further: (rounds begun, groups known to be dead) -> prompts of another round where it is
            certain that it will be needed, else none. Asked when half of the slots are free, about
            groups that were complete one look earlier, so that verdicts have had time and the
            order of events does not depend on how long they take.

        Returns:
          The groups of each round.
        """
        plan, pool, submitted = self.plan, self.collector.pool, 0.0
        sizes = plan.rule, self.slots

        def ask(free: int) -> list[Request]:
            if not self.sizes:
                return self._requests(first)
            known, self.seen = self.complete[: self.seen], len(self.complete)
            if further is None or 2 * free < self.slots.most * self.slots.devices:
                return []
            if not further(len(self.sizes), len(known)):
                return []  # whatever their verdicts
            with self.timer("verify"):
                while any(len(group.verdicts) < plan.group_size for group in known):
                    self._note(pool.poll(timeout_s=1.0))
            dead = sum(self._closed(group).is_dead for group in known)
            return self._requests(further(len(self.sizes), dead))

        with self.timer("sample"):
            if plan.settings.compile_ahead and sizes not in self.collector.compiled:
                compile_ahead(self.collector.model, params, *sizes)
                self.collector.compiled.add(sizes)
            samples = generate(
                self.collector.model,
                params,
                ask,
                plan.rule,
                self.slots,
                stop_finder(self.collector.tokenizer.decode, plan.settings.stop_strings),
            )
            for sample in samples:
                submitted = submitted or time.monotonic()
                self._submit(sample)
                self._note(pool.poll())
        with self.timer("verify"):
            self._note(pool.as_completed())
        if submitted:
            self.timer.span("workers", submitted, time.monotonic())
        groups = iter([self._closed(group) for group in self.groups])
        return [[next(groups) for _ in range(size)] for size in self.sizes]

    def _requests(self, prompts: Sequence[Prompt]) -> list[Request]:
        """Opens a round."""
        if not prompts and self.sizes:
            return []
        settings, start = self.plan.settings, len(self.groups)
        self.sizes.append(len(prompts))
        for prompt in prompts:
            tokens, opening = self.collector.tokenizer.encode_chat(prompt.messages)
            excess = len(tokens) - settings.max_prompt_len
            if excess > 0 and settings.long_prompts == "refuse":
                raise ValueError(
                    f"rollout.max_prompt_len: prompt {prompt.id!r} has {len(tokens)} tokens, at "
                    f"most {settings.max_prompt_len} fit; raise the limit, drop the prompt, or set "
                    "rollout.long_prompts to 'truncate'."
                )
            self.groups.append(OpenGroup(prompt, tokens[max(0, excess) :], excess > 0, opening))
        numbers = [zlib.crc32(p.id.encode()) for p in prompts]
        keys = sample_keys(self.collector.seed, self.plan.step, numbers, self.plan.group_size)
        return [
            Request(start + i, self.groups[start + i].tokens, keys[i], settings.max_response_len)
            for i in range(len(prompts))
        ]

    def _submit(self, sample: Sample) -> None:
        group = self.groups[sample.id]
        text = self.collector.tokenizer.decode(sample.tokens)
        group.samples[sample.index], group.texts[sample.index] = sample, text
        if len(group.samples) == self.plan.group_size:
            self.complete.append(group)
        prompt, item_id = group.prompt, (sample.id, sample.index)
        self.collector.pool.submit(item_id, prompt.verifier, group.opening + text, prompt.reference)

    def _note(self, verdicts: Iterable[tuple[Any, Verdict]]) -> None:
        for (number, index), verdict in verdicts:
            self.groups[number].verdicts[index] = verdict

    def _closed(self, group: OpenGroup) -> Group:
        return group.closed(self.plan.group_size, self.plan.step)


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

    A process that is alone begins a round ahead, as soon as enough dead groups make it certain; of
    several, none does. Which rounds there are depends on the rewards alone.

    Args:
      params: the policy, as from `sampling_copy`.
      cursor: position and surplus; changed in place.
      next_prompts: (position, count) -> the prompts there, and the position behind them.
      settings: sizes and dynamic sampling.
      step: training step, part of every sample's key.
      timer: adds up the seconds of each phase.

    Returns:
      The groups to train on, `prompts_per_step` of them unless the rounds ran out, and all groups
      that were sampled in this call.
    """
    rule = SamplingRule(collector.tokenizer.stop_ids, settings.temperature)
    plan = Plan(settings, settings.group_size, rule, step)
    ahead = settings.dynamic_sampling and jax.process_count() == 1
    wanted, live, sampled = settings.prompts_per_step, list(cursor.surplus), []
    drawn: list[tuple[list[Prompt], Position]] = []  # of each round
    done: list[list[Group]] = []  # of each round, this process's

    def prompts_of(number: int) -> list[Prompt]:
        while len(drawn) <= number:
            drawn.append(next_prompts(drawn[-1][1] if drawn else cursor.position, wanted))
        return drawn[number][0]

    def work(mine: Sequence[Prompt]) -> list[Group]:
        number, so_far = len(sampled) // wanted, len(live)

        def further(begun: int, dead: int) -> Sequence[Prompt]:
            is_last = number + begun == settings.max_sampling_rounds
            if is_last or so_far + begun * wanted - dead >= wanted:
                return []
            return dealt(prompts_of(number + begun))

        if number == len(done):
            rounds = _Rounds(collector, plan, timer)
            done.extend(rounds.sample(params, mine, further if ahead else None))
        return done[number]

    for number in range(settings.max_sampling_rounds):
        if len(live) >= wanted:
            break
        groups, cursor.position = share(prompts_of(number), work), drawn[number][1]
        sampled += groups
        live += [g for g in groups if not (settings.dynamic_sampling and g.is_dead)]
    cursor.surplus = live[wanted:]
    return live[:wanted], sampled
