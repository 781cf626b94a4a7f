"""Which curves the report shows, in which order and under which names."""

from __future__ import annotations

from cogflow.tracking.curves import Chart, Line, chart
from cogflow.tracking.run_data import RunData

QUARTERS = ("1st (least noise)", "2nd", "3rd", "4th (most)")


def loss_charts(run: RunData) -> list[Chart]:
    lines = [
        Line("training", run.curve("train/loss"), 1, smooth=True),
        Line("held out", run.curve("heldout/loss"), 2, dots=True),
    ]
    return _present(chart("Loss", lines, width=660, height=520, until=run.last_step))


def sharpness_charts(run: RunData) -> list[Chart]:
    # The least range of each is about what its metric falls by when a Gaussian of one pixel blurs the samples.
    rows = (
        ("Wavelet ratio", "wavelet_ratio", "log, higher is sharper", 3, 0.4),
        ("Blur effect", "blur_effect", "1 − blur, higher is sharper", 4, 0.1),
        ("Contrast", "contrast", "of the luma", 1, 0.05),
    )
    shape = {"width": 480, "height": 145}
    return _present(
        *(
            chart(
                title,
                [Line("validation samples", run.curve(f"sharpness/{name}"), colour, dots=True)],
                **shape,
                note=note,
                reference=True,
                until=run.last_step,
                least=least,
            )
            for title, name, note, colour, least in rows
        )
    )


def other_charts(run: RunData) -> list[Chart]:
    def quarters(prefix: str, **style: bool) -> list[Line]:
        return [
            Line(label, run.curve(f"{prefix}/loss_q{number}"), number, **style)
            for number, label in enumerate(QUARTERS, 1)
        ]

    def one(title: str, name: str, note: str = "", *, smooth: bool = False) -> Chart | None:
        return chart(
            title,
            [Line(name.partition("/")[2].replace("_", " "), run.curve(name), smooth=smooth)],
            note=note,
            height=180,
            until=run.last_step,
        )

    return _present(
        chart(
            "Training loss by timestep",
            quarters("train", smooth=True),
            note="quarters of the noise schedule",
            height=240,
            until=run.last_step,
        ),
        chart(
            "Held-out loss by timestep",
            quarters("heldout", dots=True),
            note="quarters of the noise schedule",
            height=240,
            until=run.last_step,
        ),
        one("Gradient norm", "train/grad_norm", "before clipping", smooth=True),
        one("Learning rate", "train/lr"),
        one("Step time", "train/step_time", "seconds", smooth=True),
        one("Memory", "train/memory_gb", "peak, GB"),
    )


def watch_charts(run: RunData) -> list[Chart]:
    """What the watch saw at each validation, and what the loss hides at each step: the share of fine latent detail that is recovered."""
    names = [name for name in run.metrics if name.startswith("watch/") and name not in ("watch/level", "watch/score")]
    # The four that moved most, blur first: there are more channels than colours.
    names.sort(
        key=lambda name: (
            name not in ("watch/blur", "watch/soft"),
            -max((abs(value) for _, value in run.curve(name).finite), default=0),
        )
    )
    lines = [
        Line(name.partition("/")[2].replace("_", " "), run.curve(name), colour, dots=True)
        for colour, name in enumerate(names[:4], 1)
    ]
    levels = [Line("level", run.curve("watch/level"), 2, dots=True)]
    high = [
        Line(label, run.curve(f"spectrum/high_q{number}"), number, smooth=True)
        for number, label in enumerate(QUARTERS, 1)
    ]
    trend = [Line("z", run.curve("spectrum/z"), 3, smooth=True)]
    until, height = run.last_step, 180
    return _present(
        chart(
            "Watch",
            lines,
            note="change against step 0, in deviations of nothing wrong",
            height=height,
            until=until,
            least=6.0,
        ),
        chart(
            "Watch level", levels, note="0 quiet, 1 learning, 2 warning, 3 alarm", height=height, until=until, least=3.0
        ),
        chart(
            "Fine detail recovered",
            high,
            note="share of the latents' finest band in the x0 prediction",
            height=height,
            until=until,
        ),
        chart(
            "Trend of fine detail", trend, note="z of its change, at every step", height=height, until=until, least=6.0
        ),
    )


def _present(*charts: Chart | None) -> list[Chart]:
    return [one for one in charts if one is not None]
