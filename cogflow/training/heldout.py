"""The loss on clips kept away from training, at fixed timesteps and fixed noise: comparable from step to step and run to run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cogflow.data.cache import LatentCache
from cogflow.models.transformer_inputs import TransformerInputs
from cogflow.runtime import ranks
from cogflow.training import metric_table
from cogflow.training.batch import HELDOUT_TIMESTEPS, Batch, heldout_batch
from cogflow.training.sequence import RankPlacement


@torch.no_grad()
def heldout_table(
    cache: LatentCache,
    compute: Callable[[Batch], torch.Tensor],
    batch_size: int,
    inputs: TransformerInputs,
    device: torch.device,
    place: RankPlacement,
) -> torch.Tensor | None:
    """The table of :mod:`cogflow.training.metric_table` over all pairs of a held-out clip and a fixed timestep; ``None`` without such clips.

    Collective. ``compute`` gives the table of one batch. Every rank runs the same number of forward passes; a rank without a share
    repeats the last one and does not count it; ranks that share their batches count them once.
    """
    pairs = [(index, timestep) for index in cache.holdout for timestep in HELDOUT_TIMESTEPS]
    if not pairs:
        return None
    chunks = [
        chunk
        for alike in cache.alike(pairs)
        for chunk in (alike[at : at + batch_size] for at in range(0, len(alike), batch_size))
    ]
    sums = metric_table.empty(device)
    for turn in range(-(-len(chunks) // place.data_ranks)):
        number = turn * place.data_ranks + place.data_rank
        batch = heldout_batch(cache, chunks[min(number, len(chunks) - 1)], inputs=inputs)
        table = compute(batch.to(device))
        if number < len(chunks) and place.counts:
            sums += table
    return ranks.sum_over_ranks(sums).cpu()
