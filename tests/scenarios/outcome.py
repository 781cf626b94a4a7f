"""Read the outcome of a scenario from the files of its run: the findings, and the steps at which they were reported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogflow.ladder import reconstruction_bound
from cogflow.sharpness import METRICS, change
from cogflow.sharpness.quality_watch import QualityWatch
from cogflow.sharpness.trend import STEP_CLIP, WEIGHT
from cogflow.tracking.metrics_log import read_lines
from cogflow.training.evaluation import MAX_SCALE_RATIO

SIGHT = {
    "wavelet_ratio": -0.35,
    "edge_sharpness": -0.08,
    "contrast": 0.35,
    "clipped": 0.15,
    "artefacts": 0.25,
    "saturation": 0.6,
}
"""Changes of the metrics that a person notices when they compare two samples side by side; a proxy for a person.

They correspond to a Gaussian of about one pixel, a third of the contrast, and conspicuous patterns. A negative limit
is a fall; contrast and saturation count in both directions, the other metrics as a rise.
"""
EITHER_WAY = ("contrast", "saturation")
LOSS_DEVIATION = {"1": 0.52, "2": 0.24, "3": 0.28, "4": 0.43}
"""Standard deviation of the log of a step's loss (8 clips) by quarter of the timesteps.

Measured in the first thirty steps of the healthy scenario.
"""
STRICT, LOOSE = 4.5, 2.0
"""Limits for the test of the loss: the limit of the indicator's warning, and a limit chosen afterwards.

No scenario without a rise of the loss exceeds 0.6.
"""


@dataclass(frozen=True)
class Notice:
    """A warning or an alarm. ``step``: the step of training at which it was reported, 0 before the first."""

    step: int
    rung: int | None
    defect: str
    level: str


@dataclass(frozen=True)
class Outcome:
    """Curves and notices of a run.

    ``losses``, ``heldout`` and ``loss_test``: (step, value). ``human``: the first step at which a person would notice
    the defect.
    """

    losses: list[tuple[int, float]]
    heldout: list[tuple[int, float]]
    validations: list[int]
    changes: dict[str, list[float]]  # metric -> mean change against step 0 at each validation
    ladder: list[Notice]
    watch: list[Notice]
    indicator: list[Notice]
    loss_test: list[tuple[int, float]]
    human: int | None
    table: list[dict[str, Any]]

    @property
    def alarms(self) -> list[Notice]:
        """Alarms of the ladder and of the watch, in the order of steps."""
        return sorted(
            (notice for notice in self.ladder + self.watch if notice.level == "alarm"), key=lambda notice: notice.step
        )

    def alarmed_by(self, validations: int) -> list[Notice]:
        """Return the alarms up to the given number of validations after that of step 0."""
        last = self.validations[min(validations, len(self.validations) - 1)]
        return [notice for notice in self.alarms if notice.step <= last]


def read(folder: Path) -> Outcome:
    """Return the outcome of the run in ``folder``."""
    lines = list(read_lines(folder / "metrics.jsonl"))
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("samples/step-*/samples.json"))]
    validations = [sample_metrics(record) for record in records]
    first = validations[0]
    changes = {
        name: [
            float(np.mean([change(name, metrics[sample][name], first[sample][name]) for sample in first]))
            for metrics in validations
        ]
        for name in METRICS
    }
    steps = [record["step"] for record in records]
    ladder = json.loads((folder / "ladder.json").read_text())
    alerts = [event for event in read_lines(folder / "events.jsonl") if event["kind"] == "alert"]
    return Outcome(
        losses=curve(lines, "train/loss"),
        heldout=curve(lines, "heldout/loss"),
        validations=steps,
        changes=changes,
        ladder=[
            Notice(0, finding["rung"], finding["defect"], finding["level"])
            for finding in ladder["findings"]
            if finding["rung"] < 4
        ],
        watch=watch_notices(records, folder),
        indicator=indicator_notices(lines, alerts),
        loss_test=loss_test(lines),
        human=first_visible_step(steps, changes, validations),
        table=ladder.get("table", []),
    )


def sample_metrics(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of each sample of a validation by its name."""
    return {sample["name"]: sample["sharpness"] for sample in record["samples"]}


def curve(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of every line that has a value of ``name``."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]


def watch_notices(records: list[dict[str, Any]], folder: Path) -> list[Notice]:
    """Return the findings of the quality watch, replayed from the metrics of the samples, as in a resumed run."""
    first, *later = [sample_metrics(record) for record in records]
    watch = QualityWatch(first, reconstruction_bound.read_reconstruction_bound(folder) or None)
    found = []
    for record, metrics in zip(records[1:], later, strict=True):
        reading = watch.update(record["step"], metrics)
        found += [Notice(record["step"], 4, finding.defect, finding.level) for finding in reading.findings]
    return found


def indicator_notices(lines: list[dict[str, Any]], alerts: list[dict[str, Any]]) -> list[Notice]:
    """Return the notices from the training forward pass.

    These are the scale of the latents before the first step, averaged weights that stay behind, and the first step at
    each level of the indicator with the defect of the largest z.
    """
    scale = next(
        (line["heldout/scale"] for line in lines if line["step"] == 0 and line.get("heldout/scale") is not None), 1.0
    )
    found = []
    if not 1 / MAX_SCALE_RATIO < scale < MAX_SCALE_RATIO:
        found.append(Notice(0, None, f"latents at {scale:.2f} times the scale", "warning"))
    found += [
        Notice(int(alert["text"].split()[1].rstrip(":")), None, title, "warning")
        for alert in alerts
        for start, title in (("ema_behind", "averages stay behind"), ("overfitting", "held-out loss rises"))
        if alert["title"].startswith(start)
    ]
    found += [
        Notice(0, None, alert["title"], "warning")
        for alert in alerts
        if alert["title"] == "few captions are trained on"
    ]
    for level, threshold in (("warning", 2.0), ("alarm", 3.0)):
        line = next((line for line in lines if (line.get("spectrum/level") or 0.0) >= threshold), None)
        if line is not None:
            scores = {
                name.removeprefix("spectrum/z_"): value
                for name, value in line.items()
                if name.startswith("spectrum/z_") and value
            }
            largest = max((name for name in scores if name[-2:-1] != "q"), key=lambda name: scores[name])
            found.append(Notice(line["step"], None, largest.replace("_", " "), level))
    return found


def loss_test(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, z) of the indicator's test (:mod:`cogflow.sharpness.trend`), applied to the loss itself.

    The test compares the loss with that of the held-out clips before the first step, by quarter of the timesteps. A
    positive z is a higher loss.
    """
    start = next(line for line in lines if line["step"] == 0 and "heldout/loss" in line)
    anchors = {
        quarter: start[f"heldout/loss_q{quarter}"]
        for quarter in "1234"
        if start.get(f"heldout/loss_q{quarter}") is not None
    }
    mean = squares = uncertainty = 0.0
    found = []
    for line in lines:
        rises = [
            np.clip(np.log(line[name] / anchor) / LOSS_DEVIATION[quarter], -STEP_CLIP, STEP_CLIP)
            for quarter, anchor in anchors.items()
            if line.get(name := f"train/loss_q{quarter}") is not None
        ]
        if rises:
            mean += WEIGHT * (sum(rises) / np.sqrt(len(rises)) - mean)
            squares = (1 - WEIGHT) ** 2 * squares + WEIGHT**2
            uncertainty += WEIGHT * (
                1 - uncertainty
            )  # a step has two clips per quarter; the anchor counts as two clips
            found.append((line["step"], float(mean / np.sqrt(squares + uncertainty**2))))
    return found


def first_step_above(test: list[tuple[int, float]], limit: float) -> int | None:
    """Return the first step whose z reaches ``limit``."""
    return next((step for step, z in test if z >= limit), None)


def first_visible_step(
    steps: list[int], changes: dict[str, list[float]], validations: list[dict[str, dict[str, float]]]
) -> int | None:
    """Return the step of the first validation whose samples a person would call worse than those of step 0."""
    for index, step in enumerate(steps):
        if any(metrics["finite"] < 1 for metrics in validations[index].values()):
            return step
        if any(is_visible(name, values[index]) for name, values in changes.items() if name in SIGHT):
            return step
    return None


def is_visible(name: str, value: float) -> bool:
    """Return whether a person notices a change of a metric by ``value``."""
    limit = SIGHT[name]
    if limit < 0:
        return value <= limit
    return (abs(value) if name in EITHER_WAY else value) >= limit
