"""Which clips each rank takes at each step: a pure function, so that a resumed run needs no saved loader state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def indices(
    step: int, micro: int, *, train: Sequence[int], batch_size: int, accumulation: int, rank: int, world: int, seed: int
) -> list[int]:
    """The ``batch_size`` elements of ``train`` for micro step ``micro`` of step ``step`` (both from 0) on ``rank`` of ``world``.

    All ranks together walk through one endless line of epochs; each epoch is a new order of all of ``train``, and
    batches run on over the edge between two. The clips of one step as a set depend on accumulation * world only through
    their product, so one rank with two micro steps trains on the same clips as two ranks with one.
    """
    if not train:
        raise ValueError("no clip to train on")
    if step < 0 or not 0 <= micro < accumulation or not 0 <= rank < world or batch_size < 1:
        raise ValueError(f"out of range: step {step}, micro {micro} of {accumulation}, rank {rank} of {world}, batch size {batch_size}")
    first = ((step * accumulation + micro) * world + rank) * batch_size
    picked = []
    for position in range(first, first + batch_size):
        epoch, place = divmod(position, len(train))
        picked.append(train[int(_permutation(seed, epoch, len(train))[place])])
    return picked


@lru_cache(maxsize=4)  # a batch touches two epochs at most, unless the set is smaller than the batch
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0x0DDE]).permutation(count)
