"""Rungs 3 to 5: samples before the first step, while training goes on, and of the exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogflow.data.cache import LatentCache


def base(folder: Path, record: Mapping[str, Any], *, family: str, scheduler: Any, vae: Any) -> None:
    """Rung 3 from ``record`` (``samples.json`` of step 0): its panels, and the scheduler's and the VAE's facts against ``family``'s.

    ``folder`` is the run's; ``family`` is ``config.model.name``. Rank 0 only.
    """


def tuned(folder: Path, record: Mapping[str, Any]) -> None:
    """Rung 4 from ``record`` (``samples.json`` of a later step). The newest stands. Rank 0 only."""


def schedule_evidence(
    folder: Path, transformer: Any, scheduler: Any, cache: LatentCache, scaling_factor: float, *, device: torch.device, dtype: torch.dtype
) -> None:
    """What the weights themselves say about the noise schedule, into rung 3: call once at step 0, before the first step.

    A few forward passes (some 12 of one clip each). Collective: every rank calls it with the same module (ZeRO-3 needs that).
    """
