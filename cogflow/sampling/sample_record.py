"""What a folder of samples says of itself; read without anything that samples or measures being imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import SAMPLES_RECORD, step_folders

FRAMES_FILE = "frames.safetensors"


def newest_samples(folder: Path) -> Path | None:
    """The newest ``step-...`` folder of samples below ``folder``."""
    found = [path for path in step_folders(folder) if (path / SAMPLES_RECORD).is_file()]
    return found[-1] if found else None


def read_sample_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SAMPLES_RECORD).read_text())
