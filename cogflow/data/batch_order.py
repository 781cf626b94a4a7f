"""Choose the clips of each rank at each step by a pure function, so that a resumed run needs no saved loader state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class BatchOrder:
    """Batches of one of ``world`` ranks: ``batch_size`` elements of ``train`` in each of ``accumulation`` micro steps.

    All ranks together read one endless sequence of epochs. Each epoch is a new order of all of ``train``, and a batch
    may continue in the next epoch. The set of clips of one step depends only on the product accumulation * world: one
    rank with two micro steps trains on the same clips as two ranks with one.

    ``groups``: ``train`` divided by size (buckets, longest first); all elements of a batch are then from one group.
    Each group has its own endless sequence, and its remainder at the end of an epoch is carried into the next. No clip
    is dropped. In each epoch the number of batches of a group follows its share of the clips, and the batches have a
    new order. Within a step the longest come first, so that the ranks of one micro step have similar work.
    """

    train: Sequence[int]
    batch_size: int
    accumulation: int
    rank: int
    world: int
    seed: int
    groups: Sequence[Sequence[int]] = ()

    def indices(self, step: int, micro: int) -> list[int]:
        """Return the elements of ``train`` for micro step ``micro`` of step ``step``, both counted from 0.

        Raises ``ValueError`` for an empty ``train`` or a number out of range.
        """
        if not self.train:
            raise ValueError("no clip to train on")
        if step < 0 or not 0 <= micro < self.accumulation or not 0 <= self.rank < self.world or self.batch_size < 1:
            raise ValueError(
                f"out of range: step {step}, micro {micro} of {self.accumulation}, rank {self.rank} of {self.world}, "
                f"batch size {self.batch_size}"
            )
        filled = [group for group in self.groups if group]
        if len(filled) > 1:
            in_step = self.accumulation * self.world
            counts = tuple(len(group) for group in filled)
            numbers = range(step * in_step, (step + 1) * in_step)
            batches = sorted(_batch(number, counts, self.batch_size, self.seed) for number in numbers)
            group, turn = batches[micro * self.world + self.rank]
            return _take(filled[group], turn * self.batch_size, self.batch_size, self.seed, group)
        number = (step * self.accumulation + micro) * self.world + self.rank
        return _take(self.train, number * self.batch_size, self.batch_size, self.seed, 0)


def _take(line: Sequence[int], first: int, count: int, seed: int, group: int) -> list[int]:
    """Return ``count`` elements from position ``first`` of the endless sequence of epochs of ``line``."""
    picked = []
    for position in range(first, first + count):
        epoch, place = divmod(position, len(line))
        picked.append(line[int(_permutation(seed, epoch, len(line), group)[place])])
    return picked


def _batch(number: int, counts: tuple[int, ...], batch_size: int, seed: int) -> tuple[int, int]:
    """Return (group, number of the batch in its group) of batch ``number``, counted from 0 over all steps and ranks."""
    # The search starts at an epoch that is never too late, because ``_given`` rounds down.
    epoch = max(0, number * batch_size // sum(counts) - 1)
    while sum(_given(counts, epoch + 1, batch_size)) <= number:
        epoch += 1
    before = _given(counts, epoch, batch_size)
    labels, place = _labels(seed, epoch, counts, batch_size), number - sum(before)
    group = int(labels[place])
    return group, before[group] + int((labels[:place] == group).sum())


def _given(counts: tuple[int, ...], epochs: int, batch_size: int) -> list[int]:
    """Return the number of whole batches of each group in the first ``epochs`` epochs."""
    return [epochs * count // batch_size for count in counts]


@lru_cache(maxsize=4)
def _labels(seed: int, epoch: int, counts: tuple[int, ...], batch_size: int) -> np.ndarray:
    """Return the group of each batch of an epoch, in a new order each epoch."""
    before, after = _given(counts, epoch, batch_size), _given(counts, epoch + 1, batch_size)
    labels = np.repeat(np.arange(len(counts)), [then - now for now, then in zip(before, after, strict=True)])
    return np.random.default_rng([seed, epoch, 0xB0C7]).permutation(labels)


# A batch uses two epochs of its group at most, unless the group is smaller than the batch.
@lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, count: int, group: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0x0DDE, *([group] if group else [])]).permutation(count)
