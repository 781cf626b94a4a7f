"""Test the order of clips: each comes once an epoch, and the order depends only on its arguments."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from cogflow.data.batch_order import BatchOrder

TRAIN = [3, 4, 8, 9, 11, 12, 20]


def walk(
    steps: range, world: int, accumulation: int, batch_size: int, seed: int = 0, train: list[int] | None = None
) -> list[int]:
    """Return all clips in the order in which all ranks together take them."""
    taken = []
    for step, micro, rank in itertools.product(steps, range(accumulation), range(world)):
        order = BatchOrder(train or TRAIN, batch_size, accumulation, rank, world, seed)
        taken += order.indices(step, micro)
    return taken


@pytest.mark.parametrize(
    ("world", "accumulation", "batch_size"), [(1, 1, 1), (1, 1, 3), (2, 1, 2), (3, 2, 1), (2, 2, 5), (1, 1, 16)]
)
def test_each_clip_comes_once_an_epoch_over_all_ranks(world: int, accumulation: int, batch_size: int) -> None:
    taken = walk(range(14), world, accumulation, batch_size)
    epochs = [taken[i : i + len(TRAIN)] for i in range(0, len(taken) - len(TRAIN) + 1, len(TRAIN))]
    assert len(epochs) >= 2 and all(sorted(epoch) == TRAIN for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) * 0.8


def test_resuming_continues_in_the_same_order() -> None:
    assert walk(range(10), 2, 2, 3) == walk(range(6), 2, 2, 3) + walk(range(6, 10), 2, 2, 3)


def test_a_step_takes_the_same_clips_on_another_number_of_ranks() -> None:
    for step in range(8):
        sets = [sorted(walk(range(step, step + 1), w, a, 2)) for w, a in ((4, 1), (2, 2), (1, 4))]
        assert sets[0] == sets[1] == sets[2]


def test_the_seed_alone_changes_the_order() -> None:
    assert walk(range(4), 1, 1, 7, seed=1) == walk(range(4), 1, 1, 7, seed=1) != walk(range(4), 1, 1, 7, seed=2)


def test_a_set_smaller_than_the_batch_is_repeated() -> None:
    assert walk(range(3), 1, 1, 4, train=[5]) == [5] * 12


def test_arguments_out_of_range_are_refused() -> None:
    good: dict[str, Any] = {"train": TRAIN, "batch_size": 2, "accumulation": 2, "rank": 0, "world": 1, "seed": 0}
    for step, micro, change in (
        (-1, 0, {}),
        (0, 2, {}),
        (0, 0, {"rank": 1}),
        (0, 0, {"train": []}),
        (0, 0, {"batch_size": 0}),
    ):
        with pytest.raises(ValueError, match="out of range|no clip to train on"):
            BatchOrder(**{**good, **change}).indices(step, micro)


GROUPS = [[0, 1, 2, 3, 4], [5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
ALL = [place for group in GROUPS for place in group]


def batches(steps: range, world: int, accumulation: int, batch_size: int) -> list[list[int]]:
    settings: dict[str, Any] = {
        "train": ALL,
        "groups": GROUPS,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "seed": 0,
    }
    turns = itertools.product(steps, range(accumulation), range(world))
    return [BatchOrder(rank=rank, world=world, **settings).indices(step, micro) for step, micro, rank in turns]


@pytest.mark.parametrize(("world", "accumulation", "batch_size"), [(1, 1, 1), (1, 1, 3), (2, 2, 2), (4, 1, 3)])
def test_a_batch_has_one_bucket_and_all_clips_come_equally_often(
    world: int, accumulation: int, batch_size: int
) -> None:
    taken = batches(range(60), world, accumulation, batch_size)
    assert all(any(set(batch) <= set(group) for group in GROUPS) for batch in taken)
    counts = [sum(batch.count(place) for batch in taken) for place in ALL]
    epochs = len(taken) * batch_size / len(ALL)
    assert min(counts) >= epochs - 1 - batch_size and max(counts) <= epochs + 1 + batch_size
    assert batches(range(60), world, accumulation, batch_size) == batches(
        range(25), world, accumulation, batch_size
    ) + batches(range(25, 60), world, accumulation, batch_size)


def test_a_step_takes_the_same_batches_on_another_number_of_ranks_the_longest_first() -> None:
    for step in range(12):
        ways = [
            batches(range(step, step + 1), world, accumulation, 2) for world, accumulation in ((4, 1), (2, 2), (1, 4))
        ]
        assert ways[0] == ways[1] == ways[2]
        places = [next(number for number, group in enumerate(GROUPS) if batch[0] in group) for batch in ways[0]]
        assert places == sorted(places)


def test_one_bucket_has_the_order_without_buckets() -> None:
    plain = BatchOrder(TRAIN, batch_size=3, accumulation=1, rank=0, world=1, seed=5)
    grouped = replace(plain, groups=[[], TRAIN])
    assert [grouped.indices(step, 0) for step in range(9)] == [plain.indices(step, 0) for step in range(9)]
