"""Batches made ahead of the step that wants them, in a thread: reading, noise and pinned memory cost the step nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from cogflow.training.batch import Batch


class Loader:
    """``make(step, micro)`` gives a batch on the CPU, a pure function: what was made ahead and is not wanted is thrown away.

    ``ahead``: micro batches in the making or waiting; one of 49x480x720 with its noise is 10 MB.

    ``waited``: seconds for which training stood still for its data since :meth:`spent` was asked last.
    """

    def __init__(
        self, make: Callable[[int, int], Batch], accumulation: int, device: torch.device, ahead: int = 2
    ) -> None:
        self._make, self._accumulation, self._device, self._most = make, accumulation, device, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[tuple[tuple[int, int], Future[Batch]]] = deque()
        self._last = (0, -1)
        self._waited = 0.0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int, micro: int) -> Batch:
        """The batch of ``micro`` step of ``step``, on the device. Raises what making it raised."""
        began = time.perf_counter()
        wanted = (step, micro)
        if not self._ahead or self._ahead[0][0] != wanted:
            self._ahead.clear()
            self._request(wanted)
        self._last, future = self._ahead.popleft()
        batch = future.result()
        self._waited += time.perf_counter() - began
        return batch.to(self._device)

    def go_on(self) -> None:
        """Make what follows the batch that was taken last. To be called where training leaves Python alone for long, before a backward
        pass: two threads that want to run Python at once cost each other a millisecond."""
        place = self._ahead[-1][0] if self._ahead else self._last
        while len(self._ahead) < self._most:
            place = (place[0], place[1] + 1) if place[1] + 1 < self._accumulation else (place[0] + 1, 0)
            self._request(place)

    def spent(self) -> float:
        """Seconds waited for batches since this was asked last."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def _request(self, place: tuple[int, int]) -> None:
        self._ahead.append((place, self._pool.submit(self._pinned, place)))

    def _pinned(self, place: tuple[int, int]) -> Batch:
        batch = self._make(*place)
        return batch.pinned() if self._device.type == "cuda" else batch
