"""What a scenario's run shows: who noticed what, and when. Read from the files that every run leaves."""

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
"""What a person sees who compares two samples side by side: the change of a Gaussian of about one pixel, of a third in contrast, of
patterns that catch the eye. Signs: negative as a fall, contrast and saturation either way, the others as a rise. A proxy for a person."""


LOSS_DEVIATION = {"1": 0.52, "2": 0.24, "3": 0.28, "4": 0.43}
"""Of the log of a step's loss (8 clips) by quarter of the timesteps, in the first thirty steps of the healthy scenario."""
STRICT, LOOSE = 4.5, 2.0
"""Limits for the loss: the indicator's own warning, and one that hindsight allows: no scenario without a rise comes above 0.6."""


@dataclass(frozen=True)
class Notice:
    """``step`` of training (0: before the first step) at which something was said, and what."""

    step: int
    rung: int | None
    defect: str
    level: str


@dataclass(frozen=True)
class Outcome:
    losses: list[tuple[int, float]]
    heldout: list[tuple[int, float]]
    validations: list[int]
    changes: dict[str, list[float]]  # channel -> mean change against step 0 at each validation
    ladder: list[Notice]
    watch: list[Notice]
    indicator: list[Notice]
    loss_test: list[tuple[int, float]]
    human: int | None
    table: list[dict[str, Any]]

    @property
    def alarms(self) -> list[Notice]:
        """Of the ladder and the watch, first to last."""
        return sorted(
            (notice for notice in self.ladder + self.watch if notice.level == "alarm"), key=lambda notice: notice.step
        )

    def alarmed_by(self, validations: int) -> list[Notice]:
        """Alarms up to the given number of validations after that of step 0."""
        last = self.validations[min(validations, len(self.validations) - 1)]
        return [notice for notice in self.alarms if notice.step <= last]


def read(folder: Path) -> Outcome:
    lines = list(read_lines(folder / "metrics.jsonl"))
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("samples/step-*/samples.json"))]
    panels = [{one["name"]: one["sharpness"] for one in record["samples"]} for record in records]
    changes = {
        name: [
            float(np.mean([change(name, now[one][name], panels[0][one][name]) for one in panels[0]])) for now in panels
        ]
        for name in METRICS
    }
    steps = [record["step"] for record in records]
    ladder = json.loads((folder / "ladder.json").read_text())
    alerts = [event for event in read_lines(folder / "events.jsonl") if event["kind"] == "alert"]
    return Outcome(
        losses=curve(lines, "train/loss"), heldout=curve(lines, "heldout/loss"), validations=steps, changes=changes,
        ladder=[Notice(0, one["rung"], one["defect"], one["level"]) for one in ladder["findings"] if one["rung"] < 4],
        watch=watched(folder), indicator=indicated(lines, alerts), loss_test=loss_test(lines), human=seen(steps, changes, panels),
        table=ladder.get("table", []),
    )  # fmt: skip


def curve(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]


def watched(folder: Path) -> list[Notice]:
    """Replayed from the samples' panels, as a resumed run does it."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("samples/step-*/samples.json"))]
    first, *later = [{one["name"]: one["sharpness"] for one in record["samples"]} for record in records]
    watch = QualityWatch(first, reconstruction_bound.read_reconstruction_bound(folder) or None)
    found = []
    for record, panels in zip(records[1:], later, strict=True):
        reading = watch.update(record["step"], panels)
        found += [Notice(record["step"], 4, finding.defect, finding.level) for finding in reading.findings]
    return found


def indicated(lines: list[dict[str, Any]], alerts: list[dict[str, Any]]) -> list[Notice]:
    """What is seen in the training forward pass: the latents' scale before the first step, averages that stay behind, and the first step
    at each level of the indicator with the kind that led."""
    scale = next(
        (line["heldout/scale"] for line in lines if line["step"] == 0 and line.get("heldout/scale") is not None), 1.0
    )
    found = (
        []
        if 1 / MAX_SCALE_RATIO < scale < MAX_SCALE_RATIO
        else [Notice(0, None, f"latents at {scale:.2f} times the scale", "warning")]
    )
    found += [
        Notice(int(alert["text"].split()[1].rstrip(":")), None, title, "warning")
        for alert in alerts
        for begins, title in (("ema_behind", "averages stay behind"), ("overfitting", "held-out loss rises"))
        if alert["title"].startswith(begins)
    ]
    found += [
        Notice(0, None, alert["title"], "warning")
        for alert in alerts
        if alert["title"] == "few captions are trained on"
    ]
    for level, number in (("warning", 2.0), ("alarm", 3.0)):
        line = next((line for line in lines if (line.get("spectrum/level") or 0.0) >= number), None)
        if line is not None:
            scores = {
                name.removeprefix("spectrum/z_"): value
                for name, value in line.items()
                if name.startswith("spectrum/z_") and value
            }
            lead = max((name for name in scores if name[-2:-1] != "q"), key=lambda name: scores[name])
            found.append(Notice(line["step"], None, lead.replace("_", " "), level))
    return found


def loss_test(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """The indicator's test (:mod:`cogflow.sharpness.trend`) applied to the loss itself, by step: is it above what the held-out clips had
    before the first step, by quarter of the timesteps? Positive is higher."""
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
            uncertainty += WEIGHT * (1 - uncertainty)  # two clips a quarter in a step, and the anchor counts for two
            found.append((line["step"], float(mean / np.sqrt(squares + uncertainty**2))))
    return found


def passed(test: list[tuple[int, float]], limit: float) -> int | None:
    return next((step for step, z in test if z >= limit), None)


def seen(steps: list[int], changes: dict[str, list[float]], panels: list[dict[str, dict[str, float]]]) -> int | None:
    """The first validation whose samples a person would call worse than those of step 0."""
    for place, step in enumerate(steps):
        if any(panel["finite"] < 1 for panel in panels[place].values()):
            return step
        for name, limit in SIGHT.items():
            value = changes[name][place]
            if (
                (value <= limit)
                if limit < 0
                else (abs(value) if name in ("contrast", "saturation") else value) >= limit
            ):
                return step
    return None
