"""What the controller would decide on a recorded run, with these settings or others.

    python -m prolong_jax.stages --replay=WORKDIR/metrics.jsonl --config=FILE [--config.KEY=VALUE]

The numbers stay those of the record: what other decisions would have done to them is not known.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prolong_jax import stages
from prolong_jax.config import RunConfig, for_stage, parse
from prolong_jax.metrics import read_rows


def replay(
    run: RunConfig, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[stages.Progress, stages.Decision]]:
    """The decision before each recorded step, and the progress then; ends where the run would.

    Args:
      run: settings; resets by hand are taken from the record.
      rows: of metrics.jsonl, in order.
    """
    progress, history = stages.Progress(), stages.History()
    for row in (row for row in rows if row["step"] > 0):
        by_hand = frozenset({"reset"} if row.get("reset") == "hand" else ())
        decision = stages.decide(run, progress, history, by_hand)
        yield progress, decision
        if decision.finish:
            return
        progress, history = stages.apply(run, progress, history, decision)
        evaluation = None
        if "validation/all/avg" in row:
            parts = [float(row[f"validation/all/{part}"]) for part in ("avg", "lo", "hi")]
            evaluation = stages.Evaluation(row["step"], *parts)
        over = for_stage(run, progress.stage).stages[progress.stage].reset.over
        progress, history = stages.record(progress, history, row, evaluation, over)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prolong_jax.stages", allow_abbrev=False)
    parser.add_argument("--replay", required=True, help="metrics.jsonl of a run")
    args, rest = parser.parse_known_args(argv)
    try:
        run, rows = parse(rest)[0], read_rows(args.replay)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    recorded = {row["step"] - 1: row["reset"] for row in rows if row.get("reset")}
    decisions = list(replay(run, rows))
    told = "after step  decides                       values                         recorded"
    print(told if decisions else "no steps are recorded")
    for progress, decision in decisions:
        said = [f"reset ({decision.reset})"] if decision.reset else []
        said += ["next stage"] if decision.advance else ["the end"] if decision.finish else []
        was = recorded.get(progress.step, "")
        if said or was:
            values = " ".join(f"{k} {v:.4g}" for k, v in decision.values.items())
            print(
                f"{progress.step:10}  {', '.join(said):28}  {values:30} {was and f'reset ({was})'}"
            )
    return 0
