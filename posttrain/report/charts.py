"""The report's plots: what a chart shows, and how it is drawn as inline SVG that follows the page's theme.

A chart is data only. The SVG names its colours as classes (`s0`, `s1`, ...); the page's style sheet gives each of them a
colour for light and one for dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

NUM_COLORS = 8  # classes s0 to s7 of the page's style sheet; its colours differ in lightness as well as in hue
SMOOTH_ABOVE = 40  # logged points from which a curve gets a running mean
PERCENT_STEPS = (0.05, 0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True)
class Point:
    """y at x, with an interval where there is one. On a category axis x is the category's index."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    label: str
    points: tuple[Point, ...]
    color: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """`bars`: one bar for each category, a second series drawn inside it. `dots`: categories with intervals, joined.
    `lines`: numeric x, a band where points have an interval.
    """

    name: str
    title: str
    kind: Literal["bars", "dots", "lines"]
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    x_label: str = ""
    percent: bool = False
    note: str = ""


# ---- scales ----


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def share_ticks(high: float) -> list[float]:
    """0 to the smallest round share above `high`."""
    top = next(step for step in PERCENT_STEPS if high <= step)
    parts = 5 if top in (0.05, 0.25, 0.5, 1.0) else 4 if top != 0.6 else 3
    return [round(top * i / parts, 6) for i in range(parts + 1)]


def y_ticks(chart: Chart) -> list[float]:
    values = [v for s in chart.series for p in s.points for v in (p.y, p.low, p.high) if v is not None]
    if chart.percent and max(values) <= 1:
        return share_ticks(max(values))
    low, high = min(values), max(values)
    if low == high:
        return ticks(min(0.0, low), max(0.0, high))
    return ticks(min(0.0, low) if low < 0.35 * high else low, high)


def number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.4g} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def value(measured: float, percent: bool = False) -> str:
    """As the table prints it, trailing zeros and all."""
    return f"{100 * measured:.2f} %" if percent else number(round(measured, 4))


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Centred mean over a twentieth of the points, so that noisy curves can be read."""
    reach = max(1, len(points) // 40)
    windows = ((p, points[max(0, i - reach) : i + reach + 1]) for i, p in enumerate(points))
    return [Point(p.x, sum(q.y for q in window) / len(window)) for p, window in windows]


# ---- SVG ----


def svg(chart: Chart) -> str:
    """The chart as an <svg> element without any colour, script or style attribute of its own."""
    draw = {"bars": _bars, "dots": _dots, "lines": _lines}[chart.kind]
    width, height, body = draw(chart)
    return (
        f'<svg class="chart {chart.kind}" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(chart.title)}">{"".join(body)}</svg>'
    )


def _bars(chart: Chart) -> tuple[int, int, list[str]]:
    width, row = 440, 46
    height = row * len(chart.categories) + 22
    grid = y_ticks(chart)
    scale = width / grid[-1]
    body = [_line(t * scale, 0, t * scale, height - 20, "grid") for t in grid[1:-1]]
    body += [_axis_label(t * scale, height - 6, number(t, chart.percent), width) for t in grid]
    outer, *inner = chart.series
    for i, (label, point) in enumerate(zip(chart.categories, outer.points, strict=True)):
        top = i * row + 18
        parts = [_text(0, top - 5, _shorten(label, 48), "label")]
        parts += [_text(width, top - 5, value(point.y, chart.percent), "value", "end")]
        parts += [_rect(0, top, width, 14, "track"), _rect(0, top, point.y * scale, 14, "bar")]
        parts += [_rect(0, top + 4.5, s.points[i].y * scale, 5, "inner") for s in inner]
        parts += _whisker_across(point, scale, top + 7)
        body.append(_group(i, parts, _describe(chart, label, [(s.label, s.points[i]) for s in chart.series])))
    return width, height, body


def _dots(chart: Chart) -> tuple[int, int, list[str]]:
    width, height, left, right, top, bottom = 440, 250, 40, 6, 8, 34
    grid = y_ticks(chart)
    slot = (width - left - right) / len(chart.categories)
    plot = height - top - bottom

    def y(value: float) -> float:
        return top + plot * (1 - (value - grid[0]) / (grid[-1] - grid[0]))

    body = _y_axis(grid, y, left, width - right, chart.percent)
    for i, category in enumerate(chart.categories):
        body.append(_text(left + slot * (i + 0.5), height - 19, category, "tick", "middle"))
    body.append(_text(left + (width - left - right) / 2, height - 4, chart.x_label, "tick", "middle"))
    dodge = min(9.0, 0.7 * slot / max(1, len(chart.series)))
    for j, series in enumerate(chart.series):
        shift = (j - (len(chart.series) - 1) / 2) * dodge
        places = [(left + slot * (p.x + 0.5) + shift, p) for p in series.points]
        parts = [_path([(x, y(p.y)) for x, p in places], "join")]
        for x, p in places:
            whisker = "" if p.low is None or p.high is None else _line(x, y(p.low), x, y(p.high), "whisker")
            note = _describe(chart, chart.categories[int(p.x)], [(series.label, p)])
            parts.append(f'<g>{whisker}<circle cx="{x:.1f}" cy="{y(p.y):.1f}" r="3.2"/>{note}</g>')
        body.append(_group(series.color, parts))
    return width, height, body


def _lines(chart: Chart) -> tuple[int, int, list[str]]:
    width, height, left, right, top, bottom = PLOT
    grid = y_ticks(chart)
    xs = [p.x for s in chart.series for p in s.points]
    first, last = min(xs), max(xs)

    def x(value: float) -> float:
        share = (value - first) / (last - first) if last > first else 0.5
        return left + (width - left - right) * share

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - grid[0]) / (grid[-1] - grid[0]))

    body = _y_axis(grid, y, left, width - right, chart.percent)
    marks = [t for t in ticks(first, last) if first <= t <= last and t == int(t)] or [first]
    body += [_text(x(t), height - 5, number(t), "tick", "middle") for t in marks]
    body.append(_text(left - 6, height - 5, chart.x_label, "tick", "end"))
    for series in chart.series:
        body.append(_group(series.color, list(_curve(series, x, y))))
    return width, height, body


PLOT = (360, 170, 44, 8, 8, 22)  # width, height, and the margins left, right, top, bottom of a `lines` chart


def _curve(series: Series, x: Any, y: Any) -> Iterator[str]:
    banded = [p for p in series.points if p.low is not None and p.high is not None]
    if len(banded) > 1:
        edge = [(x(p.x), y(p.high)) for p in banded] + [(x(p.x), y(p.low)) for p in reversed(banded)]
        yield _path(edge, "band", closed=True)
    places = [(x(p.x), y(p.y)) for p in series.points]
    if len(series.points) > SMOOTH_ABOVE:
        yield _path(places, "raw")
        yield _path([(x(p.x), y(p.y)) for p in running_mean(series.points)], "curve")
    else:
        yield _path(places, "curve")
    if len(series.points) <= 12:  # few logged points: show where they are
        yield from (f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in places)


def _y_axis(grid: Sequence[float], y: Any, left: float, right: float, percent: bool) -> list[str]:
    lines = [_line(left, y(t), right, y(t), "grid" if t else "grid zero") for t in grid]
    return lines + [_text(left - 6, y(t) + 3.5, number(t, percent), "tick", "end") for t in grid]


def _whisker_across(point: Point, scale: float, y: float) -> list[str]:
    if point.low is None or point.high is None:
        return []
    low, high = point.low * scale, point.high * scale
    ends = (_line(x, y - 4, x, y + 4, "whisker") for x in (low, high))
    return [_line(low, y, high, y, "whisker"), *ends]


def _axis_label(x: float, y: float, text: str, width: float) -> str:
    anchor = "start" if x == 0 else "end" if x >= width - 1 else "middle"
    return _text(x, y, text, "tick", anchor)


def _describe(chart: Chart, where: str, values: Iterable[tuple[str, Point]]) -> str:
    lines = [where]
    for label, p in values:
        interval = ""
        if p.low is not None and p.high is not None:
            bounds = (value(bound, chart.percent) for bound in (p.low, p.high))
            interval = f" (95 % interval {' to '.join(bounds)})"
        lines.append(f"{label}: {value(p.y, chart.percent)}{interval}")
    return f"<title>{escape(chr(10).join(lines))}</title>"


def _group(color: int, parts: Sequence[str], title: str = "") -> str:
    return f'<g class="s{color % NUM_COLORS}">{title}{"".join(parts)}</g>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="2"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(places: Sequence[tuple[float, float]], kind: str, closed: bool = False) -> str:
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path class="{kind}" d="M{steps}{"Z" if closed else ""}"/>'


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
