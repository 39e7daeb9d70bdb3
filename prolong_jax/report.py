"""A workdir as one HTML page that needs nothing else: python -m prolong_jax.report WORKDIR

Works during a run, after one that was killed, and without a network. Every text from the run is
escaped, and the page allows no scripts.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from prolong_jax.config import DOMAINS
from prolong_jax.metrics import VALIDATION_SETS, read_rows

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 44, 10, 28, 30  # of a chart and its margins
MAX_POINTS = 300  # of a line; longer ones show means of neighbouring steps
MAX_SAMPLES, MAX_CHARS = 40, 4000
PHASES = ("sample", "verify", "score", "update", "evaluate", "save")
NAMES = {"easy_middle": "easy and middle levels", "hard": "hard level", "all": "all prompts"}

CURVES = {  # title: metrics
    "Reward while training, mean raw": [*(f"reward/{d}" for d in DOMAINS), "reward/mean"],
    "Entropy, nats per token": ["update/entropy"],
    "KL to the reference, nats per token": ["update/kl_ref"],
    "Response length, tokens": ["response/len_mean", "response/len_max"],
    "Ended by a stop token, share": ["response/terminated"],
    "Clipped, share of tokens": ["update/clip_fraction_low", "update/clip_fraction_high"],
    "Groups per step": ["groups/kept", "groups/all_zero", "groups/all_one", "groups/surplus"],
    "Gradient norm, before clipping": ["update/grad_norm"],
    "Time per step, seconds": [f"time/{phase}_s" for phase in PHASES],
}
SHARES = ("reward/", "validation/", "response/terminated")  # drawn on an axis from 0 to 1
SETTINGS = (
    *("model.path", "total_steps", "seed", "rollout.prompts_per_step", "rollout.group_size"),
    *("rollout.max_response_len", "rollout.temperature", "loss.clip_low", "loss.clip_high"),
    *("loss.kl_coef", "loss.kl_estimator", "optimizer.learning_rate", "update.num_minibatches"),
)
STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d1f23; --soft: #63676f;
  --line: #e3e4e8; --band: #f1f2f5; --mark: #b3261e; --c0: #2468c9; --c1: #c2570c; --c2: #12805c;
  --c3: #8b3fd1; --c4: #c72c78; --c5: #1d1f23; --good: #12805c; --bad: #b3261e; --part: #946200; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1b1d21; --ink: #e8e9ec;
  --soft: #a0a4ad; --line: #32353c; --band: #24272d; --mark: #ff8a80; --c0: #6ea8ff; --c1: #f29a55;
  --c2: #4cc79a; --c3: #bd8cff; --c4: #ff7eb6; --c5: #e8e9ec; --good: #4cc79a; --bad: #ff8a80;
  --part: #e0b04c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 60px; max-width: 1240px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 34px 0 8px; }
h3 { font-size: 14px; margin: 0; } p { margin: 4px 0 10px; } .soft, h3 span { color: var(--soft);
  font-weight: normal; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.grid.sets { grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
.facts { display: grid; gap: 8px 16px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  margin: 0; } .facts dt { color: var(--soft); font-size: 12px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; white-space: nowrap; }
th { color: var(--soft); font-weight: normal; } tbody tr { border-top: 1px solid var(--line); }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } .axis { stroke: var(--line); } .stage { fill: var(--band); }
.reset { stroke: var(--mark); stroke-dasharray: 3 3; } svg text.no { fill: var(--mark); }
.reach { stroke: transparent; stroke-width: 12; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
.dashed { stroke-dasharray: 4 3; } .range { fill: currentColor; opacity: .18; stroke: none; }
.dot { fill: currentColor; } .c0 { color: var(--c0); } .c1 { color: var(--c1); }
.c2 { color: var(--c2); } .c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.keys { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px; min-height: 18px; }
.span { width: 190px; } .thick { stroke: currentColor; stroke-width: 3; opacity: .35; }
details { border-top: 1px solid var(--line); } details.card { border: 1px solid var(--line); }
summary { cursor: pointer; padding: 6px 0; } summary b { font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; margin: 0 0 10px; padding: 8px;
  background: var(--band); border-radius: 6px; } .good { color: var(--good); }
.bad { color: var(--bad); } .part { color: var(--part); }
"""


@dataclass(frozen=True)
class Run:
    """What a workdir holds; `summary` is empty until the run is finished."""

    name: str
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def last(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def resets(self) -> list[dict[str, Any]]:
        """Step after which the reference was reset, reason, and whether the optimizer was too."""
        known = {r["step"]: r.get("optimizer") for r in self.summary.get("resets", [])}
        marked = [(row["step"] - 1, row["reset"]) for row in self.rows if row.get("reset")]
        return [{"step": s, "reason": why, "optimizer": known.get(s)} for s, why in marked]

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        """Name, first and last step of every stage."""
        spans: dict[tuple[int, str], list[int]] = {}
        for row in self.rows:
            if row.get("stage_index") is not None:
                key = (row["stage_index"], str(row.get("stage", row["stage_index"] + 1)))
                spans.setdefault(key, []).append(row["step"])
        return [(name, min(steps), max(steps)) for (_, name), steps in sorted(spans.items())]

    @property
    def is_finished(self) -> bool:
        return bool(self.rows) and self.summary.get("steps") == self.last

    @property
    def evaluations(self) -> list[tuple[int, dict[str, Any]]]:
        """Step and scores, as in summary.json, of every evaluation; the final one goes last."""
        found = []
        for row in self.rows:
            scores = {}
            for name in VALIDATION_SETS:
                parts = [
                    row.get(f"validation/{name}/{p}") for p in ("avg", "lo", "hi", "pass", "k")
                ]
                if None not in parts:
                    scores[name] = dict(avg_at_k=parts[0], pass_at_k=parts[3], k=parts[4])
                    scores[name]["ci95"] = parts[1:3]
            if scores:
                found.append((row["step"], scores))
        if self.is_finished:
            found = [e for e in found if e[0] < self.last or self.last == 0]
            found.append((self.last, self.summary["validation"]["final"]))
        return found


@dataclass(frozen=True)
class Line:
    """A line of a chart: (step, value) with None for a gap, and perhaps (step, low, high)."""

    label: str
    style: str
    points: Sequence[tuple[float, float | None]]
    ranges: Sequence[tuple[float, float, float]] = ()
    notes: Sequence[str] = ()  # of the points, which are drawn as dots then


def read_workdir(workdir: Path) -> Run:
    """Reads what is there.

    Raises:
      ValueError: the directory has no metrics.jsonl.
    """
    if not (workdir / "metrics.jsonl").is_file():
        raise ValueError(
            f"report: expected the workdir of a run, but {str(workdir)!r} has no metrics.jsonl; "
            "give the --workdir of a training run."
        )
    samples, texts = workdir / "samples.jsonl", {}
    for name in ("config.json", "summary.json"):
        path = workdir / name
        texts[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Run(
        name=workdir.resolve().name,
        rows=read_rows(workdir / "metrics.jsonl"),
        samples=read_rows(samples, MAX_SAMPLES) if samples.is_file() else [],
        config=texts["config.json"],
        summary=texts["summary.json"],
    )


# --- charts --------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers in [low, high]."""
    rough = max((high - low) / count, 1e-12)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def x_of(step: float, last: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, last)


def y_of(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)


def thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most MAX_POINTS points: means of neighbours, without the gaps inside them."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return list(points)
    out = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        values = [v for _, v in part if v is not None]
        out.append((part[-1][0], sum(values) / len(values) if values else None))
    return out


def chart(title: str, lines: Sequence[Line], run: Run, share: bool) -> str:
    """A titled chart over the steps as HTML; "" where no line has a point."""
    lines = [line for line in lines if any(v is not None for _, v in line.points)]
    if not lines:
        return ""
    values = [v for line in lines for _, v in line.points if v is not None]
    values += [v for line in lines for _, *ends in line.ranges for v in ends]
    low, high = min(0.0, *values), max(1.0 if share else 0.0, *values)
    if high == low:
        high = low + 1.0
    if not share:
        high += 0.05 * (high - low)
    drawn = "".join(_draw(line, run.last, low, high) for line in lines)
    now = next(v for _, v in reversed(lines[-1].points) if v is not None)
    keys = "".join(f'<span class="{line.style}">{escape(line.label)}</span>' for line in lines)
    head = f"<h3>{escape(title)} <span>· {escape(lines[-1].label)} {now:.3g}</span></h3>"
    keys = f'<div class="keys">{keys}</div>' if len(lines) > 1 else ""
    return (
        f'<div class="card">{head}{keys}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{_frame(run, low, high)}{drawn}{_resets(run)}</svg></div>'
    )


def _frame(run: Run, low: float, high: float) -> str:
    """Stage bands, grid, axis labels."""
    bottom, parts = HEIGHT - BOTTOM, []
    for number, (name, first, last) in enumerate(run.stages):
        x, end = x_of(first - 1, run.last), x_of(last, run.last)
        note = f"<title>stage {number + 1}: {escape(name)}, steps {first} to {last}</title>"
        style = ' class="stage"' if number % 2 == 0 else ' fill="transparent"'
        box = f'x="{x:.1f}" y="{TOP}" width="{end - x:.1f}" height="{bottom - TOP}"'
        label = name if 6.2 * len(name) < end - x else str(number + 1)
        middle = f'<text x="{(x + end) / 2:.1f}" y="{TOP - 4}" text-anchor="middle">'
        parts.append(f"<rect {box}{style}>{note}</rect>{middle}{escape(label)}</text>")
    for value in ticks(low, high):
        y = y_of(value, low, high)
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for step in (s for s in ticks(0, run.last, 5) if s == int(s)):
        x = x_of(step, run.last)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{step:g}</text>'
        )
    x = (LEFT + WIDTH - RIGHT) / 2
    return "".join(parts) + f'<text x="{x}" y="{HEIGHT - 3}" text-anchor="middle">step</text>'


def _resets(run: Run) -> str:
    """A numbered dashed line for every reset, with its reason as tooltip."""
    parts = []
    for number, reset in enumerate(run.resets, 1):
        x = x_of(reset["step"], run.last)
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 14}" y2="{HEIGHT - BOTTOM}"'
        parts.append(
            f"<g><title>reset {number}, after step {reset['step']}: {escape(reset['reason'])}"
            f'</title><line class="reset" data-step="{reset["step"]}" {ends}/>'
            f'<line class="reach" {ends}/>'
            f'<text class="no" x="{x:.1f}" y="11" text-anchor="middle">{number}</text></g>'
        )
    return "".join(parts)


def _draw(line: Line, last: int, low: float, high: float) -> str:
    """The path of a line, its band and its dots."""
    parts, path, pen = [], [], "M"
    if line.ranges:
        edge = [(s, hi) for s, _, hi in line.ranges] + [(s, lo) for s, lo, _ in line.ranges[::-1]]
        corners = " ".join(f"{x_of(s, last):.1f},{y_of(v, low, high):.1f}" for s, v in edge)
        parts.append(f'<polygon class="range" points="{corners}"/>')
    points = thinned(line.points)
    for step, value in points:
        if value is not None:
            path.append(f"{pen}{x_of(step, last):.1f} {y_of(value, low, high):.1f}")
        pen = "M" if value is None else "L"
    parts.append(f'<path class="curve" d="{"".join(path)}"/>')
    for (step, value), note in zip(line.points, line.notes, strict=False):
        if value is not None:
            place = f'cx="{x_of(step, last):.1f}" cy="{y_of(value, low, high):.1f}"'
            note = f"<title>{escape(note)}</title>"
            parts.append(f'<circle class="dot" {place} r="2.5">{note}</circle>')
    return f'<g class="{line.style}">{"".join(parts)}</g>'


def metric_chart(run: Run, title: str, metrics: Sequence[str]) -> str:
    lines = []
    for index, key in enumerate(metrics):
        points = [(row["step"], row[key]) for row in run.rows if key in row and row["step"] > 0]
        label = key.partition("/")[2].replace("_", " ")
        lines.append(Line(label, f"c{index}", points))
    return chart(title, lines, run, metrics[0].startswith(SHARES))


def validation_chart(run: Run, name: str) -> str:
    """avg@k with its interval, and pass@k, of one set of held-out prompts."""
    scores = [(step, table[name]) for step, table in run.evaluations if name in table]
    average = [(step, s["avg_at_k"]) for step, s in scores]
    ranges = [(step, *s["ci95"]) for step, s in scores]
    notes = [
        f"step {step}: {_interval(s)}, pass@{s['k']} {s['pass_at_k']:.3f}" for step, s in scores
    ]
    lines = [
        Line("pass@k", "c1 dashed", [(step, s["pass_at_k"]) for step, s in scores]),
        Line("avg@k with 95% interval", "c0", average, ranges, notes),
    ]
    return chart(NAMES.get(name, name), lines, run, True)


# --- tables and text -----------------------------------------------------------------------------


def _interval(scores: Mapping[str, Any]) -> str:
    low, high = scores["ci95"]
    return f"{scores['avg_at_k']:.3f} [{low:.3f}, {high:.3f}]"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="card wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def validation_table(run: Run) -> str:
    """Base -> final (or so far) per validation set, as numbers and as two bars."""
    (_, base), (step, final) = run.evaluations[0], run.evaluations[-1]
    rows = []
    for name in (name for name in VALIDATION_SETS if name in base and name in final):
        b, f = base[name], final[name]
        bars = ""
        for y, style, scores in ((6, "c1", b), (14, "c0", f)):
            low, high = (100 * end for end in scores["ci95"])
            bars += (
                f'<g class="{style}"><line class="thick" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" '
                f'y2="{y}"/><circle class="dot" cx="{100 * scores["avg_at_k"]:.1f}" cy="{y}" '
                f'r="2.5"/></g>'
            )
        bars = f'<svg class="span" viewBox="-3 0 106 20">{bars}</svg>'
        gain = f"{f['avg_at_k'] - b['avg_at_k']:+.3f}"
        solved = (f"{s['pass_at_k']:.3f} (k={s['k']})" for s in (b, f))
        rows.append((NAMES.get(name, name), _interval(b), _interval(f), gain, bars, *solved))
    now = "final" if run.is_finished else f"step {step}"
    scale = '0 to 1: <span class="c1">base</span>, <span class="c0">' + now + "</span>"
    heads = ("", "base avg@k", f"{now} avg@k", "gain", scale, "base pass@k", f"{now} pass@k")
    return _table(heads, rows)


def resets_table(run: Run) -> str:
    words = {True: "reset too", False: "kept", None: "known at the end"}
    return _table(
        ("reset", "after step", "reason", "optimizer"),
        [
            (str(i), str(r["step"]), escape(str(r["reason"])), words[r["optimizer"]])
            for i, r in enumerate(run.resets, 1)
        ],
    )


def phases_table(run: Run) -> str:
    """Seconds of every phase: of the summary, or added up over the rows."""
    spent = run.summary.get("phases_s") if run.is_finished else None
    if spent is None:
        spent = {p: sum(row.get(f"time/{p}_s") or 0.0 for row in run.rows) for p in PHASES}
    total = sum(spent.values()) or 1.0
    rows = [(escape(p), f"{s:.1f}", f"{100 * s / total:.1f}") for p, s in spent.items()]
    return _table(("phase", "seconds", "% of all phases"), rows)


def sample_browser(run: Run) -> str:
    """The last responses with their verdicts, newest first."""
    parts = []
    for sample in reversed(run.samples):
        score = sample.get("score") or 0.0
        style = "good" if score >= 1 else "bad" if score <= 0 else "part"
        facts = [str(sample.get(key, "")) for key in ("domain", "level", "status")]
        head = f"step {sample.get('step')} · " + " · ".join(escape(fact) for fact in facts)
        blocks = [
            f"<b>{key}</b><pre>{_clipped(str(sample[key]))}</pre>"
            for key in ("prompt", "response", "detail")
            if sample.get(key)
        ]
        more = f"advantage {sample.get('advantage') or 0.0:+.3f}, "
        more += "ended by a stop token" if sample.get("stopped") else "not ended"
        parts.append(
            f'<details><summary><b class="{style}">{score:.2f}</b> {head}</summary>'
            f"<p>{more}</p>{''.join(blocks)}</details>"
        )
    return f'<div class="card">{"".join(parts)}</div>'


def _clipped(text: str) -> str:
    """Escaped, without the middle of a long text."""
    cut, half = len(text) - MAX_CHARS, MAX_CHARS // 2
    if cut > 0:
        text = f"{text[:half]}\n[... {cut} characters ...]\n{text[-half:]}"
    return escape(text)


def settings(run: Run) -> str:
    """The settings that matter most, and all of them folded away."""
    facts = []
    for key in SETTINGS:
        value: Any = run.config
        for part in key.split("."):
            value = value.get(part, {})
        if value != {}:
            facts.append(f"<dt>{key}</dt><dd>{escape(str(value))}</dd>")
    every = escape(json.dumps(run.config, indent=2))
    return (
        f'<div class="card"><dl class="facts">{"".join(f"<div>{f}</div>" for f in facts)}</dl>'
        f"<details><summary>all settings</summary><pre>{every}</pre></details></div>"
    )


def page(run: Run) -> str:
    """The page as HTML."""
    total = run.config.get("total_steps", run.last)
    state = "finished" if run.is_finished else "not finished"
    seconds = max((row.get("time_s") or 0.0 for row in run.rows), default=0.0)
    tokens = sum(row.get("tokens/generated") or 0 for row in run.rows)
    facts = f"{state}: step {run.last} of {total} · {len(run.stages)} stages · {len(run.resets)} "
    facts += f"resets · {seconds / 60:.1f} min · {tokens:,.0f} tokens generated while training"
    sets = "".join(validation_chart(run, name) for name in VALIDATION_SETS)
    curves = "".join(metric_chart(run, title, metrics) for title, metrics in CURVES.items())
    sections = {
        "Base to final": validation_table(run) if run.evaluations else "",
        "Validation": sets and f'<div class="grid sets">{sets}</div>',
        "Training": curves and f'<div class="grid">{curves}</div>',
        "Resets of the reference": resets_table(run) if run.resets else "",
        "Where the time went": phases_table(run) if run.rows else "",
        "Responses": sample_browser(run) if run.samples else "",
        "Settings": settings(run) if run.config else "",
    }
    body = "".join(f"<h2>{title}</h2>{html}" for title, html in sections.items() if html)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(run.name)}: prolonged RL</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(run.name)}</h1><p class="soft">{facts}. Numbered dashed lines are resets of '
        f"the reference, grey bands are stages; pointing at them tells more.</p>{body}</body></html>\n"
    )


def write_report(workdir: str | Path) -> Path:
    """Writes report.html into a workdir, finished or not, and returns its path.

    Raises:
      ValueError: the directory has no metrics.jsonl.
    """
    path = Path(workdir) / "report.html"
    path.write_bytes(page(read_workdir(Path(workdir))).encode("utf-8", errors="replace"))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prolong_jax.report")
    parser.add_argument("workdir", type=Path)
    try:
        print(write_report(parser.parse_args(argv).workdir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
