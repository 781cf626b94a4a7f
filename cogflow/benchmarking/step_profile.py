"""Where the time of a step goes: kernels by what they do, beside the floor of each, and the time in which nothing runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cogflow.benchmarking.ceiling import Ceiling
from cogflow.planning.flops import ForwardFlops

KINDS = (
    ("attention", re.compile(r"sdpa|fmha|flash|attention", re.IGNORECASE)),
    ("linear layers", re.compile(r"gemm|nvjet|cutlass|cublas|splitk|addmm|\bmm\b", re.IGNORECASE)),
    ("optimizer", re.compile(r"multi_tensor|adam|foreach", re.IGNORECASE)),
    ("compiled", re.compile(r"triton|cpp_fused|inductor", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|copy|cat", re.IGNORECASE)),
)
"""A kernel is of the first kind whose words its name holds, else of :data:`OTHER`."""

OTHER, IDLE = "other", "nothing runs"


@dataclass(frozen=True)
class Part:
    """Seconds of one step; ``floor``: those that its operations take at the ceiling, 0 where none are useful. ``largest``: its kernels that
    take longest, with their seconds."""

    kind: str
    seconds: float
    floor: float
    launches: int
    largest: list[tuple[str, float]]


def profiled(
    step: Callable[[], object], device: torch.device, forward: ForwardFlops, clips: int, best: Ceiling
) -> list[Part]:
    """One ``step``, which trains on so many clips, by kind; the last part is the time in which nothing runs. On a CPU operations stand for
    kernels, and Python's own time between them for the last."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - began
    ran = kernels(found.events()) if gpu else operations(found.events())
    floors = {
        "attention": 3 * forward.attention * clips / best.flops,
        "linear layers": 3 * forward.linear * clips / best.flops,
    }
    parts = []
    for kind in (*(name for name, _ in KINDS), OTHER):
        by_name: dict[str, float] = {}
        for one in ran:
            if kind_of(one.name) == kind:
                by_name[one.name] = by_name.get(one.name, 0.0) + one.seconds
        launches = sum(kind_of(one.name) == kind for one in ran)
        parts.append(
            Part(
                kind,
                sum(by_name.values()),
                floors.get(kind, 0.0),
                launches,
                sorted(by_name.items(), key=lambda item: -item[1])[:4],
            )
        )
    busy = covered((one.start, one.start + one.seconds) for one in ran) if gpu else sum(one.seconds for one in ran)
    return [*parts, Part(IDLE, max(0.0, whole - busy), 0.0, 0, [])]


@dataclass(frozen=True)
class Ran:
    """A kernel or an operation, in seconds."""

    name: str
    start: float
    seconds: float


def kernels(events: Iterable[Any]) -> list[Ran]:
    """What ran on a GPU."""
    gpu = torch.autograd.DeviceType.CUDA
    return [
        Ran(event.name, event.time_range.start / 1e6, (event.time_range.end - event.time_range.start) / 1e6)
        for event in events
        if event.device_type == gpu
    ]


def operations(events: Iterable[Any]) -> list[Ran]:
    """What ran on a CPU, each without what it called."""
    return [Ran(event.name, event.time_range.start / 1e6, event.self_cpu_time_total / 1e6) for event in events]


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS if words.search(name)), OTHER)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what ``spans`` cover together."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
