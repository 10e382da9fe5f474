"""Curves and bars of the report page, as SVG that needs nothing from outside."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from library.train.history import Point

WIDTH, HEIGHT = 720, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 28
COLOURS = 6
"""Classes c0 to c5 of the style sheet."""
HOVER_POINTS = 200
"""Points of a curve that the pointer can find."""


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    name: str
    points: Sequence[Point]
    band: bool = False
    """Whether the range of joined values is drawn behind it."""
    faint: bool = False


@dataclass(frozen=True)
class Scale:
    """Numbers to places on the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(lines: Sequence[Line], label: str, from_zero: bool = False) -> str:
    """Curves over the steps; `label` tells those who cannot see it what it is. Empty without a point.

    Rare values far above all others stick out at the top.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [point.step for line in lines for point in line.points]
    x = Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    low, high = value_range(lines)
    low = min(low, 0.0) if from_zero else low
    y_ticks = ticks(low, high)
    y = Scale(min(low, y_ticks[0]), max(high, y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    parts = [_grid(y_ticks, y), _steps(x)]
    for number, line in enumerate(lines):
        style = f"c{number % COLOURS}"
        if line.band and any(point.low < point.high for point in line.points):
            parts.append(f'<polygon class="band {style}" points="{_band(line.points, x, y)}"/>')
        faint = " faint" if line.faint else ""
        if len(line.points) == 1:
            point = line.points[0]
            parts.append(f'<circle class="dot {style}" cx="{x(point.step)}" cy="{y(point.mean)}" r="3"/>')
        path = " ".join(f"{x(point.step)},{max(y(point.mean), TOP)}" for point in line.points)
        parts.append(f'<polyline class="line {style}{faint}" points="{path}"/>')
    return _figure(lines, label, "".join(parts), x)


def bar_chart(bars: Sequence[tuple[str, float]], label: str) -> str:
    """Upright bars from 0, with the names of the first, the middle and the last below. Empty without a bar."""
    if not bars:
        return ""
    high = max(max(value for _, value in bars), 1e-12)
    y_ticks = ticks(0, high)
    y = Scale(0, max(high, y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    room = (WIDTH - LEFT - RIGHT) / len(bars)
    parts = [_grid(y_ticks, y)]
    for i, (name, value) in enumerate(bars):
        top = y(max(value, 0.0))
        place = f'x="{LEFT + i * room + room * 0.1:.1f}" y="{top}" width="{room * 0.8:.1f}"'
        parts.append(f'<rect class="bar" {place} height="{HEIGHT - BOTTOM - top:.1f}">')
        parts.append(f"<title>{escape(name)}: {number(value)}</title></rect>")
    named = range(len(bars)) if len(bars) <= 10 else {0, len(bars) // 2, len(bars) - 1}
    for i in named:
        anchor = "end" if i and i == len(bars) - 1 and len(bars) > 10 else "middle"
        place = f'x="{LEFT + (i + (1 if anchor == "end" else 0.5)) * room:.1f}" y="{HEIGHT - 8}"'
        parts.append(f'<text class="tick {anchor}" {place}>{escape(bars[i][0])}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def smoothed(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """The curve with each value replaced by the mean of its neighbours, `share` of all of them."""
    reach = max(2, int(len(points) * share / 2))
    sums = [0.0]
    for point in points:
        sums.append(sums[-1] + point.mean)
    result = []
    for i, point in enumerate(points):
        first, last = max(0, i - reach), min(len(points), i + reach + 1)
        mean = (sums[last] - sums[first]) / (last - first)
        result.append(Point(point.step, mean, mean, mean))
    return result


def value_range(lines: Sequence[Line]) -> tuple[float, float]:
    """From the lowest to the highest value of the curves; the top hundredth of a long curve may stick out."""
    values = sorted(point.mean for line in lines for point in line.points)
    low, high = values[0], values[-1]
    if len(values) >= 100 and values[-1] > 3 * (cap := values[int(len(values) * 0.99)]) > 0:
        high = cap * 1.5
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        margin = abs(high) * 0.5 or 1.0
        return (0.0, high + margin) if high > 0 else (low - margin, high + margin)
    return low, high


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, one less to three more than `about`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number in few characters."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(lines: Sequence[Line], label: str, inner: str, x: Scale) -> str:
    """The picture, a legend, and what the page's script needs to answer the pointer."""
    data = json.dumps(
        {
            "x": [x.low, x.high, x.start / WIDTH, x.end / WIDTH],
            "lines": [[line.name, [[p.step, float(f"{p.mean:.4g}")] for p in _thinned(line.points)]] for line in lines],
        },
        separators=(",", ":"),
        allow_nan=False,
    )
    legend = "".join(
        f'<span class="c{i % COLOURS}{" faint" if line.faint else ""}">{escape(line.name)}</span>'
        for i, line in enumerate(lines)
    )
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inner}{cursor}</svg>'
    return f'<div class="chart" data-chart="{escape(data)}">{svg}<p class="legend">{legend}<b></b></p></div>'


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    stride = -(-len(points) // HOVER_POINTS)
    return points if stride <= 1 else [*points[::stride], points[-1]]


def _grid(values: Sequence[float], y: Scale) -> str:
    parts = []
    for value in values:
        place = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{place + 4:.1f}">{number(value)}</text>')
    return "".join(parts)


def _steps(x: Scale) -> str:
    """Numbers of steps below, whole ones inside the range."""
    values = [value for value in ticks(x.low, x.high, 7) if x.low <= value <= x.high and value == int(value)]
    place = f'y="{HEIGHT - 8}"'
    return "".join(f'<text class="tick middle" x="{x(value)}" {place}>{value:,.0f}</text>' for value in values)


def _band(points: Sequence[Point], x: Scale, y: Scale) -> str:
    upper = [f"{x(point.step)},{max(y(point.high), TOP)}" for point in points]
    lower = [f"{x(point.step)},{y(max(point.low, y.low))}" for point in reversed(points)]
    return " ".join([*upper, *lower])
