"""What a device reaches at best, measured on the spot: one large matrix product, one large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5


@dataclass(frozen=True)
class Ceiling:
    """``flops``: operations a second of a square product of ``size`` in ``dtype``; ``copied``: bytes a second read and as many written."""

    flops: float
    copied: float
    size: int
    dtype: str


def ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """The best of several tries each, with the threads that training has, too. A CPU takes seconds for it, a GPU a second."""
    gpu = device.type == "cuda"
    size, times, bytes_ = (8192, 20, 2**30) if gpu else (2048, 1, 2**28)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    best = _best(lambda: torch.mm(left, right, out=out), times, device)
    source, target = (torch.ones(bytes_ // 4, device=device) for _ in range(2))
    copied = _best(lambda: target.copy_(source), times, device)
    return Ceiling(2 * size**3 / best, bytes_ / copied, size, str(dtype).removeprefix("torch."))


def _best(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call, the best of :data:`REPEATS` rounds of ``times``."""
    found = []
    for _ in range(REPEATS + 1):  # the first warms up
        began = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - began) / times)
    return min(found[1:])
