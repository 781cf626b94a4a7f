"""Latents of a few real clips, for asking a transformer what it was trained with: from a run's cache, else of drawn clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.data_section import DataConfig
from cogflow.data.cache import LatentCache
from cogflow.data.encode import encode_frames
from cogflow.data.shapes import draw, scenes
from cogflow.records.cache_records import CacheIndex

Clips = tuple[list[torch.Tensor], list[str]]
"""Latents ``[channels, frames, h, w]``, not scaled, and captions."""


def from_runs(places: list[Path | None], most: int) -> Clips | None:
    """Of the first place that is a run with prepared clips."""
    for place in places:
        if place is None or not (RunLayout(place).cache / CacheIndex.file_name).is_file():
            continue
        cache = LatentCache(RunLayout(place).cache)
        chosen = (cache.holdout or cache.train)[:most]
        return [cache.entry(index).mean for index in chosen], [cache.texts[index] for index in chosen]
    return None


def drawn(vae: Any, data: DataConfig, most: int) -> Clips:
    """Drawn clips through ``vae``: any picture will do for a VAE, and a schedule is known on all of them."""
    pictures = [(draw(scene, data.frames, data.height, data.width), scene.caption) for scene in scenes(most, seed=5)]
    return [encode_frames(vae, torch.from_numpy(frames))[0] for frames, _ in pictures], [
        caption for _, caption in pictures
    ]
