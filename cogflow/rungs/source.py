"""Rungs 0 and 1: the clips' files and what the loader makes of them, from what ``stage=prepare`` measured."""

from __future__ import annotations

from pathlib import Path

from cogflow.config.schema import DataConfig


def gather(folder: Path, cache_folder: Path, clips_folder: Path, data: DataConfig) -> None:
    """Write rungs 0 and 1 of ``folder/ladder.json`` from the prepared cache. Rank 0 only."""
