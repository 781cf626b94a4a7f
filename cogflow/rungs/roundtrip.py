"""Rung 2: clips through the VAE and back, by the very path that training and sampling use. It is the ceiling of what a sample can reach."""

from __future__ import annotations

from pathlib import Path

from cogflow.config.schema import Config
from cogflow.data.cache import LatentCache
from cogflow.sampling.sampler import Sampler

Panel = dict[str, float]


def measure(folder: Path, config: Config, cache: LatentCache, sampler: Sampler, scaling_factor: float) -> dict[str, Panel]:
    """Decode cached latents times ``scaling_factor`` (training's own) with ``sampler``; the panel of each decoded clip by its name.

    ``folder`` is the run's. Every rank calls it and gets the same; rank 0 works. ``config.sampling.roundtrip_clips`` clips, evenly spread
    over the prepared ones; 0 turns it off (empty result, as when no clip file is left). Writes rung 2 of ``folder/ladder.json`` with
    PSNR per clip and the variants of precision and tiling; a resumed run whose ladder has it already for the same cache, VAE and factor
    reads it from there. Call it once before the first validation.
    """
    return {}
