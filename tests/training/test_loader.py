"""Test that prefetched batches come in order, on request, and that errors are raised where the batch is taken."""

from __future__ import annotations

import threading

import pytest
import torch

from cogflow.training.batch import Batch, Loader

CPU = torch.device("cpu")


class BatchMaker:
    """Makes batches that hold their step and micro step, and records which it made."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []
        self.threads: set[str] = set()

    def __call__(self, step: int, micro: int) -> Batch:
        self.made.append((step, micro))
        self.threads.add(threading.current_thread().name)
        if step == 7:
            raise ValueError("there is nothing to read at step 7")
        value = torch.tensor([float(step), float(micro)])
        return Batch(value, value, value, value)


def key_of(batch: Batch) -> tuple[int, int]:
    step, micro = batch.latents.tolist()
    return int(step), int(micro)


def test_batches_come_in_order_and_are_prefetched_on_request() -> None:
    maker = BatchMaker()
    with Loader(maker, 2, CPU, prefetch=3) as loader:
        assert key_of(loader.take(4, 0)) == (4, 0)
        assert maker.made == [(4, 0)], "nothing is prefetched before the request"
        loader.start_prefetch()
        assert [key_of(loader.take(*at)) for at in ((4, 1), (5, 0), (5, 1))] == [(4, 1), (5, 0), (5, 1)]
        loader.start_prefetch()
        loader.start_prefetch()
        assert key_of(loader.take(6, 0)) == (6, 0)
    assert maker.made[:5] == [(4, 0), (4, 1), (5, 0), (5, 1), (6, 0)]
    assert len(maker.made) == len(set(maker.made))
    assert all(name.startswith("batches") for name in maker.threads)


def test_a_prefetched_batch_that_is_not_wanted_is_discarded() -> None:
    with Loader(BatchMaker(), 1, CPU, prefetch=2) as loader:
        loader.take(3, 0)
        loader.start_prefetch()
        assert key_of(loader.take(1, 0)) == (1, 0)
        loader.start_prefetch()
        assert key_of(loader.take(2, 0)) == (2, 0)


def test_an_error_is_raised_where_its_batch_is_taken() -> None:
    with Loader(BatchMaker(), 1, CPU, prefetch=2) as loader:
        loader.take(5, 0)
        loader.start_prefetch()
        assert key_of(loader.take(6, 0)) == (6, 0)
        with pytest.raises(ValueError, match="step 7"):
            loader.take(7, 0)


def test_waited_seconds_are_returned_once() -> None:
    with Loader(BatchMaker(), 1, CPU) as loader:
        loader.take(0, 0)
        assert loader.take_waited() > 0
        assert loader.take_waited() == 0
