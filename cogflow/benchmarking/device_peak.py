"""Measure the peak speed of a device with one large matrix product and one large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5


@dataclass(frozen=True)
class DevicePeak:
    """Peak speeds. ``flops``: operations per second of a square matrix product of ``size`` in ``dtype``. ``copied``:
    bytes per second that a copy both reads and writes."""

    flops: float
    copied: float
    size: int
    dtype: str


def measure_device_peak(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """Return the best of :data:`REPEATS` tries, with as many threads as training uses.

    It takes seconds on a CPU and one second on a GPU.
    """
    gpu = device.type == "cuda"
    size, times, bytes_ = (8192, 20, 2**30) if gpu else (2048, 1, 2**28)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    product = _best_seconds(lambda: torch.mm(left, right, out=out), times, device)
    source, target = (torch.ones(bytes_ // 4, device=device) for _ in range(2))
    copy = _best_seconds(lambda: target.copy_(source), times, device)
    return DevicePeak(2 * size**3 / product, bytes_ / copy, size, str(dtype).removeprefix("torch."))


def _best_seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the seconds of one call: the best of :data:`REPEATS` rounds of ``times`` calls after a warm-up round."""
    rounds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append((time.perf_counter() - began) / times)
    return min(rounds[1:])
