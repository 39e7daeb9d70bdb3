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

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 50, 14, 28, 30  # of a chart and its margins
MAX_POINTS = 400  # of a line; a longer one shows every n-th step
MAX_SAMPLES, MAX_CHARS = 40, 4000
PHASES = ("sample", "verify", "score", "update", "evaluate", "save")
NAMES = {"easy_middle": "easy, middle", "hard": "hard", "all": "all levels"}

CURVES = {  # title: metrics
    "Reward while training, raw, mean of 5 steps": [
        *(f"reward/{d}" for d in DOMAINS),
        "reward/mean",
    ],
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
  --line: #e3e4e8; --band: #f1f2f5; --mark: #b3261e; --part: #946200; --c0: #2468c9; --c1: #c2570c;
  --c2: #12805c; --c3: #8b3fd1; --c4: #c72c78; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1b1d21; --ink: #e8e9ec;
  --soft: #a0a4ad; --line: #32353c; --band: #24272d; --mark: #ff8a80; --part: #e0b04c;
  --c0: #6ea8ff; --c1: #f29a55; --c2: #4cc79a; --c3: #bd8cff; --c4: #ff7eb6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 60px; max-width: 1240px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1, dd, pre { overflow-wrap: anywhere; } h1, h3, dd, dl { margin: 0; } h1 { font-size: 24px; }
h2 { font-size: 18px; margin: 34px 0 8px; } h3 { font-size: 14px; } p { margin: 4px 0 10px; }
p, dt, th { color: var(--soft); font-weight: normal; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto; }
.grid, dl { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)) }
dl { grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); } dt { font-size: 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0 } tbody tr { border-top: 1px solid var(--line); }
@media (max-width: 600px) { th, td { font-size: 13px; padding-right: 8px; } }
@media (min-width: 601px) { th, td { white-space: nowrap; } }
svg { display: block; width: 100%; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); text-anchor: middle; } svg .y { text-anchor: end; }
.axis { stroke: var(--line); } .band { fill: none; } .band:nth-child(odd) { fill: var(--band); }
.band { pointer-events: all; } .reset { stroke: var(--mark); stroke-dasharray: 3 3; }
svg .no { fill: var(--mark); }
.reach { stroke: transparent; stroke-width: 12; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round; }
.dashed { stroke-dasharray: 4 3; } .range { fill: currentColor; opacity: .18; stroke: none; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2, .good { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--ink); stroke-width: 2.2; }
.span { fill: var(--c0); opacity: .75; } .bad { color: var(--mark); } .part { color: var(--part); } circle { fill: currentColor; }
.keys { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px; margin-bottom: 6px; }
details + details, dl + details { border-top: 1px solid var(--line); }
summary { cursor: pointer; padding: 6px 0; } pre { white-space: pre-wrap; font-size: 12.5px;
  margin: 0 0 10px; padding: 8px; background: var(--band); border-radius: 6px; }
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
        """Step and scores, in the form of summary.json, of every evaluation."""
        found = {}
        for row in self.rows:
            for name in VALIDATION_SETS:
                parts = [
                    row.get(f"validation/{name}/{p}") for p in ("avg", "lo", "hi", "pass", "k")
                ]
                if None not in parts:
                    avg, low, high, solved, k = parts
                    scores = {"avg_at_k": avg, "ci95": [low, high], "pass_at_k": solved, "k": k}
                    found.setdefault(row["step"], {})[name] = scores
        if self.is_finished:
            found[self.last] = self.summary["validation"]["final"]
        return sorted(found.items())


@dataclass(frozen=True)
class Line:
    """A line of a chart: (step, value) with None for a gap; perhaps (step, low, high) around it."""

    label: str
    style: str
    points: Sequence[tuple[int, float | None]]
    ranges: Sequence[tuple[int, float, float]] = ()
    notes: Sequence[str] = ()  # on the points, which are dots then


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
    samples, values = workdir / "samples.jsonl", []
    for path in (workdir / "config.json", workdir / "summary.json"):
        values.append(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
    last = read_rows(samples, MAX_SAMPLES) if samples.is_file() else []
    return Run(workdir.resolve().name, read_rows(workdir / "metrics.jsonl"), last, *values)


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


def chart(title: str, lines: Sequence[Line], run: Run, share: bool) -> str:
    """A titled chart over the steps as HTML; "" where no line has a value."""
    known = [(line, [v for _, v in line.points if v is not None]) for line in lines]
    known = [(line, values) for line, values in known if values]
    if not known:
        return ""
    values = [v for _, values in known for v in values]
    values += [v for line in lines for _, *ends in line.ranges for v in ends]
    low, high = min(0.0, *values), max(1.0, *values) if share else 1.06 * max(0.0, *values)
    high = high if high > low else low + 1.0
    keys = "".join(
        f'<span class="{line.style}">{escape(line.label)} {values[-1]:.3g}</span>'
        for line, values in known
    )
    drawn = "".join(_draw(line, run.last, low, high) for line, _ in known)
    return (
        f'<div class="card"><h3>{escape(title)}</h3><div class="keys">{keys}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_frame(run, low, high)}{drawn}{_resets(run)}</svg></div>"
    )


def _frame(run: Run, low: float, high: float) -> str:
    """Stage bands, grid, axis labels."""
    bottom, parts, labels = HEIGHT - BOTTOM, [], []
    for number, (name, first, last) in enumerate(run.stages, 1):
        x, end = x_of(first - 1, run.last), x_of(last, run.last)
        note = f"<title>stage {number}: {escape(name)}, steps {first} to {last}</title>"
        place = f'x="{x:.1f}" y="{TOP}" width="{end - x:.1f}" height="{bottom - TOP}"'
        parts.append(f'<rect class="band" {place}>{note}</rect>')
        label = escape(name if 6.8 * len(name) < end - x else str(number))
        labels.append(f'<text x="{(x + end) / 2:.1f}" y="{TOP - 5}">{label}{note}</text>')
    for value in ticks(low, high):
        y = y_of(value, low, high)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        labels.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.4g}</text>')
    for step in (s for s in ticks(0, run.last, 5) if s == int(s)):
        place = f'x="{x_of(step, run.last):.1f}" y="{bottom + 15}"'
        labels.append(f'<text class="tick" {place}>{step:g}</text>')
    labels.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}">step</text>')
    return f"<g>{''.join(parts)}</g>{''.join(labels)}"


def _resets(run: Run) -> str:
    """A numbered dashed line for every reset, with its reason as tooltip."""
    parts = []
    for number, reset in enumerate(run.resets, 1):
        x = f"{x_of(reset['step'], run.last):.1f}"
        note = f"reset {number}, after step {reset['step']}: {escape(str(reset['reason']))}"
        ends = f'x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        parts.append(
            f'<g><title>{note}</title><line class="reset" data-step="{reset["step"]}" {ends}/>'
            f'<line class="reach" {ends}/><text class="no" x="{x}" y="11">{number}</text></g>'
        )
    return "".join(parts)


def _draw(line: Line, last: int, low: float, high: float) -> str:
    """The path of a line, its band and its dots."""

    def at(step: float, value: float) -> str:
        return f"{x_of(step, last):.1f} {y_of(value, low, high):.1f}"

    path, pen, dots = "", "M", ""
    for step, value in line.points[:: max(1, -(-len(line.points) // MAX_POINTS))]:
        path += "" if value is None else pen + at(step, value)
        pen = "M" if value is None else "L"
    edge = [(s, hi) for s, _, hi in line.ranges] + [(s, lo) for s, lo, _ in line.ranges[::-1]]
    band = f'<polygon class="range" points="{" ".join(at(*e) for e in edge)}"/>' if edge else ""
    for (step, value), note in zip(line.points, line.notes, strict=False):
        x, y = at(step, value or 0.0).split()
        dots += f'<circle cx="{x}" cy="{y}" r="2.5"><title>{escape(note)}</title></circle>'
    return f'<g class="{line.style}">{band}<path class="curve" d="{path}"/>{dots}</g>'


def metric_chart(run: Run, title: str, metrics: Sequence[str]) -> str:
    """The chart of an entry of CURVES."""
    lines = []
    for index, key in enumerate(metrics):
        points = [(row["step"], row[key]) for row in run.rows if key in row and row["step"] > 0]
        if key.startswith("reward/"):  # a domain has few prompts in a step
            points = [(s, v) for s, v in points if v is not None]
            last = [points[max(0, i - 4) : i + 1] for i in range(len(points))]
            points = [(part[-1][0], sum(v for _, v in part) / len(part)) for part in last]
        label = key.partition("/")[2].removesuffix("_s").replace("_", " ")
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
    ks = [s["k"] for _, s in scores]
    k = max(ks, key=ks.count, default=0)  # pass@k compares only at one k, avg@k at any
    solved = [(step, s["pass_at_k"]) for step, s in scores if s["k"] == k]
    lines = [Line(f"pass@{k}", "c1 dashed", solved), Line("avg", "c0", average, ranges, notes)]
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
        f'<div class="card"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def validation_table(run: Run) -> str:
    """Base -> final, or latest, per validation set: avg@k with its 95% interval, and pass@k."""
    (_, base), (step, final) = run.evaluations[0], run.evaluations[-1]
    rows = []
    for name in (name for name in VALIDATION_SETS if name in base and name in final):
        b, f = base[name], final[name]
        gain = f"{f['avg_at_k'] - b['avg_at_k']:+.3f}"
        solved = [f"{s['pass_at_k']:.3f} (k={s['k']})" for s in (b, f)]
        averages = [_interval(s).replace(", ", ",&nbsp;") for s in (b, f)]
        rows.append((NAMES.get(name, name), *averages, gain, *solved))
    now = "final" if run.is_finished else f"step {step}"
    first, last = ((f"{name} avg@k", f"{name} pass@k") for name in ("base", now))
    return _table(("", first[0], last[0], "gain", first[1], last[1]), rows)


def resets_table(run: Run) -> str:
    words = {True: "reset too", False: "kept", None: "known when the run is finished"}
    rows = [
        (str(i), str(r["step"]), escape(str(r["reason"])), words[r["optimizer"]])
        for i, r in enumerate(run.resets, 1)
    ]
    return _table(("reset", "after step", "reason", "optimizer"), rows)


def phases_table(run: Run) -> str:
    """Seconds of every phase, added up over the rows."""
    spent = {p: sum(row.get(f"time/{p}_s") or 0.0 for row in run.rows) for p in PHASES}
    spent |= run.summary["phases_s"] if run.is_finished else {}
    total = sum(spent.values()) or 1.0
    rows = [(escape(p), f"{s:.1f}", f"{100 * s / total:.1f}") for p, s in spent.items()]
    return _table(("phase", "seconds", "% of all phases"), rows)


def timeline(run: Run) -> str:
    """When each phase of the last step with a timeline ran; overlapping ones on lines of their own."""
    rows = [row for row in run.rows if row.get("timeline") and row.get("tokens/generated")]
    if not rows:
        return ""
    spans, step = rows[-1]["timeline"], rows[-1]["step"]
    end = max(stop for *_, stop in spans) or 1.0
    names = list(dict.fromkeys(name for name, *_ in spans))
    height, scale = 22 * len(names) + 24, (WIDTH - 90 - RIGHT) / end
    parts = []
    for line, name in enumerate(names):
        y = 22 * line + 4
        parts.append(f'<text class="y" x="84" y="{y + 13}">{escape(name)}</text>')
        for _, start, stop in (span for span in spans if span[0] == name):
            place = f'x="{90 + scale * start:.1f}" width="{max(1.0, scale * (stop - start)):.1f}"'
            note = f"<title>{escape(name)}: {start:.2f} to {stop:.2f} s</title>"
            parts.append(f'<rect class="span" {place} y="{y}" height="16">{note}</rect>')
    for value in ticks(0.0, end):
        x = 90 + scale * value
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 4}">{value:g} s</text>')
    return (
        f'<div class="card"><h3>Timeline of step {step}; workers: verification, from the first '
        f'response to the last verdict</h3><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="timeline of a step">{"".join(parts)}</svg></div>'
    )


def sample_browser(run: Run) -> str:
    """The last responses with their verdicts, newest first."""
    parts = []
    for sample in reversed(run.samples):
        score = sample.get("score") or 0.0
        style = "good" if score >= 1 else "bad" if score <= 0 else "part"
        keys = ("step", "domain", "level", "status", "advantage")
        values = [(key, sample[key]) for key in keys if sample.get(key) is not None]
        facts = " · ".join(f"{k} {v:+.2f}" if type(v) is float else f"{k} {v}" for k, v in values)
        facts += "" if sample.get("stopped", True) else " · not ended"
        texts = [
            (key, str(sample[key])) for key in ("prompt", "response", "detail") if sample.get(key)
        ]
        blocks = "".join(f"<b>{key}</b><pre>{_clipped(text)}</pre>" for key, text in texts)
        head = f'<summary><b class="{style}">{score:.2f}</b> {escape(facts)}</summary>'
        parts.append(f"<details>{head}{blocks}</details>")
    return f'<div class="card">{"".join(parts)}</div>'


def _clipped(text: str) -> str:
    """Escaped, without the middle of a long text."""
    cut, half = len(text) - MAX_CHARS, MAX_CHARS // 2
    if cut > 0:
        text = f"{text[:half]}\n[... {cut} characters ...]\n{text[-half:]}"
    return escape(text)


def settings(run: Run) -> str:
    """The settings that matter most, and all of them folded away."""
    facts = ""
    for key in SETTINGS:
        value: Any = run.config
        for part in key.split("."):
            value = value.get(part, {})
        facts += f"<div><dt>{key}</dt><dd>{escape(str(value))}</dd></div>" if value != {} else ""
    every = escape(json.dumps(run.config, indent=1))
    every = f"<details><summary>all settings</summary><pre>{every}</pre></details>"
    return f'<div class="card"><dl>{facts}</dl>{every}</div>'


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
        "Validation": sets and f'<div class="grid">{sets}</div>',
        "Training": curves and f'<div class="grid">{curves}</div>',
        "Resets of the reference": resets_table(run) if run.resets else "",
        "Where the time went": phases_table(run) + timeline(run) if run.rows else "",
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
        f"<h1>{escape(run.name)}</h1><p>{facts}. Numbered dashed lines are resets of the "
        "reference, bands are stages; pointing at them, or at a dot, tells more. The numbers above "
        f"a chart are the last ones.</p>{body}</body></html>\n"
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
