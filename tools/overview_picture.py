"""Draw a picture of a run for a README: ``python -m tools.overview_picture RUN OUT.png``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from cogflow.errors import DataError, UserError
from cogflow.tracking.contact_sheet import enlarge, pick
from cogflow.tracking.curves import SMOOTH_FROM, running_mean, smoothing_span
from cogflow.tracking.run_data import RunData, ValidationFolder, ValidationSample, read_run

PROMPTS = 4
FRAMES = 3
INK, SOFT, LINE = "#1d1e20", "#66686d", "#e4e4df"
BLUE, ORANGE, GREEN, PURPLE = "#2a63d4", "#d0661b", "#14857a", "#9a3fb3"

DOTTED: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 3}


def draw_overview(folder: Path, output: Path) -> Path:
    """Draw the run in ``folder`` to ``output`` (PNG) and return the path.

    Left: up to four prompts, each with frames of its first and its last validation sample, every pixel enlarged to a
    sharp square. Right: the loss over the steps, and below it the sharpness of the samples. Raises :class:`DataError`
    when the run has no validation samples.
    """
    run = read_run(folder)
    pairs = _pairs(run)
    if not pairs:
        raise DataError(
            f"{folder} holds no validation samples to draw",
            "a run has them in samples/step-*/ when stage.sample_every is not 0",
        )
    first, last = run.validations[0], run.validations[-1]
    height = max(3.6, 0.62 + 1.22 * len(pairs))
    figure = Figure(figsize=(13.0, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    areas: Any = figure.subfigures(1, 2, width_ratios=(2.05, 1.0), wspace=0.0)
    _draw_frames(areas[0], pairs, first, last)
    _draw_curves(areas[1], run)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png", facecolor="white")
    return output


def _pairs(run: RunData) -> list[tuple[ValidationSample, ValidationSample]]:
    """Return samples of the same prompt at the first and at the last validation, spread over the prompts."""
    if not run.validations:
        return []
    first, last = run.validations[0], run.validations[-1]
    keys = [
        key
        for key, sample in last.samples.items()
        if sample.video and key in first.samples and first.samples[key].video
    ]
    return [(first.samples[keys[index]], last.samples[keys[index]]) for index in pick(len(keys), PROMPTS)]


def _draw_frames(
    area: SubFigure,
    pairs: list[tuple[ValidationSample, ValidationSample]],
    first: ValidationFolder,
    last: ValidationFolder,
) -> None:
    alone = first is last
    columns = FRAMES if alone else 2 * FRAMES
    axes = area.subplots(len(pairs), columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.30})
    area.subplots_adjust(left=0.012, right=0.985, top=1 - 0.52 / area.bbox.height * 150, bottom=0.02)
    for row, (before, after) in zip(axes, pairs, strict=True):
        cells = [after] if alone else [before, after]
        for block, sample in enumerate(cells):
            frames = _read_frames(sample)
            for slot in range(FRAMES):
                axis = row[block * FRAMES + slot]
                axis.axis("off")
                chosen = pick(len(frames), FRAMES)
                if slot < len(chosen):
                    frame = frames[chosen[slot]]
                    axis.imshow(
                        enlarge(frame, max(1, round(384 / frame.shape[1]))),
                        interpolation="nearest" if frame.shape[1] < 384 else "antialiased",
                    )
                if block == len(cells) - 1 and slot == FRAMES - 1 and not alone:
                    # The gap between the two validations is wider than between frames.
                    for other in row[FRAMES:]:
                        box = other.get_position()
                        other.set_position((box.x0 + 0.008, box.y0, box.width, box.height))
        row[0].set_title(after.text, loc="left", fontsize=9, color=INK, pad=3)
    for block, validation in enumerate([last] if alone else [first, last]):
        box = axes[0][block * FRAMES].get_position()
        label = f"step {validation.step}" + (" (before training)" if validation.step == 0 else "")
        area.text(box.x0, 1 - 0.10 / area.bbox.height * 150, label, fontsize=11, fontweight="bold", color=INK, va="top")


def _read_frames(sample: ValidationSample) -> list[np.ndarray]:
    if sample.video is None:
        return []
    with av.open(str(sample.video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _draw_curves(area: SubFigure, run: RunData) -> None:
    above, below = area.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.28})
    area.subplots_adjust(
        left=0.165, right=0.97, top=1 - 0.42 / area.bbox.height * 150, bottom=0.52 / area.bbox.height * 150
    )
    loss, heldout = run.curve("train/loss").finite, run.curve("heldout/loss").finite
    if loss:
        steps, values = [step for step, _ in loss], [value for _, value in loss]
        dense = len(values) >= SMOOTH_FROM
        if dense:
            above.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        above.plot(
            steps,
            running_mean(values, smoothing_span(values)) if dense else values,
            color=BLUE,
            linewidth=1.6,
            label="training",
        )
        above.set_ylim(0, 1.08 * float(np.quantile(values + [value for _, value in heldout], 0.995)))
    if heldout:
        above.plot(*zip(*heldout, strict=True), color=ORANGE, label="held out", **DOTTED)
    _style(above, "Loss")
    if above.lines:
        above.legend(frameon=False, fontsize=8.5, loc="upper right", labelcolor=INK)
    _style(below, "Sharpness of the samples, compared with the first")
    # Both curves are natural logarithms of a ratio. The wavelet ratio already is one.
    wavelet, blur = run.curve("sharpness/wavelet_ratio").finite, run.curve("sharpness/blur_effect").finite
    if wavelet:
        below.plot(
            [step for step, _ in wavelet],
            [value - wavelet[0][1] for _, value in wavelet],
            color=GREEN,
            label="wavelet ratio",
            **DOTTED,
        )
    if blur and min(value for _, value in blur) > 0:
        changes = [math.log(value / blur[0][1]) for _, value in blur]
        below.plot([step for step, _ in blur], changes, color=PURPLE, label="blur effect", **DOTTED)
    if below.lines:
        low, high = below.get_ylim()
        below.set_ylim(min(low, -0.3), max(high, 0.3))
        below.axhline(0, color=SOFT, linewidth=0.8, linestyle=(0, (4, 4)))
        below.legend(frameon=False, fontsize=8.5, loc="best", labelcolor=INK)
    below.set_ylabel("log ratio, lower is softer", color=SOFT, fontsize=8.5)
    below.set_xlabel("training step", fontsize=8.5, color=SOFT)


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=5)
    axis.grid(axis="y", color=LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(LINE)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(labelsize=8, colors=SOFT, length=0)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m tools.overview_picture RUN OUT.png", file=sys.stderr)
        return 2
    try:
        print(draw_overview(Path(arguments[0]), Path(arguments[1])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
