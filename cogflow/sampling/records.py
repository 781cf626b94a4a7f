"""What a folder of samples says of itself; read without anything that samples or measures being imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FRAMES = "frames.safetensors"


def newest(folder: Path) -> Path | None:
    """The newest ``step-...`` folder of samples below ``folder``."""
    found = sorted((p for p in folder.glob("step-*") if (p / "samples.json").is_file()), key=lambda p: int(p.name[5:]))
    return found[-1] if found else None


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "samples.json").read_text())
