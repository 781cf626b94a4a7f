"""Choose the clips of each rank at each step by a pure function, so that a resumed run needs no saved loader state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def batch_indices(
    step: int,
    micro: int,
    *,
    train: Sequence[int],
    batch_size: int,
    accumulation: int,
    rank: int,
    world: int,
    seed: int,
    groups: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Return the ``batch_size`` elements of ``train`` for micro step ``micro`` of step ``step`` (both from 0) on
    ``rank`` of ``world``.

    All ranks together walk through one endless sequence of epochs. Each epoch is a new order of all of ``train``, and a
    batch may continue in the next epoch. The set of clips of one step depends only on the product accumulation * world:
    one rank with two micro steps trains on the same clips as two ranks with one.

    ``groups``: ``train`` divided into clips that fit into one batch (buckets, longest first); all elements are then
    from one group. Each group has an endless sequence of its own, and its remainder at the end of an epoch is carried
    into the next: no clip is dropped, and in each epoch a group gives as many batches as its share of the clips, in a
    new order. Within a step the longest come first, so that the ranks of one micro step wait little for each other.
    """
    if not train:
        raise ValueError("no clip to train on")
    if step < 0 or not 0 <= micro < accumulation or not 0 <= rank < world or batch_size < 1:
        raise ValueError(
            f"out of range: step {step}, micro {micro} of {accumulation}, rank {rank} of {world}, batch size {batch_size}"
        )
    filled = [group for group in groups if group]
    if len(filled) > 1:
        in_step = accumulation * world
        counts = tuple(len(group) for group in filled)
        batches = sorted(_batch(step * in_step + place, counts, batch_size, seed) for place in range(in_step))
        group, turn = batches[micro * world + rank]
        return _take(filled[group], turn * batch_size, batch_size, seed, group)
    return _take(train, ((step * accumulation + micro) * world + rank) * batch_size, batch_size, seed, 0)


def _take(line: Sequence[int], first: int, count: int, seed: int, group: int) -> list[int]:
    """Return ``count`` elements from place ``first`` of the endless sequence of epochs of ``line``."""
    picked = []
    for position in range(first, first + count):
        epoch, place = divmod(position, len(line))
        picked.append(line[int(_permutation(seed, epoch, len(line), group)[place])])
    return picked


def _batch(number: int, counts: tuple[int, ...], batch_size: int, seed: int) -> tuple[int, int]:
    """Return (group, number of the batch in its group) of batch ``number``, counted from 0 over all steps and ranks."""
    # This epoch is never too late: no epoch has given more than its share at its end.
    epoch = max(0, number * batch_size // sum(counts) - 1)
    while sum(_given(counts, epoch + 1, batch_size)) <= number:
        epoch += 1
    before = _given(counts, epoch, batch_size)
    labels, place = _labels(seed, epoch, counts, batch_size), number - sum(before)
    group = int(labels[place])
    return group, before[group] + int((labels[:place] == group).sum())


def _given(counts: tuple[int, ...], epochs: int, batch_size: int) -> list[int]:
    """Return the whole batches that each group has given after ``epochs`` epochs."""
    return [epochs * count // batch_size for count in counts]


@lru_cache(maxsize=4)
def _labels(seed: int, epoch: int, counts: tuple[int, ...], batch_size: int) -> np.ndarray:
    """Return the group of each batch of an epoch, in a new order each epoch."""
    before, after = _given(counts, epoch, batch_size), _given(counts, epoch + 1, batch_size)
    labels = np.repeat(np.arange(len(counts)), [then - now for now, then in zip(before, after, strict=True)])
    return np.random.default_rng([seed, epoch, 0xB0C7]).permutation(labels)


@lru_cache(
    maxsize=16
)  # a batch uses two epochs at most, unless the set is smaller than the batch; each group has its own
def _permutation(seed: int, epoch: int, count: int, group: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0x0DDE, *([group] if group else [])]).permutation(count)
