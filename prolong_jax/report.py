"""Workdirs as one HTML page that needs nothing else:

    python -m prolong_jax.report WORKDIR [WORKDIR...] [--out FILE]

Works during a run, after one that was killed, and without a network; several runs are compared.
Every text from a run is escaped, and the page allows its own script alone, which filters the
responses.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prolong_jax.charts import Frame, Line, chart, text, timeline
from prolong_jax.config import ASSETS, COMPARABLE, DOMAINS
from prolong_jax.metrics import VALIDATION_SETS, read_rows

MAX_SAMPLES, SAMPLE_BYTES = 1200, 2_500_000  # of a page
MAX_CHARS = 4000  # of one text of a response
PHASES = ("sample", "verify", "score", "update", "evaluate", "save")
NAMES = {"easy_middle": "easy, middle", "hard": "hard", "all": "all levels"}

TRAINING = {  # title: metrics
    "Reward while training, raw, mean of 5 steps": [
        *(f"reward/{d}" for d in DOMAINS),
        "reward/mean",
    ],
    "Entropy, nats per token": ["update/entropy"],
    "KL to the reference, nats per token": ["update/kl_ref"],
    "KL old to new policy, nats per token": ["update/kl_old"],
    "Response length, tokens": ["response/len_mean", "response/len_max"],
    "Ended by a stop token, share": ["response/terminated"],
    "Clipped, share of tokens": ["update/clip_fraction_low", "update/clip_fraction_high"],
    "Ratio of new to old policy": ["update/ratio_min", "update/ratio_max"],
    "Advantage": ["update/advantage_min", "update/advantage_std", "update/advantage_max"],
    "Groups per step": ["groups/kept", "groups/all_zero", "groups/all_one", "groups/surplus"],
    "Gradient norm, before clipping": ["update/grad_norm"],
    "Learning rate": ["update/learning_rate"],
}
MACHINE = {
    "Time per step, seconds": [f"time/{phase}_s" for phase in PHASES],
    "Generated tokens per second": ["tokens/per_s"],
    "Resident memory of the process, MB": ["memory/rss_mb"],
    "Time of a verdict, seconds": [f"time/verdict_{part}_s" for part in ("mean", "p95", "max")],
    "Timeouts and faults of verifiers per step": ["verify/timeouts", "verify/errors"],
}
SHARES = ("reward/", "validation/", "response/terminated")  # drawn on an axis from 0 to 1
SETTINGS = (
    *("model.path", "total_steps", "seed", "rollout.prompts_per_step", "rollout.group_size"),
    *("rollout.max_response_len", "rollout.temperature", "loss.clip_low", "loss.clip_high"),
    *("loss.policy_loss", "loss.kl_coef", "loss.kl_estimator", "advantage.estimator"),
    *("optimizer.learning_rate", "update.num_minibatches"),
)


@dataclass(frozen=True)
class Run:
    """What a workdir holds; `summary` is empty until the run is finished."""

    name: str
    style: str  # of its lines where several runs are compared
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def resets(self) -> list[dict[str, Any]]:
        """Step after which the reference was reset, why, and what else was reset (None: unknown)."""
        known = {r["step"]: r.get("optimizer") for r in self.summary.get("resets", [])}
        return [
            {
                "step": row["step"] - 1,
                "reason": str(row["reset"]),
                "what": row.get("reset/what"),
                "values": row.get("reset/values") or {},
                "optimizer": known.get(row["step"] - 1),
            }
            for row in self.rows
            if row.get("reset")
        ]

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
    def blends(self) -> list["Blend"]:
        """All evaluations, those that ask alike together; those of the base and its like first."""
        found: dict[str, Blend] = {"{}": Blend({})}
        for row in self.rows:
            table = _scores(row)
            if table:
                changes = self._changes(row.get("stage_index"))
                blend = found.setdefault(json.dumps(changes, sort_keys=True), Blend(changes))
                blend.evaluations.append((row["step"], table))
                blend.stages.setdefault(str(row.get("stage", "")))
        if self.is_finished:
            own = [(s, table) for s, table in found["{}"].evaluations if s != self.last]
            final = self.last, self.summary["validation"]["final"]
            found["{}"].evaluations[:] = [*own, final]
        return [blend for blend in found.values() if blend.evaluations]

    def _changes(self, stage: int | None) -> dict[str, Any]:
        """What a stage changes in how the policy is evaluated, beside how much and how often."""
        stages, own = self.config.get("stages", []), self.config.get("validation", {})
        overrides = stages[stage].get("overrides", {}) if stage in range(len(stages)) else {}
        settings = {k: v for k, v in overrides.items() if k.startswith("validation.")}
        named = {key.partition(".")[2]: value for key, value in settings.items()}
        return {k: v for k, v in named.items() if k not in COMPARABLE and own.get(k) != v}


@dataclass(frozen=True)
class Blend:
    """Evaluations with the same prompts, sampled in the same way."""

    changes: dict[str, Any]  # against the settings of the evaluation of the base
    evaluations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # step and scores
    stages: dict[str, None] = field(default_factory=dict)  # names, in order

    @property
    def name(self) -> str:
        return f" ({', '.join(self.stages)})" if self.changes else ""


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of metrics says of an evaluation, in the form of summary.json; {}: there was none.

    The sets of the embedded tasks first, then data sets by name.
    """
    names = {key[11:-4] for key in row if key.startswith("validation/") and key.endswith("/avg")}
    found = {}
    for name in (*VALIDATION_SETS, *sorted(names.difference(VALIDATION_SETS))):
        parts = [row.get(f"validation/{name}/{part}") for part in ("avg", "lo", "hi", "pass", "k")]
        if None not in parts:
            avg, low, high, solved, k = parts
            found[name] = {"avg_at_k": avg, "ci95": [low, high], "pass_at_k": solved, "k": k}
    return found


def read_workdir(workdir: Path, name: str = "", style: str = "c0") -> Run:
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
    found = read_rows(samples, _clipped) if samples.is_file() else []
    name = name if name else workdir.resolve().name
    return Run(name, style, read_rows(workdir / "metrics.jsonl"), found, *values)


# --- charts --------------------------------------------------------------------------------------


def frame(runs: Sequence[Run]) -> Frame:
    """The axis of all charts; stages are shown of a single run only."""
    last, many = max(run.last for run in runs), len(runs) > 1
    marks = [
        (
            reset["step"],
            str(number),
            run.style if many else "mark",
            f"{run.name + ': ' if many else ''}reset {number}, after step {reset['step']}: "
            f"{reset['reason']}",
        )
        for run in runs
        for number, reset in enumerate(run.resets, 1)
    ]
    return Frame(last, [] if many else runs[0].stages, marks)


def points(run: Run, key: str) -> list[tuple[int, float | None]]:
    """A metric over the training steps; rewards as the mean of 5 steps, since a step has few prompts."""
    found = [(row["step"], row[key]) for row in run.rows if key in row and row["step"] > 0]
    if not key.startswith("reward/"):
        return found
    known = [(s, v) for s, v in found if v is not None]
    last = [known[max(0, i - 4) : i + 1] for i in range(len(known))]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in last]


def metric_charts(runs: Sequence[Run], curves: Mapping[str, Sequence[str]]) -> str:
    """A chart for each title, or, of several runs, for each metric with a line for each run."""
    axis, drawn = frame(runs), []
    for title, keys in curves.items():
        labels = [key.partition("/")[2].removesuffix("_s").replace("_", " ") for key in keys]
        labels = labels if len(keys) > 1 else ["last"]
        share = keys[0].startswith(SHARES)
        if len(runs) == 1:
            lines = [
                Line(label, f"c{i}", points(runs[0], key))
                for i, (label, key) in enumerate(zip(labels, keys, strict=True))
            ]
            drawn.append(chart(title, lines, axis, share))
            continue
        for label, key in zip(labels, keys, strict=True):
            lines = [Line(run.name, run.style, points(run, key)) for run in runs]
            full = f"{title}: {label}" if len(keys) > 1 else title
            drawn.append(chart(full, lines, axis, share))
    return "".join(drawn)


def validation_chart(runs: Sequence[Run], name: str) -> str:
    """avg@k with its interval of one set of held-out prompts; of a single run, pass@k too.

    Evaluations that do not ask alike have lines of their own.
    """
    lines = []
    for run, number, blend in ((r, i, b) for r in runs for i, b in enumerate(r.blends)):
        scores = [(step, table[name]) for step, table in blend.evaluations if name in table]
        average = [(step, s["avg_at_k"]) for step, s in scores]
        ranges = [(step, *s["ci95"]) for step, s in scores]
        notes = [
            f"step {step}: {_interval(s)}, pass@{s['k']} {s['pass_at_k']:.3f}" for step, s in scores
        ]
        if len(runs) > 1:
            lines.append(Line(run.name + blend.name, run.style, average, ranges, notes))
            continue
        ks = [s["k"] for _, s in scores]
        k = max(ks, key=ks.count, default=0)  # pass@k compares only at one k, avg@k at any
        solved = [(step, s["pass_at_k"]) for step, s in scores if s["k"] == k]
        styles = f"c{2 * number % 5}", f"c{(2 * number + 1) % 5} dashed"
        lines.append(Line(f"pass@{k}{blend.name}", styles[1], solved))
        lines.append(Line(f"avg{blend.name}", styles[0], average, ranges, notes))
    return chart(NAMES.get(name, name), lines, frame(runs), True)


# --- tables --------------------------------------------------------------------------------------


def _interval(scores: Mapping[str, Any]) -> str:
    low, high = scores["ci95"]
    return f"{scores['avg_at_k']:.3f} [{low:.3f}, {high:.3f}]"


def _table(
    runs: Sequence[Run],
    headings: Sequence[str],
    rows_of: Callable[[Run], Iterable[Sequence[Any]]],
) -> str:
    """A table of the rows of all runs; of several, with the run in front.

    Rows of different runs that begin alike stand together.
    """
    many = len(runs) > 1
    found = [(run, list(row)) for run in runs for row in rows_of(run)]
    firsts = {first: i for i, first in enumerate(dict.fromkeys(row[0] for _, row in found))}
    body = ""
    for run, row in sorted(found, key=lambda pair: firsts[pair[1][0]]):
        name = [f'<td class="{run.style}">{text(run.name)}</td>'] if many else []
        body += f"<tr>{''.join(name + [f'<td>{text(cell)}</td>' for cell in row])}</tr>"
    head = "".join(f"<th>{text(h)}</th>" for h in (("run",) if many else ()) + tuple(headings))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card">{table}</div>' if body else ""


def overview(runs: Sequence[Run]) -> str:
    def row(run: Run) -> list[Any]:
        seconds = max((row.get("time_s") or 0.0 for row in run.rows), default=0.0)
        tokens = sum(row.get("tokens/generated") or 0 for row in run.rows)
        state = "finished" if run.is_finished else "not finished"
        steps = f"step {run.last} of {run.config.get('total_steps', run.last)}"
        counts = [f"{len(run.stages)} stages", f"{len(run.resets)} resets"]
        return [state, steps, *counts, f"{seconds / 60:.1f} min", f"{tokens:,.0f} tokens generated"]

    if len(runs) == 1:
        return f"<p>{text(' · '.join(row(runs[0])))}</p>"
    return _table(runs, ("", "", "", "", "", ""), lambda run: [row(run)])


def validation_table(runs: Sequence[Run]) -> str:
    """Base -> final, or latest, per validation set: avg@k with its 95% interval, and pass@k.

    Of evaluations that do not ask as that of the base does, the first takes the place of the base.
    """
    notes = ""

    def rows(run: Run) -> Iterable[Sequence[str]]:
        for blend in run.blends:
            (first, base), (step, final) = blend.evaluations[0], blend.evaluations[-1]
            where = f"{blend.name}, from step {first}" if blend.name else ""
            for name in (name for name in base if name in final):
                b, f = base[name], final[name]
                gain = f"{f['avg_at_k'] - b['avg_at_k']:+.3f}"
                solved = [f"{s['pass_at_k']:.3f} (k={s['k']})" for s in (b, f)]
                averages = [_interval(s).replace(", ", ",\u00a0") for s in (b, f)]
                yield (NAMES.get(name, name) + where, *averages, gain, *solved, str(step))

    for run in runs:
        for blend in (blend for blend in run.blends if blend.changes):
            changes = ", ".join(f"validation.{key} {v}" for key, v in blend.changes.items())
            notes += (
                f"<p>{text(run.name + blend.name)}: evaluated otherwise than the base "
                f"({text(changes)}); its scores are comparable with one another alone.</p>"
            )
    now = "final" if all(run.is_finished for run in runs) else "latest"
    first, last = ((f"{name} avg@k", f"{name} pass@k") for name in ("base", now))
    headings = ("", first[0], last[0], "gain", first[1], last[1], f"{now} step")
    return _table(runs, headings, rows) + notes


def resets_table(runs: Sequence[Run]) -> str:
    words = {True: "reference, optimizer", False: "reference", None: "reference, perhaps optimizer"}

    def rows(run: Run) -> Iterable[Sequence[str]]:
        for number, r in enumerate(run.resets, 1):
            what = ", ".join(map(str, r["what"])) if r["what"] else words[r["optimizer"]]
            values = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in r["values"].items()
            )
            yield str(number), str(r["step"]), r["reason"], values, what

    return _table(runs, ("reset", "after step", "reason", "values", "what was reset"), rows)


def phases_table(runs: Sequence[Run]) -> str:
    """Seconds of every phase, added up over the rows."""

    def rows(run: Run) -> Iterable[Sequence[str]]:
        spent = {p: sum(row.get(f"time/{p}_s") or 0.0 for row in run.rows) for p in PHASES}
        spent |= run.summary["phases_s"] if run.is_finished else {}
        total = sum(spent.values()) or 1.0
        return [(p, f"{s:.1f}", f"{100 * s / total:.1f}") for p, s in spent.items()]

    return _table(runs, ("phase", "seconds", "% of all phases"), rows)


def verifiers_table(runs: Sequence[Run]) -> str:
    """Verdicts of each verifier over the whole run, those of evaluations too."""

    def rows(run: Run) -> Iterable[Sequence[str]]:
        keys = {key for row in run.rows for key in row}
        counted = (key.split("/") for key in keys if key.startswith("verify/"))
        for name in sorted(parts[1] for parts in counted if parts[2:] == ["count"]):
            of = [row for row in run.rows if row.get(f"verify/{name}/count")]
            count, timeouts, errors = (
                sum(row.get(f"verify/{name}/{part}") or 0 for row in of)
                for part in ("count", "timeouts", "errors")
            )
            middle = sorted(row.get(f"time/verify_{name}_p50_s") or 0.0 for row in of)
            slowest = max((row.get(f"time/verify_{name}_p99_s") or 0.0 for row in of), default=0.0)
            median = middle[len(middle) // 2]
            yield name, f"{count:,}", f"{median:.4f}", f"{slowest:.3f}", str(timeouts), str(errors)

    headings = ("verifier", "verdicts", "seconds, median", "worst p99 of a step", "timeouts")
    return _table(runs, (*headings, "faults"), rows)


def settings(runs: Sequence[Run]) -> str:
    """The settings that matter most, or those that differ between runs; and all, folded away."""
    flat = {run.name: _flat(run.config) for run in runs}
    keys = [key for key in SETTINGS if key in flat[runs[0].name]]
    if len(runs) > 1:
        keys = sorted({key for values in flat.values() for key in values})
        keys = [k for k in keys if len({repr(values.get(k)) for values in flat.values()}) > 1]
        differing = _table(
            runs,
            ("differing setting", "value"),
            lambda run: [(key, flat[run.name].get(key, "")) for key in keys],
        )
        body = differing if keys else "<p>All settings are the same.</p>"
    else:
        facts = ((key, flat[runs[0].name][key]) for key in keys)
        body = f"<dl>{''.join(f'<div><dt>{k}</dt><dd>{text(v)}</dd></div>' for k, v in facts)}</dl>"
    for run in runs:
        every = text(json.dumps(run.config, indent=1))
        name = f" of {text(run.name)}" if len(runs) > 1 else ""
        body += f"<details><summary>all settings{name}</summary><pre>{every}</pre></details>"
    return f'<div class="card">{body}</div>' if any(flat.values()) else ""


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if isinstance(config, list) and config and isinstance(config[0], dict):
        config = {str(i): value for i, value in enumerate(config)}
    if not isinstance(config, dict):
        return {name: config}
    dot = name + "." if name else ""
    return {k: v for key, value in config.items() for k, v in _flat(value, dot + key).items()}


# --- responses -----------------------------------------------------------------------------------


def spread(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All samples, so ordered that any first part is spread over steps, domains and scores.

    The samples of a domain and a kind of score (none, partial, full) are taken in bit-reversed
    order from the newest on: each next one halves the widest gap. The cells take turns.
    """
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for sample in reversed(samples):
        score = sample.get("score") or 0.0
        cell = (str(sample.get("domain")), (score > 0) + (score >= 1))
        cells.setdefault(cell, []).append(sample)
    ranked = []
    for cell in cells.values():
        bits = max(1, (len(cell) - 1).bit_length())
        order = sorted(range(len(cell)), key=lambda i: f"{i:0{bits}b}"[::-1])
        ranked += [(rank, cell[index]) for rank, index in enumerate(order)]
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])]


def sample_browser(runs: Sequence[Run]) -> str:
    """Responses with their verdicts, newest first, and the form that filters them."""
    parts, domains, total = [], set(), sum(len(run.samples) for run in runs)
    for run in runs:
        left = SAMPLE_BYTES // len(runs)
        for sample in spread(run.samples)[: MAX_SAMPLES // len(runs)]:
            html = _sample(sample, run, len(runs) > 1)
            left -= len(html.encode("utf-8", errors="replace"))
            if left < 0:
                break
            domains.add(str(sample.get("domain", "")))
            parts.append((-sample.get("step", 0), html))
    if not parts:
        return ""
    fields = {"domain": {name: name for name in sorted(domains)}}
    fields["score"] = {"full": "1", "part": "between 0 and 1", "none": "0"}
    if len(runs) > 1:
        fields["run"] = {run.name: run.name for run in runs}
    form = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{text(v)}">{text(t)}</option>' for v, t in options.items())
        + "</select></label>"
        for name, options in fields.items()
    )
    form += "".join(
        f'<label>{word} <input name="{name}" type="number" min="0"></label>'
        for word, name in (("from step", "first"), ("to step", "last"))
    )
    form = f'<form id="filters" hidden>{form}<button type="reset">show all</button>'
    chosen = (
        f"{len(parts)} of the {total} recorded responses, spread over steps, domains and scores"
    )
    chosen = f"All {total} recorded responses" if len(parts) == total else chosen
    listed = "".join(html for _, html in sorted(parts, key=lambda part: part[0]))
    return (
        f"<p>{chosen}, newest first; samples.jsonl in the workdir has them in full.</p>"
        f'<div class="card">{form}<span id="shown"></span></form><div id="samples">{listed}</div>'
        "</div>"
    )


def _sample(sample: Mapping[str, Any], run: Run, named: bool) -> str:
    score = sample.get("score") or 0.0
    style = "good" if score >= 1 else "bad" if score <= 0 else "part"
    keys = ("step", "domain", "level", "status", "advantage")
    values = [(key, sample[key]) for key in keys if sample.get(key) is not None]
    facts = " · ".join(f"{k} {v:+.2f}" if type(v) is float else f"{k} {v}" for k, v in values)
    facts = f"{run.name} · {facts}" if named else facts
    facts += "" if sample.get("stopped", True) else " · not ended"
    data = {key: sample.get(key, "") for key in ("domain", "step")}
    data = "".join(f' data-{k}="{text(v)}"' for k, v in (data | {"run": run.name}).items())
    texts = [(key, str(sample[key])) for key in ("prompt", "response", "detail") if sample.get(key)]
    blocks = "".join(f"<b>{key}</b><pre>{text(value)}</pre>" for key, value in texts)
    head = f'<summary><b class="{style}">{score:.2f}</b> {text(facts)}</summary>'
    return f'<details{data} data-score="{score}">{head}{blocks}</details>'


def _clipped(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample without the middle of long texts."""
    half = MAX_CHARS // 2
    for key, value in sample.items():
        cut = len(value) - MAX_CHARS if isinstance(value, str) else 0
        if cut > 0:
            sample[key] = f"{value[:half]}\n[... {cut} characters ...]\n{value[-half:]}"
    return sample


# --- the page ------------------------------------------------------------------------------------


def last_timeline(run: Run) -> str:
    """When each phase of the last step with a timeline ran."""
    rows = [row for row in run.rows if row.get("timeline") and row.get("tokens/generated")]
    title = (
        "Timeline of step {}; workers: verification, from the first response to the last verdict"
    )
    return timeline(title.format(rows[-1]["step"]), rows[-1]["timeline"]) if rows else ""


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    sets = "".join(validation_chart(runs, name) for name in VALIDATION_SETS)
    times = phases_table(runs) if any(run.rows for run in runs) else ""
    times += last_timeline(runs[0]) if len(runs) == 1 else ""
    sections = {
        "Base to final": validation_table(runs),
        "Validation": _grid(sets),
        "Training": _grid(metric_charts(runs, TRAINING)),
        "Resets": resets_table(runs),
        "Speed, memory and verifiers": _grid(metric_charts(runs, MACHINE)),
        "Verifiers": verifiers_table(runs),
        "Where the time went": times,
        "Responses": sample_browser(runs),
        "Settings": settings(runs),
    }
    body = "".join(f"<h2>{title}</h2>{html}" for title, html in sections.items() if html)
    style, script = ((ASSETS / f"report.{end}").read_text("utf-8") for end in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    allowed = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    bands = ", bands are stages" if len(runs) == 1 else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        f"<title>{text(name)}: prolonged RL</title><style>{style}</style></head><body>"
        f"<h1>{text(name)}</h1>{overview(runs)}<p>Numbered dashed lines are resets{bands}; "
        "pointing at them, or at a dot, tells more. The numbers above a chart are the last ones.</p>"
        f"{body}<script>{script}</script></body></html>\n"
    )


def _grid(charts: str) -> str:
    return charts and f'<div class="grid">{charts}</div>'


def write_report(*workdirs: str | Path, out: Path | None = None) -> Path:
    """Writes the page of one or more runs, finished or not, and returns its path.

    Args:
      workdirs: of the runs.
      out: where to; by default report.html in the first workdir.

    Raises:
      ValueError: a directory has no metrics.jsonl.
    """
    paths = [Path(workdir) for workdir in workdirs]
    names = [path.resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    styles = [f"c{i % 5}" + " dashed" * (i >= 5) for i in range(len(paths))]
    runs = [read_workdir(*parts) for parts in zip(paths, names, styles, strict=True)]
    out = out if out is not None else paths[0] / "report.html"
    out.write_bytes(page(runs).encode("utf-8", errors="replace"))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prolong_jax.report")
    parser.add_argument(
        "workdir", type=Path, nargs="+", help="of one run, or of several to compare"
    )
    parser.add_argument("--out", type=Path, help="the page; report.html in the first workdir")
    try:
        args = parser.parse_args(argv)
        print(write_report(*args.workdir, out=args.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
