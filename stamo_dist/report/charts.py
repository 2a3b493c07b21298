"""Line charts as inline SVG. Colours are the page's CSS variables, so a chart follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 18, 10, 24
_POINTS = 300  # points per line; more are averaged in equal groups
_MARKED = 40  # lines with at most this many points are marked
COLOURS = 8  # --c0 … --c7 on the page


@dataclass(frozen=True)
class Series:
    """One line: `x` ascending, `y` of the same length; points that are not finite are left out.

    `low` and `high`: an interval around each point, drawn as a band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_chart(
    series: Sequence[Series],
    *,
    smooth: bool = True,
    zero: bool = False,
    within: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
) -> Markup:
    """An SVG with one line per series, in the order of the page's colours, and a legend when there are several.

    `smooth` draws an exponential average and, of a single series, the values behind it. `zero`: the y axis starts at 0.
    `within`: range of the y axis; then few points are marked. `marks`: x of vertical lines. Empty if no series has a
    point.
    """
    drawn = [(s.label, grouped(s)) for s in series]
    points = [p for _, line in drawn for p in line]
    if not points:
        return Markup("")
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = within or _range([p[1] for p in points], zero)

    def place(x: float, y: float) -> str:
        px = _LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - _LEFT - _RIGHT)
        py = HEIGHT - _BOTTOM - (min(max(y, y0), y1) - y0) / ((y1 - y0) or 1) * (HEIGHT - _TOP - _BOTTOM)
        return f"{px:.1f},{py:.1f}"

    parts = []
    for tick in ticks(y0, y1, 5):
        y = place(x0, tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{tick:,g}</text>')
    for tick in ticks(x0, x1, 5):
        x = place(tick, y0).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 7}" text-anchor="middle">{tick:,g}</text>')
    for x in (place(mark, y0).split(",")[0] for mark in marks if x0 <= mark <= x1):
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    for i, (_, line) in enumerate(drawn):
        colour = f"stroke:var(--c{i % COLOURS})"
        if series[i].low:
            up, down = (list(zip(series[i].x, edge, strict=True)) for edge in (series[i].high, series[i].low))
            path = " ".join(place(*p) for p in [*up, *reversed(down)])
            parts.append(f'<polygon class="band" style="fill:var(--c{i % COLOURS})" points="{path}"/>')
        if within and len(line) <= _MARKED:
            spots = [place(*p).split(",") for p in line]
            dots = (f'<circle cx="{x}" cy="{y}" r="3" style="fill:var(--c{i % COLOURS})"/>' for x, y in spots)
            parts.append("".join(dots))
        if smooth and len(drawn) == 1:
            path = " ".join(place(*p) for p in line)
            parts.append(f'<polyline class="raw" style="{colour}" points="{path}"/>')
        path = " ".join(place(*p) for p in (averaged(line) if smooth else line))
        parts.append(f'<polyline style="{colour}" points="{path}"/>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    keys = "".join(
        f'<span><i style="background:var(--c{i % COLOURS})"></i>{escape(s.label)}</span>' for i, s in enumerate(series)
    )
    return Markup(svg + (f'<div class="legend">{keys}</div>' if len(series) > 1 else ""))


def grouped(series: Series) -> list[tuple[float, float]]:
    """At most _POINTS finite points; more are averaged in equal groups."""
    points = [p for p in zip(series.x, series.y, strict=True) if math.isfinite(p[1])]
    size = -(-len(points) // _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def averaged(points: Sequence[tuple[float, float]], decay: float = 0.85) -> list[tuple[float, float]]:
    """Exponential average without the bias of its start (as Adam corrects its moments)."""
    mean, weight, out = 0.0, 0.0, []
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        out.append((x, mean / weight))
    return out


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float], zero: bool) -> tuple[float, float]:
    """Low and high of the axis; the highest 1 % may be cut off, so that a spike does not flatten the rest."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)]
    if zero:
        low = min(0.0, low)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if zero else low - margin), high + margin
