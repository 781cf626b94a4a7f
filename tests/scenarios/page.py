"""Draw the pictures and print the table of docs/scenarios.md: python -m tests.scenarios.page RUNS_FOLDER.

RUNS_FOLDER is the folder that tests.scenarios.scenario has filled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tests.scenarios.outcome import LOOSE, SIGHT, STRICT, Notice, Outcome, first_step_above, read
from tests.scenarios.scenario import SCENARIOS

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).resolve().parents[2] / "docs"
LINES = {
    "wavelet_ratio": ("fine detail", "#2563eb"),
    "edge_sharpness": ("edges", "#60a5fa"),
    "artefacts": ("block artefacts", "#dc2626"),
    "clipped": ("clipped", "#d97706"),
    "contrast": ("contrast", "#059669"),
}
HEADLINE = {"e": ("clipped", "contrast", "artefacts"), "l": ("wavelet_ratio", "artefacts")}
"""The scenarios of the page's first picture, and the metrics that it shows."""
SOURCES = {
    "ladder": ("v", "#7c3aed"),
    "watch": ("s", "#dc2626"),
    "indicator": ("o", "#d97706"),
    "a person": ("*", "#111827"),
}


def main(root: Path) -> None:
    outcomes = {
        letter: read(root / "runs" / letter)
        for letter in SCENARIOS
        if (root / "runs" / letter / "train.json").is_file()
    }
    overview(outcomes).savefig(DOCS / "scenarios.png", dpi=72)
    if set(HEADLINE) <= set(outcomes):
        headline(outcomes).savefig(DOCS / "headline.png", dpi=80)
    table = "\n".join(row(letter, outcome) for letter, outcome in outcomes.items())
    head = "| scenario | held-out loss | the loss, tested | indicator | ladder | watch | a person | largest changes |"
    print(f"{head}\n{'| --- ' * 8}|\n{table}")
    (root / "outcomes.json").write_text(
        json.dumps({letter: as_json(outcome) for letter, outcome in outcomes.items()}, indent=1)
    )


def headline(outcomes: Mapping[str, Outcome]) -> Any:
    """Return a figure of two scenarios: the loss, and the metrics of the samples with the first notices."""
    figure, axes = pyplot.subplots(
        2, len(HEADLINE), figsize=(6.4 * len(HEADLINE), 5.6), sharex=True, layout="constrained"
    )
    for (above, below), (letter, names) in zip(axes.T, HEADLINE.items(), strict=True):
        outcome = outcomes[letter]
        steps, losses = zip(*outcome.losses, strict=True)
        above.plot(steps, losses, color="#e5e7eb", lw=1)
        above.plot(steps, smooth(losses), color="#6b7280", lw=2.4, label="training loss, smoothed")
        above.plot(
            *zip(*outcome.heldout, strict=True), color="#059669", lw=2.4, marker="o", ms=4, label="held-out loss"
        )
        above.set_ylim(0, 1.3 * max(smooth(losses)))
        above.set_title(f"({letter}) {SCENARIOS[letter].title}\nthe loss shows no defect", loc="left", fontsize=10)
        above.legend(fontsize=9, frameon=False, loc="upper right")
        for name in names:
            label, colour = LINES[name]
            below.plot(outcome.validations, outcome.changes[name], color=colour, lw=2.4, marker="o", ms=4, label=label)
        below.axhline(0, color="#9ca3af", lw=0.8)
        below.set_title(
            "the metrics of the samples, compared with those before the first step", loc="left", fontsize=10
        )
        low, high = below.get_ylim()
        below.set_ylim(low - 0.45 * (high - low), high + 0.6 * (high - low))
        below.set_xlabel("step")
        below.legend(fontsize=9, frameon=False, loc="lower right", ncols=2)
        for position, (source, (_, colour)) in enumerate(SOURCES.items()):
            if (step := first_notice(outcome, source)) is not None:
                below.axvline(step, color=colour, lw=1.2, ls="--")
                top = (step, below.get_ylim()[1])
                below.annotate(
                    f"{source}: {step}",
                    top,
                    xytext=(3, -4 - 12 * position),
                    textcoords="offset points",
                    va="top",
                    fontsize=9,
                    color=colour,
                )
    return figure


def overview(outcomes: dict[str, Outcome]) -> Any:
    """Return a figure with the curves of all scenarios."""
    columns = 3
    rows = -(-len(outcomes) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.6 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(outcomes) :]:
        axis.axis("off")
    for axis, (letter, outcome) in zip(axes.flat, outcomes.items(), strict=False):
        curves(axis, outcome)
        axis.set_title(f"({letter}) {SCENARIOS[letter].title}", fontsize=10, loc="left")
    handles = [pyplot.Line2D([], [], color="#9ca3af", lw=2, label="training loss (left axis)")]
    handles += [pyplot.Line2D([], [], color=colour, lw=2, label=label) for label, colour in LINES.values()]
    handles += [
        pyplot.Line2D([], [], color=colour, marker=marker, lw=0, label=f"first notice: {source}")
        for source, (marker, colour) in SOURCES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def curves(axis: Any, outcome: Outcome) -> None:
    """Draw the loss and the changes of the metrics, in units of the change that a person notices."""
    steps, losses = zip(*outcome.losses, strict=True)
    axis.plot(steps, smooth(losses), color="#9ca3af", lw=2)
    axis.set_ylim(0, max(smooth(losses)) * 1.15)
    axis.tick_params(labelsize=8)
    other = axis.twinx()
    highest = 1.2
    for name, (_, colour) in LINES.items():
        values = np.array(outcome.changes[name]) / abs(SIGHT[name])
        other.plot(outcome.validations, np.clip(values, -4, 4), color=colour, lw=1.6, marker=".", ms=4)
        highest = max(highest, min(4.0, float(np.abs(values).max()) * 1.1))
    other.axhspan(-1, 1, color="#f3f4f6", zorder=-1)
    axis.set_zorder(other.get_zorder() + 1)
    axis.patch.set_visible(False)
    other.set_ylim(-highest, highest)
    other.tick_params(labelsize=8)
    for position, (source, (marker, colour)) in enumerate(SOURCES.items()):
        step = first_notice(outcome, source)
        if step is not None:
            axis.plot(
                [step],
                [axis.get_ylim()[1] * (0.95 - 0.09 * position)],
                marker=marker,
                color=colour,
                ms=9,
                clip_on=False,
                zorder=5,
            )


def first_notice(outcome: Outcome, source: str) -> int | None:
    """Return the step of the first alarm of ``source``; for the indicator also of the first warning."""
    if source == "a person":
        return outcome.human
    notices: list[Notice] = {"ladder": outcome.ladder, "watch": outcome.watch, "indicator": outcome.indicator}[source]
    return min((notice.step for notice in notices if notice.level == "alarm" or source == "indicator"), default=None)


def row(letter: str, outcome: Outcome) -> str:
    """Return the row of a scenario in the page's table."""
    heldout = [value for _, value in outcome.heldout]
    last = {name: values[-1] for name, values in outcome.changes.items() if name in SIGHT}
    largest = sorted(((abs(value / SIGHT[name]), name, value) for name, value in last.items()), reverse=True)[:2]
    cells = [
        f"({letter}) {SCENARIOS[letter].title}",
        f"{heldout[0]:.3f} -> {heldout[-1]:.3f}" if heldout else "",
        format_loss_test(outcome.loss_test),
        format_notices(outcome.indicator),
        format_notices(outcome.ladder),
        format_notices(outcome.watch),
        "-" if outcome.human is None else f"step {outcome.human}",
        ", ".join(f"{name} {value:+.2f}" for _, name, value in largest),
    ]
    return "| " + " | ".join(cells) + " |"


def format_loss_test(test: list[tuple[int, float]]) -> str:
    """Return the largest z of the indicator's test on the loss, and the steps at which it reaches the limits."""
    steps = [f"{limit:g} at {step}" for limit in (LOOSE, STRICT) if (step := first_step_above(test, limit)) is not None]
    return f"{max(z for _, z in test):.1f}" + (f" ({', '.join(steps)})" if steps else "")


def format_notices(notices: list[Notice]) -> str:
    """Return the first warning and the first alarm, with their defects."""
    found = []
    for level in ("warning", "alarm"):
        of_level = [notice for notice in notices if notice.level == level]
        if of_level:
            step = min(notice.step for notice in of_level)
            defects = dict.fromkeys(
                notice.defect + (f" (rung {notice.rung})" if notice.rung is not None else "")
                for notice in of_level
                if notice.step == step
            )
            found.append(f"{level} at {step}: {', '.join(defects)}")
    return "; ".join(found) or "-"


def smooth(values: Any, weight: float = 0.15) -> list[float]:
    """Return the exponential moving average of ``values``."""
    found, level = [], values[0]
    for value in values:
        level += weight * (value - level)
        found.append(level)
    return found


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as an object for ``outcomes.json``."""
    return {
        "heldout": outcome.heldout,
        "validations": outcome.validations,
        "changes": outcome.changes,
        "human": outcome.human,
        "loss_test": outcome.loss_test,
        **{name: [vars(notice) for notice in getattr(outcome, name)] for name in ("ladder", "watch", "indicator")},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
