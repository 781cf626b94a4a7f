"""Draw docs/scenarios from runs: python -m tests.scenarios.page RUNS_FOLDER (as tests.scenarios.scenario leaves it)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tests.scenarios.outcome import LOOSE, SIGHT, STRICT, Notice, Outcome, passed, read
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
"""The scenarios of the page's first picture, and the channels that fall or rise there."""
WHO = {
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
        json.dumps({letter: plain(outcome) for letter, outcome in outcomes.items()}, indent=1)
    )


def headline(outcomes: Mapping[str, Outcome]) -> Any:
    """The two curves, of two scenarios: the loss, and what the samples look like, with who speaks when."""
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
        above.set_title(f"({letter}) {SCENARIOS[letter].title}\nthe loss: nothing to see", loc="left", fontsize=10)
        above.legend(fontsize=9, frameon=False, loc="upper right")
        for name in names:
            label, colour = LINES[name]
            below.plot(outcome.validations, outcome.changes[name], color=colour, lw=2.4, marker="o", ms=4, label=label)
        below.axhline(0, color="#9ca3af", lw=0.8)
        below.set_title("the samples, against their own from before the first step", loc="left", fontsize=10)
        low, high = below.get_ylim()
        below.set_ylim(low - 0.45 * (high - low), high + 0.6 * (high - low))
        below.set_xlabel("step")
        below.legend(fontsize=9, frameon=False, loc="lower right", ncols=2)
        for place, (who, (_, colour)) in enumerate(WHO.items()):
            if (step := first(outcome, who)) is not None:
                below.axvline(step, color=colour, lw=1.2, ls="--")
                at = (step, below.get_ylim()[1])
                below.annotate(
                    f"{who}: {step}",
                    at,
                    xytext=(3, -4 - 12 * place),
                    textcoords="offset points",
                    va="top",
                    fontsize=9,
                    color=colour,
                )
    return figure


def overview(outcomes: dict[str, Outcome]) -> Any:
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
        pyplot.Line2D([], [], color=colour, marker=mark, lw=0, label=f"{who} speaks")
        for who, (mark, colour) in WHO.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def curves(axis: Any, outcome: Outcome) -> None:
    """The loss, and beside it the changes of the samples in units of what a person sees."""
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
    for place, (who, (mark, colour)) in enumerate(WHO.items()):
        step = first(outcome, who)
        if step is not None:
            axis.plot(
                [step],
                [axis.get_ylim()[1] * (0.95 - 0.09 * place)],
                marker=mark,
                color=colour,
                ms=9,
                clip_on=False,
                zorder=5,
            )


def first(outcome: Outcome, who: str) -> int | None:
    if who == "a person":
        return outcome.human
    notices: list[Notice] = {"ladder": outcome.ladder, "watch": outcome.watch, "indicator": outcome.indicator}[who]
    return min((notice.step for notice in notices if notice.level == "alarm" or who == "indicator"), default=None)


def row(letter: str, outcome: Outcome) -> str:
    held = [value for _, value in outcome.heldout]
    sizes = sorted(((abs(v[-1] / SIGHT[n]), n, v[-1]) for n, v in outcome.changes.items() if n in SIGHT), reverse=True)[
        :2
    ]
    cells = [
        f"({letter}) {SCENARIOS[letter].title}",
        f"{held[0]:.3f} -> {held[-1]:.3f}" if held else "",
        tested(outcome.loss_test),
        told(outcome.indicator),
        told(outcome.ladder),
        told(outcome.watch),
        "-" if outcome.human is None else f"step {outcome.human}",
        ", ".join(f"{name} {value:+.2f}" for _, name, value in sizes),
    ]
    return "| " + " | ".join(cells) + " |"


def tested(test: list[tuple[int, float]]) -> str:
    """The largest z of the indicator's test on the loss, and when it passes the limits."""
    steps = [f"{limit:g} at {step}" for limit in (LOOSE, STRICT) if (step := passed(test, limit)) is not None]
    return f"{max(z for _, z in test):.1f}" + (f" ({', '.join(steps)})" if steps else "")


def told(notices: list[Notice]) -> str:
    """The first warning and the first alarm, with their kinds."""
    found = []
    for level in ("warning", "alarm"):
        of = [notice for notice in notices if notice.level == level]
        if of:
            step = min(notice.step for notice in of)
            kinds = dict.fromkeys(
                notice.defect + (f" (rung {notice.rung})" if notice.rung is not None else "")
                for notice in of
                if notice.step == step
            )
            found.append(f"{level} at {step}: {', '.join(kinds)}")
    return "; ".join(found) or "-"


def smooth(values: Any, weight: float = 0.15) -> list[float]:
    found, level = [], values[0]
    for value in values:
        level += weight * (value - level)
        found.append(level)
    return found


def plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "heldout": outcome.heldout, "validations": outcome.validations, "changes": outcome.changes, "human": outcome.human,
        "loss_test": outcome.loss_test,
        **{who: [vars(notice) for notice in getattr(outcome, who)] for who in ("ladder", "watch", "indicator")},
    }  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
