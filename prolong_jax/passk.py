"""What a trained policy solves that its base does not: pass@k of two evaluations, prompt by prompt.

    python -m prolong_jax.passk BASE TRAINED [--k=1,8,64] [--svg=FILE]

BASE and TRAINED are directories of `python -m prolong_jax.evaluate --out` on the same prompts. Prints
pass@k of both at k = 1, 2, 4, ..., n with the difference and its paired 95% bootstrap interval over
prompts, and the prompts that one policy solved and the other never did in its n samples. After the
study of ProRL (arXiv 2505.24864, section 4), which took 256 samples and compared pass@128. Never
solved is not unsolvable: without success in n samples, the 95% upper bound of the success rate is
1 - 0.05^(1/n), 1.2% at n = 256.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from prolong_jax.outcomes import Outcome, read_outcomes, subsets
from prolong_jax.scores import paired_difference, powers_of_two

Pair = tuple[Outcome, Outcome]  # of the base and of the trained policy, on one prompt
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, COLUMNS = 300, 220, 40, 12, 30, 34, 3  # of a panel
STYLE = """
svg { color-scheme: light dark; background: #fff; font: 12px system-ui, sans-serif; }
text { fill: #555; text-anchor: middle; } .y { text-anchor: end; } .key { text-anchor: start; }
.axis { stroke: #ddd; } .base { color: #c2570c; } .trained { color: #2468c9; }
path { fill: none; stroke: currentColor; stroke-width: 2; } circle { fill: currentColor; }
.base path { stroke-dasharray: 5 3; } .key.base, .key.trained { fill: currentColor; }
@media (prefers-color-scheme: dark) { svg { background: #17181b; } text { fill: #aaa; }
  .axis { stroke: #3a3d44; } .base { color: #f29a55; } .trained { color: #6ea8ff; } }
"""


OWN = ("model", "step", "weights_sha256", "samples", "seed", "dtype")  # of each policy's evaluation


def read_evaluation(directory: Path) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """The finished prompts of an evaluation by id, and its protocol.

    Raises:
      ValueError: no evaluation there, or none of its prompts is finished.
    """
    protocol, responses = directory / "protocol.json", directory / "responses.jsonl"
    if not (protocol.is_file() and responses.is_file()):
        raise ValueError(
            f"passk: expected a directory of prolong_jax.evaluate --out, but {str(directory)!r} "
            "has no protocol.json and responses.jsonl."
        )
    try:
        told = json.loads(protocol.read_text(encoding="utf-8"))
        found = {o.id: o for o in read_outcomes(responses, told["samples"])[0] if len(o.scores)}
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"passk: {str(protocol)!r} is damaged ({error}); restore it.") from error
    if not found:
        raise ValueError(f"passk: {str(responses)!r} has no finished prompt; evaluate further.")
    return found, told


def refuse_other_protocol(base: dict[str, Any], trained: dict[str, Any]) -> None:
    """Raises ValueError where two evaluations sampled by different rules."""
    keys = [key for key in base | trained if key not in OWN and base.get(key) != trained.get(key)]
    if keys:
        told = "; ".join(f"{key} {base.get(key)!r} and {trained.get(key)!r}" for key in keys)
        raise ValueError(f"passk: the evaluations differ in {told}; evaluate both by one protocol.")


def paired(base: dict[str, Outcome], trained: dict[str, Outcome]) -> list[Pair]:
    """The prompts that both have.

    Raises:
      ValueError: there are none, or one that is not the same in both.
    """
    both = [(o, trained[name]) for name, o in base.items() if name in trained]
    if not both:
        raise ValueError("passk: the two evaluations have no prompt in common.")
    for one, other in both:
        if one.fingerprint != other.fingerprint:
            raise ValueError(
                f"passk: prompt {one.id!r} is another one in the second evaluation; compare two "
                "evaluations on the same data."
            )
    return both


def curves(pairs: Sequence[Pair], ks: Sequence[int]) -> dict[str, dict[int, tuple[Any, ...]]]:
    """Name of the prompts -> k -> pass@k of both, the difference, and its interval."""
    partner, rows = {one.id: other for one, other in pairs}, {}
    for name, chosen in subsets([one for one, _ in pairs]).items():
        rows[name] = {}
        for k in ks:
            before = np.array([o.pass_at(k) for o in chosen])
            after = np.array([partner[o.id].pass_at(k) for o in chosen])
            values = float(before.mean()), float(after.mean())
            rows[name][k] = (*values, *paired_difference(before, after))
    return rows


def newly_solved(pairs: Sequence[Pair]) -> dict[str, list[Outcome]]:
    """By domain: the prompts, as the second policy answered them, that only it ever solved."""
    found: dict[str, list[Outcome]] = {}
    for one, other in pairs:
        if one.solved == 0 < other.solved:
            found.setdefault(one.domain, []).append(other)
    return found


def as_text(pairs: Sequence[Pair], rows: dict[str, dict[int, tuple[Any, ...]]]) -> str:
    lines = []
    for name, row in rows.items():
        count = len(subsets([one for one, _ in pairs])[name])
        lines.append(f"\n{name}, {count} prompts\n{'k':>6}   base  trained  difference [95%]")
        for k, (before, after, gain, (low, high)) in row.items():
            interval = f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"
            lines.append(f"{k:6}  {before:.3f}    {after:.3f}  {interval}")
    swapped = [(other, one) for one, other in pairs]
    for title, found in (
        ("the base never solved, the trained policy did", newly_solved(pairs)),
        ("the base solved, the trained policy never did", newly_solved(swapped)),
    ):
        counts = ", ".join(f"{domain} {len(rest)}" for domain, rest in found.items()) or "none"
        lines.append(f"\nprompts that {title}: {counts}")
        for outcome in (o for rest in found.values() for o in rest):
            lines.append(f"  {outcome.id} ({outcome.solved} of {len(outcome.scores)} samples)")
    return "\n".join(lines)


# --- the plot ------------------------------------------------------------------------------------


def as_svg(rows: dict[str, dict[int, tuple[Any, ...]]]) -> str:
    """One panel for each name: pass@k of both over k, on a logarithmic axis."""
    panels = [_panel(name, row) for name, row in rows.items()]
    width, height = COLUMNS * WIDTH, -(-len(panels) // COLUMNS) * HEIGHT
    placed = "".join(
        f'<g transform="translate({i % COLUMNS * WIDTH} {i // COLUMNS * HEIGHT})">{panel}</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="pass@k of the base and the trained policy"><style>{STYLE}</style>{placed}'
        "</svg>\n"
    )


def _panel(name: str, row: dict[int, tuple[Any, ...]]) -> str:
    bottom, most = HEIGHT - BOTTOM, math.log2(max(2, *row))

    def x(k: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(k) / most

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * value

    parts = [f'<text x="{WIDTH / 2}" y="14">{escape(name)}</text>']
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="axis" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y(value) + 4:.1f}">{value:g}</text>')
    parts += [f'<text x="{x(k):.1f}" y="{bottom + 16}">{k}</text>' for k in row]
    for index, policy in enumerate(("base", "trained")):
        points = [(k, x(k), y(values[index]), values[index]) for k, values in row.items()]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for _, px, py, _ in points)
        dots = "".join(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{policy}, pass@{k} {value:.3f}'
            "</title></circle>"
            for k, px, py, value in points
        )
        parts.append(f'<g class="{policy}"><path d="{path}"/>{dots}</g>')
        place = f'x="{LEFT + 4 + 50 * index}" y="{HEIGHT - 4}"'
        parts.append(f'<text class="key {policy}" {place}>{policy}</text>')
    parts.append(f'<text class="y" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">pass@k over k</text>')
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prolong_jax.passk", allow_abbrev=False)
    parser.add_argument("base", type=Path, help="--out of an evaluation")
    parser.add_argument("trained", type=Path, help="--out of another one, of the same prompts")
    parser.add_argument("--k", default="", help="comma-separated; 1, 2, 4, ... by default")
    parser.add_argument("--svg", type=Path, help="file for the plot")
    args = parser.parse_args(argv)
    try:
        (base, told), (trained, told_too) = map(read_evaluation, (args.base, args.trained))
        refuse_other_protocol(told, told_too)
        n, m = told["samples"], told_too["samples"]
        pairs = paired(base, trained)
        given = args.k.split(",") if args.k else powers_of_two(min(n, m))
        ks = sorted({int(k) for k in given if str(k).isdecimal() and 1 <= int(k) <= min(n, m)})
        if len(ks) != len(given):
            raise ValueError(f"--k: expected numbers from 1 to {min(n, m)}, got {args.k!r}.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = curves(pairs, ks)
    print(f"base: {args.base}, {n} samples; trained: {args.trained}, {m} samples per prompt")
    if unmatched := len(base) + len(trained) - 2 * len(pairs):
        print(f"{unmatched} prompts are finished in one of the two only and are left out")
    print(as_text(pairs, rows))
    if args.svg:
        args.svg.write_text(as_svg(rows), encoding="utf-8")
        print(f"\nwrote {args.svg}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
