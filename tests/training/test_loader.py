"""Batches that are made ahead: the ones that are wanted, in their order, when training says so, and errors where they are waited for."""

from __future__ import annotations

import threading

import pytest
import torch

from cogflow.training.batch import Batch
from cogflow.training.loader import Loader

CPU = torch.device("cpu")


class Made:
    """Makes batches that know their place, and remembers which."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []
        self.threads: set[str] = set()

    def __call__(self, step: int, micro: int) -> Batch:
        self.places.append((step, micro))
        self.threads.add(threading.current_thread().name)
        if step == 7:
            raise ValueError("nothing to be read at step 7")
        value = torch.tensor([float(step), float(micro)])
        return Batch(value, value, value, value)


def place(batch: Batch) -> tuple[int, int]:
    step, micro = batch.latents.tolist()
    return int(step), int(micro)


def test_batches_come_in_order_and_are_made_ahead_when_training_says_so() -> None:
    made = Made()
    with Loader(made, 2, CPU, ahead=3) as loader:
        assert place(loader.take(4, 0)) == (4, 0) and made.places == [(4, 0)], (
            "nothing is made ahead before training says so"
        )
        loader.go_on()
        assert [place(loader.take(*at)) for at in ((4, 1), (5, 0), (5, 1))] == [(4, 1), (5, 0), (5, 1)]
        loader.go_on()
        loader.go_on()
        assert place(loader.take(6, 0)) == (6, 0)
    assert made.places[:5] == [(4, 0), (4, 1), (5, 0), (5, 1), (6, 0)] and len(made.places) == len(set(made.places))
    assert all(name.startswith("batches") for name in made.threads)


def test_what_is_not_wanted_is_thrown_away() -> None:
    made = Made()
    with Loader(made, 1, CPU, ahead=2) as loader:
        loader.take(3, 0)
        loader.go_on()
        assert place(loader.take(1, 0)) == (1, 0)
        loader.go_on()
        assert place(loader.take(2, 0)) == (2, 0)


def test_an_error_is_raised_where_its_batch_is_taken() -> None:
    with Loader(Made(), 1, CPU, ahead=2) as loader:
        loader.take(5, 0)
        loader.go_on()
        assert place(loader.take(6, 0)) == (6, 0)
        with pytest.raises(ValueError, match="step 7"):
            loader.take(7, 0)


def test_waiting_is_told_once() -> None:
    with Loader(Made(), 1, CPU) as loader:
        loader.take(0, 0)
        assert loader.spent() > 0 and loader.spent() == 0
