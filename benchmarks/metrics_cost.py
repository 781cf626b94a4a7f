"""Measure seconds and memory of the sharpness metrics per clip, and the difference between GPU and CPU: ``python -m
benchmarks.metrics_cost``."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.output import add_size_options, new_parser, report
from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.benchmarking.step import device_name
from cogflow.data.shapes import draw, scenes
from cogflow.sharpness import frame_metrics
from cogflow.sharpness.filters import wavelet_bands
from cogflow.sharpness.frames import (
    finite_share,
    pool_2x2,
    repeated_share,
    spatial_indices,
    to_float,
    to_luma,
    triple_indices,
)
from cogflow.sharpness.metrics import METRICS, measure, measure_batch, split_chunks

ALL_METRICS = "all metrics"
WARM_UP = 1
"""Number of warm-up calls."""
BATCH = 4


@dataclass(frozen=True)
class PartCost:
    """One part of the metrics on one device. ``seconds``: median; ``cpu_seconds``: mean CPU time of all threads.

    ``peak_gb``: on a GPU the memory that torch allocated in addition to the clip, on a CPU the peak of the process so
    far.
    """

    device: str
    part: str
    seconds: float
    cpu_seconds: float
    peak_gb: float


@dataclass(frozen=True)
class MetricsCost:
    """All costs. ``disagreement``: metric -> largest difference between CPU and GPU, relative above 1; empty without a
    GPU.
    """

    rows: list[PartCost]
    disagreement: dict[str, float]


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("metrics_cost", __doc__)
    parser.add_argument("--repeats", type=int, default=3, help="number of timed calls; default: %(default)s")
    add_size_options(parser, 49, 480, 720)
    given = parser.parse_args(words)
    size = (given.frames, given.height, given.width)
    report(metrics_result(measure_metrics_cost(*size, given.repeats), size), given.output)


def metrics_result(found: MetricsCost, size: tuple[int, int, int]) -> BenchmarkResult:
    """Return ``found`` as a table with one row per device and part."""
    whole = [f"{row.seconds:.3f} s on {row.device}" for row in found.rows if row.part == ALL_METRICS]
    summary = f"metrics: one clip of {'x'.join(map(str, size))} in {', '.join(whole)}"
    if found.disagreement:
        summary += f"; CPU and GPU differ by at most {max(found.disagreement.values()):.1e}"
    rows: list[list[Cell]] = [[row.device, row.part, row.seconds, row.cpu_seconds, row.peak_gb] for row in found.rows]
    columns = ["device", "part", "seconds", "CPU seconds of all threads", "peak GB"]
    return BenchmarkResult(summary, columns, rows, asdict(found))


def measure_metrics_cost(frames: int, height: int, width: int, repeats: int) -> MetricsCost:
    """Measure all metrics and each part of them on a drawn clip, on the CPU and on the GPU, if there is one.

    The time of a part is that of the frames which it uses.
    """
    clip = drawn_clip(frames, height, width)
    rows = []
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        here = clip.to(device)
        rows.append(part_cost(ALL_METRICS, partial(measure, here), device, repeats))
        if device.type == "cuda":
            batch = part_cost("", partial(measure_batch, torch.stack([here] * BATCH)), device, repeats)
            rows.append(
                replace(batch, part=f"{ALL_METRICS}, batch of {BATCH}, per clip", seconds=batch.seconds / BATCH)
            )
        rows += [part_cost(part, run, device, repeats) for part, run in metric_parts(here).items()]
    return MetricsCost(rows, device_disagreement(clip) if len(devices) > 1 else {})


def drawn_clip(frames: int, height: int, width: int) -> Tensor:
    """Return a drawn clip, uint8 ``[frames, height, width, 3]``. The content does not change the cost."""
    return torch.from_numpy(draw(scenes(1, seed=5)[0], frames, height, width))


def metric_parts(clip: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the parts of the metrics, each on the frames that it uses, converted beforehand."""
    shown = to_float(torch.stack([clip[place] for place in spatial_indices(len(clip))]))
    luma = to_luma(shown)
    small, red, blue = (pool_2x2(pool_2x2(one)) for one in (luma, shown[..., 0], shown[..., 2]))
    triples = to_luma(to_float(torch.stack([clip[start : start + 3] for start in triple_indices(len(clip))])))

    def each(work: Callable[..., Any], *tensors: Tensor) -> Callable[[], Any]:
        return lambda: [work(*group) for group in zip(*(list(split_chunks(tensor)) for tensor in tensors), strict=True)]

    return {
        "frames to luma": lambda: [
            to_luma(to_float(one))
            for one in split_chunks(torch.stack([clip[place] for place in spatial_indices(len(clip))]))
        ],
        "edge_sharpness, reblur": each(frame_metrics.edge_log_slopes, luma),
        "wavelet_ratio, detail, grain": each(lambda one: frame_metrics.noise_deviation(wavelet_bands(one)[0][2]), luma),
        "blur_effect": each(frame_metrics.blur_effect, luma),
        "contrast, haze, saturation": lambda: (
            frame_metrics.contrast(small),
            frame_metrics.dark_level(small),
            frame_metrics.saturation(red, blue, small),
        ),
        "clipped": each(frame_metrics.clipped, shown),
        "artefacts": each(frame_metrics.block_grid, luma),
        "motion, temporal_sharpness": each(frame_metrics.temporal_energies, triples),
        "repeated, finite": lambda: (repeated_share(clip[None]), finite_share(clip[None])),
    }


def part_cost(part: str, run: Callable[[], Any], device: torch.device, repeats: int) -> PartCost:
    """Return the cost of ``run`` over ``repeats`` calls."""
    for _ in range(WARM_UP):
        run()
    seconds: list[float] = []
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    cpu_began = time.process_time()
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    cpu_seconds = (time.process_time() - cpu_began) / repeats
    if on_gpu:
        peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return PartCost(device_name(device), part, sorted(seconds)[len(seconds) // 2], cpu_seconds, peak)


def device_disagreement(clip: Tensor) -> dict[str, float]:
    """Return metric -> largest difference between CPU and GPU on the clip, at half its size and in floats, relative
    above 1."""
    worst = dict.fromkeys(METRICS, 0.0)
    for version in (clip, clip[:, ::2, ::2], clip.float() / 255):
        here, there = measure(version), measure(version.cuda())
        for name in METRICS:
            worst[name] = max(worst[name], abs(here[name] - there[name]) / max(1.0, abs(here[name])))
    return worst


if __name__ == "__main__":
    main()
