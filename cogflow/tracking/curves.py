"""Curves as inline SVG. Colours come from the page's CSS variables, so that one picture serves light and dark."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from cogflow.tracking.run_data import Points

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
MOST_POINTS = 300
Place = Callable[[float, float], tuple[float, float]]
"""(step, value) -> (x, y) inside the picture."""
SMOOTH_FROM = 24  # fewer points than this are drawn as they are


@dataclass(frozen=True)
class Line:
    """One curve of a chart. ``colour`` is 1..4; ``dots`` marks each value (few, such as validations); ``smooth`` adds a running mean."""

    label: str
    points: Points
    colour: int = 1
    dots: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    svg: str
    legend: list[tuple[str, int, str]]  # label, colour, last value
    note: str = ""


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    width: int = 560,
    height: int = 220,
    note: str = "",
    reference: bool = False,
    until: int | None = None,
    least: float = 0.0,
) -> Chart | None:
    """Draw ``lines`` over the step; ``None`` when none holds a finite value.

    The range leaves out the outermost percent of dense curves, so that one spike does not flatten the rest. Values that are
    not finite are marked at the bottom. ``reference``: a dashed line at each curve's first value. ``until``: the
    step to which the axis runs at least, so that charts of one run can be compared. ``least``: the range of
    values is at least this wide, so that noise does not look like a fall.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    x_low = min(line.points.steps[0] for line in lines)
    x_low = 0 if 0 < x_low <= 0.1 * max(line.points.steps[-1] for line in lines) else x_low
    x_high = max(*(line.points.steps[-1] for line in lines), until or 0, x_low + 1)
    y_low, y_high = _range(lines, least)
    x_ticks, y_ticks = _ticks(x_low, x_high, 5, whole=True), _ticks(y_low, y_high, min(6, max(4, height // 50)))
    if y_ticks:
        spacing = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 0.0
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1] + 0.02 * spacing)

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)
        y = TOP + (y_high - value) / (y_high - y_low) * (height - TOP - BOTTOM)
        return round(x, 1), round(min(max(y, -1e4), 1e4), 1)

    parts, hover = _axes(x_ticks, y_ticks, at, width, height), []
    clip = f"clip-{zlib.crc32(title.encode()):08x}"
    frame = f'x="{LEFT - 4}" y="{TOP - 4}" width="{width - LEFT - RIGHT + 8}" height="{height - TOP - BOTTOM + 8}"'
    parts.append(f'<clipPath id="{clip}"><rect {frame}/></clipPath>')
    parts.append(f'<g clip-path="url(#{clip})">')
    for line in lines:
        drawn, shown = _draw(line, at, height)
        if reference:
            _, y = at(*line.points.finite[0])
            parts.append(f'<line class="reference" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts += drawn
        hover.append(
            {
                "label": line.label,
                "colour": line.colour,
                "at": [[*at(step, value), step, short(value)] for step, value in shown],
            }
        )
    parts.append("</g>")
    svg = (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'data-points="{escape(json.dumps(hover, separators=(",", ":")))}">{"".join(parts)}</svg>'
    )
    legend = [(line.label, line.colour, short(_settled(line))) for line in lines]
    return Chart(title, svg, legend, note)


def running_mean(values: Sequence[float], span: float) -> list[float]:
    """Exponential mean over about ``span`` values, without the pull towards the first one that a plain start has."""
    keep, total, weight, means = 1.0 - 1.0 / max(1.0, span), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means


def short(value: float) -> str:
    """Three significant digits, as one writes them: 0.123, 12.3, 4e-4, 1.5e6."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _settled(line: Line) -> float:
    values = [value for _, value in line.points.finite]
    return running_mean(values, _span(values))[-1] if line.smooth and len(values) >= SMOOTH_FROM else values[-1]


def _span(values: Sequence[float]) -> float:
    return max(5.0, len(values) / 30)


def _range(lines: Sequence[Line], least: float) -> tuple[float, float]:
    low, high = math.inf, -math.inf
    for line in lines:
        values = sorted(value for _, value in line.points.finite)
        cut = int(len(values) * 0.01) if len(values) >= 50 else 0
        if len(values) >= 50:
            cut = max(1, cut)
        low, high = min(low, values[cut]), max(high, values[-1 - cut])
    if high - low < least:
        middle = (high + low) / 2
        return middle - least / 2, middle + least / 2
    if high - low < 1e-12:
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    # A range that nearly reaches zero goes all the way: how far down a loss is can then be seen.
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


def _axes(x_ticks: list[float], y_ticks: list[float], at: Place, width: int, height: int) -> list[str]:
    parts = []
    for tick in y_ticks:
        _, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5}" text-anchor="end">{_tick(tick, y_ticks)}</text>')
    for tick in x_ticks:
        x, _ = at(tick, 0)
        parts.append(f'<text class="tick" x="{x}" y="{height - 6}" text-anchor="middle">{int(tick)}</text>')
    return parts


def _tick(value: float, ticks: list[float]) -> str:
    """``value`` with as many digits as tell the ticks apart."""
    spacing = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    if not 1e-5 < spacing < 1e4 or max(map(abs, ticks)) < 0.005:
        return short(round(value, 12))
    # 2.5e-5, the finest spacing that comes here, has six decimals.
    decimals = next(count for count in range(7) if abs(round(spacing, count) - spacing) < 1e-3 * spacing)
    return f"{value:.{decimals}f}".replace("-", "−") if round(value, 9) else "0"


def _draw(line: Line, at: Place, height: int) -> tuple[list[str], list[tuple[int, float]]]:
    """The SVG of one line, and the points that hovering tells."""
    finite = line.points.finite
    parts = []
    shown = finite
    if line.smooth and len(finite) >= SMOOTH_FROM:
        parts += [_path(run, at, f"line raw s{line.colour}") for run in _runs(line.points, extremes=True)]
        means = running_mean([value for _, value in finite], _span([value for _, value in finite]))
        shown = _thin([(step, mean) for (step, _), mean in zip(finite, means, strict=True)])
        parts.append(_path(shown, at, f"line s{line.colour}"))
    else:
        shown = _thin(finite)
        parts += [_path(run, at, f"line s{line.colour}") for run in _runs(line.points)]
    if line.dots:
        parts += [
            f'<circle class="dot s{line.colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in (at(*point) for point in shown)
        ]
    for step, value in zip(line.points.steps, line.points.values, strict=True):
        if value is None:
            x, _ = at(step, 0)
            parts.append(
                f'<path class="broken" d="M{x - 3} {height - BOTTOM - 6}l6 6m0 -6l-6 6"><title>not finite at step {step}</title></path>'
            )
    return parts, shown


def _runs(points: Points, *, extremes: bool = False) -> list[list[tuple[int, float]]]:
    """The finite points between gaps, thinned."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(points.steps, points.values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [_thin(run, extremes=extremes) for run in runs if run]


def _thin(points: list[tuple[int, float]], *, extremes: bool = False) -> list[tuple[int, float]]:
    """At most about ``MOST_POINTS`` points; with ``extremes`` the lowest and highest of each stretch stay."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS) * (2 if extremes else 1)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        if extremes:
            kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
        else:
            kept.append(stretch[-1])
    return kept


def _path(points: list[tuple[int, float]], at: Place, classes: str) -> str:
    if len(points) == 1:
        x, y = at(*points[0])
        return f'<circle class="dot {classes.split()[-1]}" cx="{x}" cy="{y}" r="2"/>'
    return f'<path class="{classes}" d="M{"L".join(f"{x} {y}" for x, y in (at(*point) for point in points))}"/>'
