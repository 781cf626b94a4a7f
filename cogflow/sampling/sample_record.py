"""Find and read the record of a folder of samples without importing the samplers or the metrics."""

from __future__ import annotations

from pathlib import Path

from cogflow.artifacts.run_layout import SAMPLES_RECORD, step_folders
from cogflow.files.record_io import read_record
from cogflow.records.sample_records import SamplesRecord

FRAMES_FILE = "frames.safetensors"
"""Raw frames of the newest samples, uint8 ``[T, H, W, 3]`` by sample name."""


def newest_samples(folder: Path) -> Path | None:
    """Return the newest ``step-...`` folder of samples below ``folder``, or ``None``."""
    found = [path for path in step_folders(folder) if (path / SAMPLES_RECORD).is_file()]
    return found[-1] if found else None


def read_sample_record(folder: Path) -> SamplesRecord:
    """Return the record in ``folder/samples.json``. Raise :class:`cogflow.errors.CheckpointError`."""
    return read_record(folder / SAMPLES_RECORD, SamplesRecord)
