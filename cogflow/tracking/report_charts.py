"""Choose the curves that the report shows, their order and their names."""

from __future__ import annotations

from cogflow.tracking.curves import Chart, ChartSpec, Line, draw_chart
from cogflow.tracking.run_data import RunData

QUARTERS = ("1st (least noise)", "2nd", "3rd", "4th (most)")
"""Quarters of the noise schedule."""
BY_QUARTER = "quarters of the noise schedule"


def loss_charts(run: RunData) -> list[Chart]:
    """Return the chart of the training and the held-out loss."""
    lines = [
        Line("training", run.curve("train/loss"), 1, smooth=True),
        Line("held out", run.curve("heldout/loss"), 2, dots=True),
    ]
    return _draw(ChartSpec("Loss", lines, width=660, height=520, until=run.last_step))


def sharpness_charts(run: RunData) -> list[Chart]:
    """Return a chart for each main metric of the validation samples."""
    # The least range is about the change of the metric when a Gaussian of one pixel blurs the samples.
    metrics = (
        ("Wavelet ratio", "wavelet_ratio", "log, higher is sharper", 3, 0.4),
        ("Blur effect", "blur_effect", "1 − blur, higher is sharper", 4, 0.1),
        ("Contrast", "contrast", "of the luma", 1, 0.05),
    )
    return _draw(
        *(
            ChartSpec(
                title,
                [Line("validation samples", run.curve(f"sharpness/{name}"), colour, dots=True)],
                width=480,
                height=145,
                note=note,
                reference=True,
                until=run.last_step,
                least=least,
            )
            for title, name, note, colour, least in metrics
        )
    )


def other_charts(run: RunData) -> list[Chart]:
    """Return charts of the losses by timestep, the gradient norm, the learning rate, the step time and the memory."""

    def by_quarter(prefix: str, *, smooth: bool = False, dots: bool = False) -> list[Line]:
        return [
            Line(label, run.curve(f"{prefix}/loss_q{number}"), number, dots=dots, smooth=smooth)
            for number, label in enumerate(QUARTERS, 1)
        ]

    def single(title: str, name: str, note: str = "", *, smooth: bool = False) -> ChartSpec:
        line = Line(name.partition("/")[2].replace("_", " "), run.curve(name), smooth=smooth)
        return ChartSpec(title, [line], note=note, height=180, until=run.last_step)

    training, heldout = by_quarter("train", smooth=True), by_quarter("heldout", dots=True)
    return _draw(
        ChartSpec("Training loss by timestep", training, note=BY_QUARTER, height=240, until=run.last_step),
        ChartSpec("Held-out loss by timestep", heldout, note=BY_QUARTER, height=240, until=run.last_step),
        single("Gradient norm", "train/grad_norm", "before clipping", smooth=True),
        single("Learning rate", "train/lr"),
        single("Step time", "train/step_time", "seconds", smooth=True),
        single("Memory", "train/memory_gb", "peak, GB"),
    )


def watch_charts(run: RunData) -> list[Chart]:
    """Return charts of the quality watch at each validation, and of the recovered share of fine detail at each step."""
    changes = [name for name in run.metrics if name.startswith("watch/") and name not in ("watch/level", "watch/score")]

    def order(name: str) -> tuple[bool, float]:
        # Blur first, then the metrics that changed most: there are more metrics than colours.
        largest = max((abs(value) for _, value in run.curve(name).finite), default=0)
        return name not in ("watch/blur", "watch/soft"), -largest

    lines = [
        Line(name.partition("/")[2].replace("_", " "), run.curve(name), colour, dots=True)
        for colour, name in enumerate(sorted(changes, key=order)[:4], 1)
    ]
    recovered = [
        Line(label, run.curve(f"spectrum/high_q{number}"), number, smooth=True)
        for number, label in enumerate(QUARTERS, 1)
    ]
    level = Line("level", run.curve("watch/level"), 2, dots=True)
    trend = Line("z", run.curve("spectrum/z"), 3, smooth=True)

    def spec(title: str, lines: list[Line], note: str, least: float = 0.0) -> ChartSpec:
        return ChartSpec(title, lines, height=180, note=note, until=run.last_step, least=least)

    return _draw(
        spec("Quality watch", lines, "change against step 0, in standard deviations of the noise model", 6.0),
        spec("Level of the quality watch", [level], "0 good, 1 learning, 2 warning, 3 alarm", 3.0),
        spec("Fine detail recovered", recovered, "share of the latents' finest band in the x0 prediction"),
        spec("Trend of fine detail", [trend], "z of its change, at every step", 6.0),
    )


def _draw(*specs: ChartSpec) -> list[Chart]:
    """Draw the charts that have a finite value."""
    return [drawn for drawn in map(draw_chart, specs) if drawn is not None]
