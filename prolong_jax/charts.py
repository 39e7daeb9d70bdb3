"""Charts over training steps as HTML with inline SVG; every text in them is escaped."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 50, 18, 28, 30  # of a chart and its margins
MAX_POINTS = 400  # of a line; of a longer one, the extremes of each stretch are drawn

Point = tuple[int, float | None]


@dataclass(frozen=True)
class Line:
    """A line of a chart: (step, value) with None for a gap; perhaps (step, low, high) around it."""

    label: str
    style: str
    points: Sequence[Point]
    ranges: Sequence[tuple[int, float, float]] = ()
    notes: Sequence[str] = ()  # on the points, which are dots then


@dataclass(frozen=True)
class Frame:
    """What all charts of a page show: the last step, stages and resets."""

    last: int
    bands: Sequence[tuple[str, int, int]] = ()  # name, first and last step
    marks: Sequence[tuple[int, str, str, str]] = ()  # step, number, style, what to say about it


def text(value: Any) -> str:
    """Any value as HTML text; NUL, which HTML cannot hold, as the replacement character."""
    return escape(str(value)).replace("\0", "\ufffd")


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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


def chart(title: str, lines: Sequence[Line], frame: Frame, share: bool) -> str:
    """A titled chart over the steps; "" where no line has a value.

    `share`: the axis runs from 0 to 1 at least.
    """
    known = [(line, [v for _, v in line.points if v is not None]) for line in lines]
    known = [(line, values) for line, values in known if values]
    if not known:
        return ""
    values = [v for _, values in known for v in values]
    values += [v for line in lines for _, *ends in line.ranges for v in ends]
    low, high = min(0.0, *values), max(1.0, *values) if share else 1.06 * max(0.0, *values)
    high = high if high > low else low + 1.0
    keys = "".join(
        f'<span class="{line.style}">{text(line.label)} {number(values[-1])}</span>'
        for line, values in known
    )
    drawn = "".join(_draw(line, frame.last, low, high) for line, _ in known)
    return (
        f'<div class="card"><h3>{text(title)}</h3><div class="keys">{keys}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">'
        f"{_axes(frame, low, high)}{drawn}{_marks(frame)}</svg></div>"
    )


def _axes(frame: Frame, low: float, high: float) -> str:
    """Stage bands, grid, axis labels."""
    bottom, parts, labels = HEIGHT - BOTTOM, [], []
    for number, (name, first, last) in enumerate(frame.bands, 1):
        x, end = x_of(first - 1, frame.last), x_of(last, frame.last)
        note = f"<title>stage {number}: {text(name)}, steps {first} to {last}</title>"
        place = f'x="{x:.1f}" y="{TOP}" width="{end - x:.1f}" height="{bottom - TOP}"'
        parts.append(f'<rect class="band" {place}>{note}</rect>')
        label = text(name if 6.8 * len(name) < end - x else str(number))
        labels.append(f'<text x="{(x + end) / 2:.1f}" y="{TOP - 5}">{label}{note}</text>')
    for value in ticks(low, high):
        y = y_of(value, low, high)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        labels.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.4g}</text>')
    for step in (s for s in ticks(0, frame.last, 5) if s == int(s)):
        place = f'x="{x_of(step, frame.last):.1f}" y="{bottom + 15}"'
        labels.append(f'<text class="tick" {place}>{step:g}</text>')
    labels.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}">step</text>')
    return f"<g>{''.join(parts)}</g>{''.join(labels)}"


def _marks(frame: Frame) -> str:
    """A dashed line for every reset, numbered where there is room, with a tooltip."""
    parts, taken = [], -math.inf
    for step, number, style, note in sorted(frame.marks):
        x = x_of(step, frame.last)
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        label = f'<text class="no" x="{x:.1f}" y="11">{number}</text>' if x - taken > 13 else ""
        taken = x if label else taken
        parts.append(
            f'<g class="{style}"><title>{text(note)}</title><line class="reset" '
            f'data-step="{step}" {ends}/><line class="reach" {ends}/>{label}</g>'
        )
    return "".join(parts)


def _thinned(points: Sequence[Point]) -> Iterator[Point]:
    """The points, or the least and the greatest of each stretch where there are too many."""
    size = -(-2 * len(points) // MAX_POINTS)
    if len(points) <= MAX_POINTS:
        yield from points
        return
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = sorted((v, s) for s, v in stretch if v is not None)
        yield from sorted({(s, v) for v, s in (known[0], known[-1])}) if known else stretch[:1]


def _draw(line: Line, last: int, low: float, high: float) -> str:
    """The path of a line, its band and its dots."""

    def at(step: float, value: float) -> str:
        return f"{x_of(step, last):.1f} {y_of(value, low, high):.1f}"

    path, pen, dots = "", "M", ""
    for step, value in _thinned(line.points):
        path += "" if value is None else pen + at(step, value)
        pen = "M" if value is None else "L"
    edge = [(s, hi) for s, _, hi in line.ranges] + [(s, lo) for s, lo, _ in line.ranges[::-1]]
    band = f'<polygon class="range" points="{" ".join(at(*e) for e in edge)}"/>' if edge else ""
    for (step, value), note in zip(line.points, line.notes, strict=False):
        x, y = at(step, value or 0.0).split()
        dots += f'<circle cx="{x}" cy="{y}" r="2.5"><title>{text(note)}</title></circle>'
    return f'<g class="{line.style}">{band}<path class="curve" d="{path}"/>{dots}</g>'


def timeline(title: str, spans: Sequence[tuple[str, float, float]]) -> str:
    """Stretches of time (name, from, to) in seconds; each name has a line of its own."""
    end = max(stop for *_, stop in spans) or 1.0
    names = list(dict.fromkeys(name for name, *_ in spans))
    height, scale = 22 * len(names) + 24, (WIDTH - 90 - RIGHT) / end
    parts = []
    for line, name in enumerate(names):
        y = 22 * line + 4
        parts.append(f'<text class="y" x="84" y="{y + 13}">{text(name)}</text>')
        for _, start, stop in (span for span in spans if span[0] == name):
            place = f'x="{90 + scale * start:.1f}" width="{max(1.0, scale * (stop - start)):.1f}"'
            note = f"<title>{text(name)}: {start:.2f} to {stop:.2f} s</title>"
            parts.append(f'<rect class="span" {place} y="{y}" height="16">{note}</rect>')
    for value in ticks(0.0, end):
        x = 90 + scale * value
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 4}">{value:g} s</text>')
    return (
        f'<div class="card"><h3>{text(title)}</h3><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="timeline of a step">{"".join(parts)}</svg></div>'
    )
