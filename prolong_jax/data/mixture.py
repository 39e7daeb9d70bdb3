"""Which prompt comes next: pure functions of a seed and a position of a few integers.

The embedded tasks are drawn by `prompt_at`. Data sets are streams, functions from a count of
earlier draws to a prompt; `draw` picks among streams by weight. Every process computes the same
global order and takes its own share of it, so a run can go on with another number of processes.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from prolong_jax.config import DataSettings, RunConfig, SourceSettings, StageSettings, for_stage
from prolong_jax.data.procedural import make_prompt
from prolong_jax.data.prompts import Prompt, Skipped
from prolong_jax.data.readers import read, records

Stream = Callable[[int], Prompt]
MAX_PASSED_OVER = 1000  # prompts of unwanted difficulty in a row, then one is taken all the same


def prompt_at(
    position: int, seed: int, mixture: Mapping[str, float], levels: Mapping[str, float]
) -> Prompt:
    """The training prompt at a position of the endless stream.

    Args:
      position: how many prompts were drawn before.
      seed: of the run.
      mixture: weight of each domain.
      levels: weight of each difficulty level.
    """
    rng = random.Random(f"mixture/{seed}/{position}")
    domain = rng.choices(list(mixture), list(mixture.values()))[0]
    level = rng.choices(list(levels), list(levels.values()))[0]
    return make_prompt(domain, level, "train", seed, position)


@dataclass(frozen=True)
class Position:
    """Where the data stands: all that a checkpoint keeps of it."""

    drawn: int = 0  # prompts, by all processes
    cursors: Mapping[str, int] = field(default_factory=dict)  # draws from each source
    # By prompt id, the sum and the number of its rewards; kept where `mean_reward_after` is set.
    rewards: Mapping[str, Sequence[float]] = field(default_factory=dict)


# --- loading -------------------------------------------------------------------------------------


def load(
    name: str,
    settings: SourceSettings,
    num_tokens: Callable[[Prompt], int],
    max_tokens: int,
    strict: bool = False,
) -> Iterator[Prompt | Skipped]:
    """The prompts of a source that a run can train on, and what was skipped.

    Raises:
      ValueError: what `read` refuses; in strict mode the first bad row.
    """
    low, high = settings.min_pass_rate, settings.max_pass_rate
    rates = records(settings.pass_rates, "id", "pass_rate")
    for item in read(name, settings):
        if isinstance(item, Prompt):
            if not low <= rates.get(item.id, low) <= high:
                item = Skipped("pass rate out of range", item.id, is_bad=False)
            elif "asserts" in item.reference:
                item = Skipped("tests for evaluation only", item.id)
            elif (length := num_tokens(item)) > max_tokens:
                item = Skipped("prompt too long", item.id, f"{length} tokens")
        if strict and isinstance(item, Skipped) and item.is_bad:
            raise ValueError(
                f"data: row {item.where} of source {name!r} cannot be used: {item.reason} "
                f"({item.detail}); mend it or turn strict off."
            )
        yield item


def stream_of(prompts: Sequence[Prompt], name: str, seed: int) -> Stream:
    """The endless stream of a data set, in a new order in every epoch.

    Raises:
      ValueError: no prompts.
    """
    if not prompts:
        raise ValueError(
            f"data: source {name!r} has no usable prompt; python -m prolong_jax.data says why."
        )

    @lru_cache(maxsize=1)
    def order(epoch: int) -> list[int]:
        return random.Random(f"{seed}/{name}/{epoch}").sample(range(len(prompts)), len(prompts))

    def at(cursor: int) -> Prompt:
        epoch, index = divmod(cursor, len(prompts))
        return prompts[order(epoch)[index]]

    return at


@dataclass(frozen=True)
class Sources:
    """The data sets of a run; none: its prompts are the embedded tasks."""

    streams: Mapping[str, Stream] = field(default_factory=dict)
    shares: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # domain and weight
    settings: DataSettings = field(default_factory=DataSettings)


def longest_prompt(run: RunConfig) -> int:
    """Tokens of a prompt that fits into every stage."""
    return min(for_stage(run, i).rollout.max_prompt_len for i in range(len(run.stages)))


def open_sources(run: RunConfig, num_tokens: Callable[[Prompt], int]) -> Sources:
    """Reads the data sets of a run into memory, without the solutions of their rows.

    Raises:
      ValueError: what `load` refuses, a source of no usable rows or of several domains, and a
        stage whose mixture does not fit the sources.
    """
    streams, shares = {}, {}
    for name, settings in run.data.sources.items():
        prompts, skipped = [], Counter()
        for item in load(name, settings, num_tokens, longest_prompt(run), run.data.strict):
            if isinstance(item, Prompt):
                prompts.append(replace(item, solution=""))
            else:
                skipped[item.reason] += 1
        streams[name] = stream_of(prompts, name, run.seed)
        domains = {prompt.domain for prompt in prompts}
        if len(domains) > 1:
            raise ValueError(
                f"data: expected one domain in source {name!r}, got {', '.join(sorted(domains))}; "
                f"give each a source of its own with data.sources.{name}.only."
            )
        shares[name] = (domains.pop(), settings.weight)
        reasons = "".join(f"; skipped {n}: {reason}" for reason, n in skipped.most_common())
        print(f"{len(prompts)} prompts from {name}: {settings.path}{reasons}")
    for stage in run.stages if streams else ():
        source_weights(stage.mixture, shares)
    return Sources(streams, shares, run.data)


def next_prompts(
    sources: Sources, position: Position, count: int, seed: int, stage: StageSettings
) -> tuple[list[Prompt], Position]:
    """The next training prompts of a stage, and the position behind them.

    A prompt that is passed over for its rewards is unknown again at its next turn.
    """
    if sources.streams:
        weights = source_weights(stage.mixture, sources.shares)

        passed_over = set()

        def is_wanted(prompt_id: str) -> bool:
            wanted = is_in_range(position, prompt_id, sources.settings)
            passed_over.update([] if wanted else [prompt_id])
            return wanted

        prompts, end = draw(position, count, sources.streams, weights, seed, is_wanted)
        kept = {name: known for name, known in end.rewards.items() if name not in passed_over}
        return prompts, replace(end, rewards=kept)
    drawn = range(position.drawn, position.drawn + count)
    prompts = [prompt_at(n, seed, stage.mixture, stage.levels) for n in drawn]
    return prompts, replace(position, drawn=position.drawn + count)


# --- drawing -------------------------------------------------------------------------------------


def source_weights(
    mixture: Mapping[str, float], sources: Mapping[str, tuple[str, float]]
) -> dict[str, float]:
    """The weight of each source. The mixture names sources, or domains that their sources share.

    Args:
      mixture: weights of sources and domains; what it does not name is not drawn.
      sources: domain and weight of each source.

    Raises:
      ValueError: a name that is neither, or a domain whose sources are all named themselves.
    """
    weights = {name: mixture[name] for name in sources if name in mixture}
    for domain in [name for name in mixture if name not in sources]:
        shares = {
            name: w for name, (of, w) in sources.items() if of == domain and name not in mixture
        }
        total = sum(shares.values())
        if total <= 0:
            raise ValueError(
                f"mixture: expected sources ({', '.join(sources)}) or domains that have sources, "
                f"got {domain!r}; mend its name or add a source."
            )
        weights |= {name: mixture[domain] * share / total for name, share in shares.items()}
    return weights


def draw(
    position: Position,
    count: int,
    streams: Mapping[str, Stream],
    weights: Mapping[str, float],
    seed: int,
    is_wanted: Callable[[str], bool] = lambda prompt_id: True,
    process: tuple[int, int] = (0, 1),
) -> tuple[list[Prompt], Position]:
    """The next `count` prompts of the global order, and the position behind them.

    The source of draw number n depends on (seed, n) and the weights alone, its prompt on the
    source's own cursor. All arguments but the last are the same on all processes.

    Args:
      position: where the data stands.
      count: prompts for all processes together.
      streams: by source.
      weights: by source; may change between calls.
      seed: of the run.
      is_wanted: by prompt id; others are passed over.
      process: index and number; this process gets every number-th prompt.
    """
    names, cursors, mine = sorted(weights), dict(position.cursors), []
    index, number = process
    for drawn in range(position.drawn, position.drawn + count):
        rng = random.Random(f"source/{seed}/{drawn}")
        name = rng.choices(names, [weights[name] for name in names])[0]
        start = cursors.get(name, 0)
        for cursor in range(start, start + MAX_PASSED_OVER):
            prompt = streams[name](cursor)
            if is_wanted(prompt.id):
                break
        cursors[name] = cursor + 1
        mine += [prompt] if drawn % number == index else []
    return mine, replace(position, drawn=position.drawn + count, cursors=cursors)


# --- difficulty ----------------------------------------------------------------------------------


def record(
    position: Position, rewards: Iterable[tuple[str, Sequence[float]]], settings: DataSettings
) -> Position:
    """The position with the raw rewards of groups, each with its prompt's id, added."""
    if settings.mean_reward_after <= 0:
        return position
    known = dict(position.rewards)
    for prompt_id, values in rewards:
        total, count = known.get(prompt_id, (0.0, 0))
        known[prompt_id] = (total + sum(values), count + len(values))
    return replace(position, rewards=known)


def is_in_range(position: Position, prompt_id: str, settings: DataSettings) -> bool:
    """Whether a prompt's mean reward is wanted, or is known from too few responses."""
    total, count = position.rewards.get(prompt_id, (0.0, 0))
    if count < max(1, settings.mean_reward_after):
        return True
    return settings.min_mean_reward <= total / count <= settings.max_mean_reward
