"""The rungs of the samples: before the first step (base), of a later step (tuned), and of the exported folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cogflow.artifacts.run_layout import RunLayout, step_name
from cogflow.data.media_bytes import ClipError
from cogflow.data.video import read_video
from cogflow.ladder.causes import describe_finding
from cogflow.ladder.crop_sheet import write_crop_sheet
from cogflow.ladder.ladder_record import read_ladder, write_rung
from cogflow.ladder.rung import Rung
from cogflow.models.family import MODEL_SPECS
from cogflow.records.history_records import current_line
from cogflow.records.ladder_records import BaseRung, ExportedRung, FamilyContradiction, TunedRung, WatchFinding
from cogflow.records.sample_records import SamplesRecord
from cogflow.sampling.sample_record import FRAMES_FILE
from cogflow.sampling.sampler import Sampler
from cogflow.sharpness.verdict import Finding

SAMPLES_SHEET = Path("ladder", "samples.png")
SCHEDULER_FIELDS = (
    "snr_shift_scale",
    "prediction_type",
    "timestep_spacing",
    "rescale_betas_zero_snr",
    "beta_start",
    "beta_end",
)
"""Scheduler settings that decide how samples look."""


def record_base_rung(folder: Path, record: SamplesRecord, family: str, sampler: Sampler) -> None:
    """Write the base rung from ``record`` (``samples.json`` of step 0), with the settings that contradict ``family``.

    ``folder`` is the run's; ``family`` is ``config.model.name``. Rank 0 only.
    """
    before = read_ladder(folder).rungs.base
    pipeline = sampler.pipeline
    base = BaseRung(
        metrics=record.metrics(),
        step=record.step,
        contradictions=config_contradictions(family, pipeline.scheduler.config, pipeline.vae.config),
        schedule=before.schedule if before is not None else None,
    )
    write_rung(folder, Rung.BASE, base)


def record_tuned_rung(folder: Path, record: SamplesRecord, findings: Sequence[Finding] | None) -> None:
    """Write the tuned rung from ``record`` (``samples.json`` of a later step); it replaces that of an earlier step.

    Rank 0 only. ``findings``: of the quality watch; ``None`` where it could not judge.
    """
    watch = None if findings is None else [_watch_finding(finding) for finding in findings]
    tuned = TunedRung(record.metrics(), record.step, record.weights, watch, current_line(folder))
    write_rung(folder, Rung.TUNED, tuned)


def record_exported_rung(
    folder: Path, exported: ExportedRung, frames: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]
) -> None:
    """Write the exported rung and a sheet of its worst sample.

    ``frames``: of the exported folder, ``references``: the run's own; uint8 ``[T, H, W, 3]`` by sample name.
    """
    write_rung(folder, Rung.EXPORTED, exported)
    both = {name: psnr for name, psnr in exported.psnr.items() if name in frames and name in references}
    worst = min(both, key=lambda name: both[name], default=None)
    if worst is not None:
        tuned_and_exported = {Rung.TUNED.title: references[worst], Rung.EXPORTED.title: frames[worst]}
        write_crop_sheet(folder / SAMPLES_SHEET, {worst: _base_frames(folder, worst) | tuned_and_exported})


def config_contradictions(
    family: str, scheduler: Mapping[str, Any], vae: Mapping[str, Any]
) -> list[FamilyContradiction]:
    """Return the settings that decide how samples look and are not what ``family`` has; none for an unknown family."""
    spec = MODEL_SPECS.get(family)
    if spec is None:
        return []
    expected = {f"scheduler.{key}": spec.scheduler_config()[key] for key in SCHEDULER_FIELDS}
    configured = {f"scheduler.{key}": scheduler.get(key) for key in SCHEDULER_FIELDS}
    expected["vae.scaling_factor"] = spec.scaling_factor
    configured["vae.scaling_factor"] = vae.get("scaling_factor")
    return [
        FamilyContradiction(field, configured[field], value, family)
        for field, value in expected.items()
        if not _is_equal(configured[field], value)
    ]


def _watch_finding(finding: Finding) -> WatchFinding:
    line = describe_finding(finding, Rung.TUNED)
    return WatchFinding(finding.defect, finding.level, finding.metric, finding.size, line)


def _base_frames(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the frames of a sample from before the first step, read from its video: raw frames are kept of the newest
    step only."""
    path = RunLayout(folder).samples / step_name(0) / f"{name}.mp4"
    if not path.is_file() or (path.parent / FRAMES_FILE).is_file():
        return {}
    try:
        return {Rung.BASE.title: read_video(path)[0]}
    except ClipError:  # the sheet then shows the other two pictures
        return {}


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int) and not isinstance(other, bool):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
