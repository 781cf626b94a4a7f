"""The loss on clips kept away from training, at fixed timesteps and fixed noise: comparable from step to step and run to run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cogflow import ranks
from cogflow.data.cache import LatentCache
from cogflow.training.batch import HELDOUT_TIMESTEPS, Batch, heldout_batch
from cogflow.training.objective import Losses


@torch.no_grad()
def heldout_loss(
    cache: LatentCache, compute: Callable[[Batch], Losses], batch_size: int, scaling_factor: float, device: torch.device
) -> dict[str, float]:
    """``heldout/loss`` and its quarters by timestep; empty without held-out clips. Collective.

    Every rank runs the same number of forward passes; a rank without a share repeats the last one and does not count it.
    """
    pairs = [(index, timestep) for index in cache.holdout for timestep in HELDOUT_TIMESTEPS]
    if not pairs:
        return {}
    world, rank = ranks.world_size(), ranks.rank()
    chunks = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for turn in range(-(-len(chunks) // world)):
        place = turn * world + rank
        batch = heldout_batch(cache, chunks[min(place, len(chunks) - 1)], scaling_factor=scaling_factor)
        losses = compute(batch.to(device)).per_sample.double().cpu()
        if place < len(chunks):
            sums += by_quarter(losses, batch.timesteps)
    return quarters(ranks.total(sums.float().to(device)).double().cpu(), "heldout")


def by_quarter(per_sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Sums and counts ``[2, 4]`` (double) of losses by quarter of the 1000 timesteps."""
    which = (timesteps.cpu() // 250).clamp(0, 3)
    table = torch.zeros(2, 4, dtype=torch.float64)
    table[0].index_add_(0, which, per_sample.detach().double().cpu())
    table[1].index_add_(0, which, torch.ones(len(which), dtype=torch.float64))
    return table


def quarters(table: torch.Tensor, prefix: str) -> dict[str, float]:
    """``<prefix>/loss`` and ``<prefix>/loss_q1`` (least noise) to ``_q4``; quarters without a sample are left out."""
    values = {f"{prefix}/loss": float(table[0].sum() / table[1].sum().clamp(min=1))}
    for index in range(4):
        if table[1, index] > 0:
            values[f"{prefix}/loss_q{index + 1}"] = float(table[0, index] / table[1, index])
    return values
