"""Looks at the data of a run before it starts.

    python -m prolong_jax.data --config=experiments/configs/NAME.py [--config.KEY=VALUE]
    python -m prolong_jax.data --path=FILE [--format=NAME] [--split=..] [--domain=..] [--only=..]
        [--verifier=MODULE]
    python -m prolong_jax.data --evaluation=NAME --path=DIRECTORY

Prints for each source: rows, prompts, what was skipped and why, lengths in tokens, sample prompts,
and the verdicts on the gold answers of some rows. A gold answer that does not score 1 is listed; so
is one beside which a wrong answer cannot be judged, and a source without prompts: then the exit code
is 1, as it is 2 for data or settings that cannot be read. A verifier of one's own is tried on its
EXAMPLE alone.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from prolong_jax.config import RunConfig, SourceSettings, parse, verifiers
from prolong_jax.data.evaluation_sets import EVALUATION_SETS, read_evaluation_set
from prolong_jax.data.mixture import load, longest_prompt, prompt_at
from prolong_jax.data.prompts import Prompt, Skipped
from prolong_jax.data.readers import FORMATS
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.verifiers import VERIFIERS, Status
from prolong_jax.verifiers.pool import Pool, open_pool

Items = Iterator[Prompt | Skipped]
WRONG = r"</think>\boxed{31415926535897932}"
EMBEDDED = 500  # prompts of the embedded tasks to look at
SAMPLES = 3  # prompts to print
TEXTS = ("split", "domain", "only", "verifier")  # options that are settings of a source


def gold_response(prompt: Prompt) -> str | None:
    """A response that must score 1, or None where the data set has no answer to build it from."""
    reference = prompt.reference
    if prompt.verifier in ("math", "stem"):
        return rf"</think>\boxed{{{reference['answer']}}}"
    if prompt.verifier == "logic":
        if reference["entry"]["answer"] is None:
            return None
        return f"</think><answer>{reference['entry']['answer']}</answer>"
    if prompt.verifier not in VERIFIERS:
        return None
    return f"</think>```python\n{prompt.solution}\n```" if prompt.solution else None


def check_golds(pool: Pool, prompts: Sequence[Prompt]) -> tuple[int, list[str]]:
    """How many gold answers were scored, and one line for each fault."""
    golds = [(p, response) for p in prompts if (response := gold_response(p)) is not None]
    wrongs = [(p, WRONG) for p, _ in golds if p.verifier in ("math", "stem")]
    pairs = golds + wrongs
    verdicts = pool.score_all((p.verifier, response, p.reference) for p, response in pairs)
    faults = []
    for (prompt, response), verdict in zip(pairs, verdicts, strict=True):
        right = response is not WRONG
        if verdict.status != Status.OK or (verdict.score == 1.0) != right:
            told = "gold" if right else "a wrong answer"
            outcome = f"{verdict.score:g} ({verdict.status}: {verdict.detail})"
            faults.append(f"{prompt.id}: {told} scores {outcome}; {str(prompt.reference)[:200]}")
    return len(golds), faults


def report(
    name: str, items: Items, num_tokens: Callable[[Prompt], int], pool: Pool, golds: int
) -> bool:
    """Prints what a source holds, keeping only a sample of it; whether all was well."""
    rng, size = random.Random(0), max(SAMPLES, golds)
    sample, lengths, skipped, first = [], [], Counter(), {}
    for item in items:
        if isinstance(item, Skipped):
            skipped[item.reason] += 1
            first.setdefault(item.reason, f"{item.where} {item.detail}"[:200])
            continue
        lengths.append(num_tokens(item))
        place = len(sample) if len(sample) < size else rng.randrange(len(lengths))
        if place < size:  # every row is as likely to stay (reservoir sampling)
            sample[place:] = [item, *sample[place + 1 :]]
    print(f"\n=== {name}: {len(lengths) + skipped.total()} rows, {len(lengths)} prompts")
    for reason, count in skipped.most_common():
        print(f"skipped {count}: {reason}; the first: {first[reason]}")
    if not lengths:
        return False
    p50, p90, p99, longest = (int(x) for x in np.percentile(lengths, (50, 90, 99, 100)))
    print(f"prompt tokens: median {p50}, 90% {p90}, 99% {p99}, longest {longest}")
    rng.shuffle(sample)
    for prompt in sample[:SAMPLES]:
        print(f"--- {prompt.id} ({prompt.domain}, {prompt.source})")
        print("\n".join(f"[{turn['role']}] {turn['content'][:1000]}" for turn in prompt.messages))
    scored, faults = check_golds(pool, sample[:golds])
    told = f"{scored} scored, {len(faults)} faults, {len(sample[:golds]) - scored} rows have none"
    print("\n".join([f"--- gold answers: {told}", *faults]))
    return not faults


def sources_of(
    args: argparse.Namespace, run: RunConfig, num_tokens: Callable[[Prompt], int]
) -> Iterator[tuple[str, Items]]:
    """Name and rows of every source that the command line or the configuration names."""
    if args.evaluation:
        yield args.evaluation, read_evaluation_set(args.evaluation, args.path)
        return
    given = {key: getattr(args, key) for key in ("format", *TEXTS)}
    sources = dict(run.data.sources)
    if args.path:
        name = args.path.rstrip("/").rpartition("/")[2]
        sources = {name: SourceSettings(args.path, **given)}
    strict = args.strict or run.data.strict
    for name, settings in sources.items():
        yield name, load(name, settings, num_tokens, longest_prompt(run), strict)
    if not sources:
        mixture, levels = run.stages[0].mixture, run.stages[0].levels
        yield "embedded", (prompt_at(i, run.seed, mixture, levels) for i in range(EMBEDDED))


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Looks at data.", allow_abbrev=False)
    parser.add_argument("--config", help="experiment file; else --path")
    parser.add_argument("--path", help="file or directory, local or remote")
    parser.add_argument("--format", default="", choices=["", *FORMATS])
    for name in TEXTS:
        parser.add_argument(f"--{name}", default="", help="see SourceSettings")
    parser.add_argument("--evaluation", choices=EVALUATION_SETS, help="a set in the directory")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    parser.add_argument("--golds", type=int, default=100, help="gold answers to score per source")
    args, rest = parser.parse_known_args(argv)
    if not (args.path or args.config):
        parser.error("expected --config or --path")
    if args.verifier and not args.path:
        parser.error("--verifier: expected --path beside it; a source of --config names its own")
    try:
        run = parse([f"--config={args.config}", *rest])[0] if args.config else RunConfig()
        tokenizer = ChatTokenizer(run.model.path)

        def num_tokens(prompt: Prompt) -> int:
            return len(tokenizer.encode_chat(prompt.messages)[0])

        with open_pool(run.verifiers) as pool:
            own = {args.verifier, *verifiers(run)} - {"", *VERIFIERS}
            if own:
                pool.check(sorted(own))
            sources = sources_of(args, run, num_tokens)
            fine = [report(*source, num_tokens, pool, args.golds) for source in sources]
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
