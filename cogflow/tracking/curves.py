"""Draw curves as inline SVG. Colours come from the page's CSS variables, so that one picture serves light and dark."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cogflow.tracking.formatting import short
from cogflow.tracking.run_data import Points

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
"""Margins of a chart in pixels."""
MOST_POINTS = 300
"""Points that are drawn of one line."""
SMOOTH_FROM = 24
"""Lines of fewer points are not smoothed."""
DENSE = 50
"""The range of lines with fewer points includes all values; of others it leaves out the outermost percent."""

Point = tuple[int, float]
"""(step, value)."""


@dataclass(frozen=True)
class Line:
    """One curve. ``colour``: 1 to 4. ``dots``: mark each value, for a few values. ``smooth``: add a running mean."""

    label: str
    points: Points
    colour: int = 1
    dots: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class ChartSpec:
    """A chart to draw.

    ``width`` and ``height`` in pixels. ``reference``: a dashed line at each curve's first value. ``until``: the step
    that the axis reaches at least, so that charts of one run can be compared. ``least``: the smallest range of values,
    so that noise does not look like a fall.
    """

    title: str
    lines: Sequence[Line]
    width: int = 560
    height: int = 220
    note: str = ""
    reference: bool = False
    until: int | None = None
    least: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A drawn chart. ``legend``: label, colour and last value of each line."""

    title: str
    svg: str
    legend: list[tuple[str, int, str]]
    note: str = ""


@dataclass(frozen=True)
class _Axes:
    """Size of a chart in pixels, and the ranges of steps and values that it shows."""

    width: int
    height: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def at(self, step: float, value: float) -> tuple[float, float]:
        """Return the place of a point in pixels."""
        x = LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (self.width - LEFT - RIGHT)
        y = TOP + (self.y_high - value) / (self.y_high - self.y_low) * (self.height - TOP - BOTTOM)
        return round(x, 1), round(min(max(y, -1e4), 1e4), 1)


def draw_chart(spec: ChartSpec) -> Chart | None:
    """Draw the lines of ``spec`` over the step; None when no line has a finite value.

    The range leaves out the outermost percent of dense curves, so that one spike does not flatten the rest. Values that
    are not finite are marked at the bottom.
    """
    lines = [line for line in spec.lines if line.points]
    if not lines:
        return None
    axes, x_ticks, y_ticks = _choose_axes(spec, lines)
    clip = f"clip-{zlib.crc32(spec.title.encode()):08x}"
    frame_width, frame_height = spec.width - LEFT - RIGHT + 8, spec.height - TOP - BOTTOM + 8
    parts = _draw_axes(axes, x_ticks, y_ticks)
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT - 4}" y="{TOP - 4}" width="{frame_width}" height="{frame_height}"/>'
        f'</clipPath><g clip-path="url(#{clip})">'
    )
    hover = []
    for line in lines:
        if spec.reference:
            _, y = axes.at(*line.points.finite[0])
            parts.append(f'<line class="reference" x1="{LEFT}" x2="{spec.width - RIGHT}" y1="{y}" y2="{y}"/>')
        shown = _shown_points(line)
        parts += _draw_line(line, shown, axes)
        at = [[*axes.at(step, value), step, short(value)] for step, value in shown]
        hover.append({"label": line.label, "colour": line.colour, "at": at})
    parts.append("</g>")
    svg = (
        f'<svg class="chart" viewBox="0 0 {spec.width} {spec.height}" role="img" aria-label="{escape(spec.title)}" '
        f'data-points="{escape(json.dumps(hover, separators=(",", ":")))}">{"".join(parts)}</svg>'
    )
    legend = [(line.label, line.colour, short(_last_value(line))) for line in lines]
    return Chart(spec.title, svg, legend, spec.note)


def running_mean(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential mean over about ``span`` values. Weights sum to one from the first value on."""
    keep = 1.0 - 1.0 / max(1.0, span)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means


def smoothing_span(values: Sequence[float]) -> float:
    """Return the span of :func:`running_mean` for a curve of this length."""
    return max(5.0, len(values) / 30)


def _choose_axes(spec: ChartSpec, lines: Sequence[Line]) -> tuple[_Axes, list[float], list[float]]:
    """Return the axes, and the ticks of both."""
    first = min(line.points.steps[0] for line in lines)
    last = max(line.points.steps[-1] for line in lines)
    x_low = 0 if 0 < first <= 0.1 * last else first
    x_high = max(last, spec.until or 0, x_low + 1)
    y_low, y_high = _value_range(lines, spec.least)
    x_ticks = _ticks(x_low, x_high, 5, whole=True)
    y_ticks = _ticks(y_low, y_high, min(6, max(4, spec.height // 50)))
    if y_ticks:
        spacing = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 0.0
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1] + 0.02 * spacing)
    return _Axes(spec.width, spec.height, x_low, x_high, y_low, y_high), x_ticks, y_ticks


def _value_range(lines: Sequence[Line], least: float) -> tuple[float, float]:
    low, high = math.inf, -math.inf
    for line in lines:
        values = sorted(value for _, value in line.points.finite)
        cut = max(1, int(len(values) * 0.01)) if len(values) >= DENSE else 0
        low, high = min(low, values[cut]), max(high, values[-1 - cut])
    if high - low < least:
        middle = (high + low) / 2
        return middle - least / 2, middle + least / 2
    if high - low < 1e-12:
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    # A range that nearly reaches zero is extended to zero: the picture then shows how far down a loss is.
    if 0 < low < 0.35 * high:
        low = 0.0
    pad = 0.05 * (high - low)
    return (low if low == 0.0 else low - pad), high + pad


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _draw_axes(axes: _Axes, x_ticks: list[float], y_ticks: list[float]) -> list[str]:
    parts = []
    for tick in y_ticks:
        _, y = axes.at(0, tick)
        label = _tick_label(tick, y_ticks)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{axes.width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        x, _ = axes.at(tick, 0)
        parts.append(f'<text class="tick" x="{x}" y="{axes.height - 6}" text-anchor="middle">{int(tick)}</text>')
    return parts


def _tick_label(value: float, ticks: list[float]) -> str:
    """Return ``value`` with as many digits as make the labels differ."""
    spacing = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    if not 1e-5 < spacing < 1e4 or max(map(abs, ticks)) < 0.005:
        return short(round(value, 12))
    # 2.5e-5, the finest spacing that reaches this line, has six decimals.
    decimals = next(count for count in range(7) if abs(round(spacing, count) - spacing) < 1e-3 * spacing)
    return f"{value:.{decimals}f}".replace("-", "−") if round(value, 9) else "0"


def _is_smoothed(line: Line) -> bool:
    return line.smooth and len(line.points.finite) >= SMOOTH_FROM


def _last_value(line: Line) -> float:
    values = [value for _, value in line.points.finite]
    return running_mean(values, smoothing_span(values))[-1] if _is_smoothed(line) else values[-1]


def _shown_points(line: Line) -> list[Point]:
    """Return the points that hovering shows: the running mean of a smoothed line, the values of others."""
    finite = line.points.finite
    if not _is_smoothed(line):
        return _thin(finite)
    values = [value for _, value in finite]
    means = running_mean(values, smoothing_span(values))
    return _thin([(step, mean) for (step, _), mean in zip(finite, means, strict=True)])


def _draw_line(line: Line, shown: list[Point], axes: _Axes) -> list[str]:
    colour = f"s{line.colour}"
    if _is_smoothed(line):
        parts = [_path(run, axes, f"line raw {colour}") for run in _finite_runs(line.points, extremes=True)]
        parts.append(_path(shown, axes, f"line {colour}"))
    else:
        parts = [_path(run, axes, f"line {colour}") for run in _finite_runs(line.points)]
    if line.dots:
        places = (axes.at(*point) for point in shown)
        parts += [f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    for step, value in zip(line.points.steps, line.points.values, strict=True):
        if value is None:
            x, _ = axes.at(step, 0)
            cross = f"M{x - 3} {axes.height - BOTTOM - 6}l6 6m0 -6l-6 6"
            parts.append(f'<path class="broken" d="{cross}"><title>not finite at step {step}</title></path>')
    return parts


def _finite_runs(points: Points, *, extremes: bool = False) -> list[list[Point]]:
    """Return the finite points between gaps, thinned."""
    runs: list[list[Point]] = [[]]
    for step, value in zip(points.steps, points.values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [_thin(run, extremes=extremes) for run in runs if run]


def _thin(points: list[Point], *, extremes: bool = False) -> list[Point]:
    """Return at most about ``MOST_POINTS`` points. ``extremes``: keep the lowest and the highest of each span."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS) * (2 if extremes else 1)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        span = points[start : start + size]
        if extremes:
            kept += sorted({min(span, key=lambda point: point[1]), max(span, key=lambda point: point[1])})
        else:
            kept.append(span[-1])
    return kept


def _path(points: list[Point], axes: _Axes, classes: str) -> str:
    if len(points) == 1:
        x, y = axes.at(*points[0])
        return f'<circle class="dot {classes.split()[-1]}" cx="{x}" cy="{y}" r="2"/>'
    return f'<path class="{classes}" d="M{"L".join(f"{x} {y}" for x, y in (axes.at(*point) for point in points))}"/>'
