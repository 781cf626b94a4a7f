"""Divide the time of a training step into kinds of kernels, with a lower bound for each kind, and the time without any
kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cogflow.benchmarking.device_peak import DevicePeak
from cogflow.training.flops import ForwardFlops

KINDS = (
    ("attention", re.compile(r"sdpa|fmha|flash|attention", re.IGNORECASE)),
    ("linear layers", re.compile(r"gemm|nvjet|cutlass|cublas|splitk|addmm|\bmm\b", re.IGNORECASE)),
    ("optimizer", re.compile(r"multi_tensor|adam|foreach", re.IGNORECASE)),
    ("compiled", re.compile(r"triton|cpp_fused|inductor", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|copy|cat", re.IGNORECASE)),
)
"""A kernel is of the first kind whose pattern its name matches, else of :data:`OTHER`."""

OTHER = "other"
IDLE = "idle"
LARGEST = 4


@dataclass(frozen=True)
class ProfilePart:
    """Kernels of one ``kind`` in one step; times in seconds. ``floor``: the time of their useful operations at the
    device's peak, 0 without useful operations. ``largest``: names and seconds of the slowest kernels."""

    kind: str
    seconds: float
    floor: float
    launches: int
    largest: list[tuple[str, float]]


def profile_step(
    step: Callable[[], object], device: torch.device, *, forward: ForwardFlops, clips: int, peak: DevicePeak
) -> list[ProfilePart]:
    """Run ``step``, which trains on ``clips`` clips, and return its time by kind; the last part is the time without any
    kernel.

    On a CPU the parts are operations instead of kernels, and the last part is the time in Python between them.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as trace:
        began = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - began
    runs = gpu_kernels(trace.events()) if gpu else cpu_operations(trace.events())
    floors = {
        "attention": 3 * forward.attention * clips / peak.flops,
        "linear layers": 3 * forward.linear * clips / peak.flops,
    }
    kinds = (*(name for name, _ in KINDS), OTHER)
    parts = [_part(kind, [run for run in runs if kind_of(run.name) == kind], floors.get(kind, 0.0)) for kind in kinds]
    spans = [(run.start, run.start + run.seconds) for run in runs]
    busy = covered_length(spans) if gpu else sum(run.seconds for run in runs)
    return [*parts, ProfilePart(IDLE, max(0.0, whole - busy), 0.0, 0, [])]


@dataclass(frozen=True)
class KernelRun:
    """One run of a kernel or an operation; times in seconds."""

    name: str
    start: float
    seconds: float


def _part(kind: str, runs: list[KernelRun], floor: float) -> ProfilePart:
    by_name: dict[str, float] = {}
    for run in runs:
        by_name[run.name] = by_name.get(run.name, 0.0) + run.seconds
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:LARGEST]
    return ProfilePart(kind, sum(by_name.values()), floor, len(runs), largest)


def gpu_kernels(events: Iterable[Any]) -> list[KernelRun]:
    """Return the kernels of a GPU trace."""
    gpu = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    return [
        KernelRun(event.name, event.time_range.start / 1e6, (event.time_range.end - event.time_range.start) / 1e6)
        for event in events
        if event.device_type == gpu
    ]


def cpu_operations(events: Iterable[Any]) -> list[KernelRun]:
    """Return the operations of a CPU trace, each without the time of the operations that it calls."""
    return [KernelRun(event.name, event.time_range.start / 1e6, event.self_cpu_time_total / 1e6) for event in events]


def kind_of(name: str) -> str:
    """Return the kind of the kernel or operation ``name``."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), OTHER)


def covered_length(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of ``spans`` (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
