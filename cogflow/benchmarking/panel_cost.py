"""What the panel costs: seconds per clip of 49x480x720, per part of it, with peak memory; and whether a GPU measures what a CPU does."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cogflow.data.shapes import draw, scenes
from cogflow.sharpness import artefacts, edges, spatial, temporal, tone
from cogflow.sharpness.frames import (
    finite_share,
    pooled,
    repeated_share,
    spatial_places,
    to_float,
    to_luma,
    triple_places,
)
from cogflow.sharpness.metrics import METRICS, chunks, measure, measure_batch

WHOLE = "whole panel"
WARM = 1  # calls before the clock starts


def cost(frames: int, height: int, width: int, repeats: int) -> dict[str, Any]:
    """Rows of {device, part, seconds, cpu_seconds, peak_gb}, and ``disagreement``: the largest difference between CPU and GPU per channel,
    relative to its value where that is above 1 (empty without a GPU). ``seconds`` of a part is over the frames that the panel looks at."""
    clip = sharp_clip(frames, height, width)
    rows = []
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        here = clip.to(device)
        name = (
            f"{device.type}, {torch.get_num_threads()} threads"
            if device.type == "cpu"
            else torch.cuda.get_device_name(device)
        )
        rows.append({"device": name, "part": WHOLE, **timed(partial(measure, here), device, repeats)})
        if device.type == "cuda":
            batch = torch.stack([here] * 4)
            found = timed(partial(measure_batch, batch), device, repeats)
            rows.append(
                {"device": name, "part": f"{WHOLE}, batch of 4, per clip", **found, "seconds": found["seconds"] / 4}
            )
        for part, run in parts(here).items():
            rows.append({"device": name, "part": part, **timed(run, device, repeats)})
    return {"rows": rows, "disagreement": disagreement(clip) if len(devices) > 1 else {}}


def sharp_clip(frames: int, height: int, width: int) -> Tensor:
    """A drawn clip, uint8: what a clip shows has no part in what it costs."""
    return torch.from_numpy(draw(scenes(1, seed=5)[0], frames, height, width))


def parts(clip: Tensor) -> dict[str, Callable[[], Any]]:
    """The panel's parts, each on the frames it looks at, made ready beforehand."""
    shown = to_float(torch.stack([clip[place] for place in spatial_places(len(clip))]))
    luma = to_luma(shown)
    small, red, blue = (pooled(pooled(one)) for one in (luma, shown[..., 0], shown[..., 2]))
    triples = to_luma(to_float(torch.stack([clip[start : start + 3] for start in triple_places(len(clip))])))

    def each(work: Callable[..., Any], *tensors: Tensor) -> Callable[[], Any]:
        return lambda: [
            work(*(one for one in group)) for group in zip(*(list(chunks(tensor)) for tensor in tensors), strict=True)
        ]

    return {
        "frames to luma": lambda: [
            to_luma(to_float(one)) for one in chunks(torch.stack([clip[place] for place in spatial_places(len(clip))]))
        ],
        "edge_sharpness, reblur": each(edges.log_slopes, luma),
        "wavelet_ratio, detail, grain": each(lambda one: spatial.noise_deviation(spatial.bands(one)[0][2]), luma),
        "blur_effect": each(spatial.blur_effect, luma),
        "contrast, haze, saturation": lambda: (
            tone.contrast(small),
            tone.dark_level(small),
            tone.saturation(red, blue, small),
        ),
        "clipped": each(tone.clipped, shown),
        "artefacts": each(artefacts.grid, luma),
        "motion, temporal_sharpness": each(temporal.energies, triples),
        "repeated, finite": lambda: (repeated_share(clip[None]), finite_share(clip[None])),
    }


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds (median of ``repeats``), seconds of all cores together (mean; they tell where a machine is shared) and peak memory in GB: on
    a GPU what torch held beyond the clip, on a CPU the process's peak so far."""
    for _ in range(WARM):
        run()
    seconds: list[float] = []
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    busy = time.process_time()
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    busy = (time.process_time() - busy) / repeats
    if on_gpu:
        peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": sorted(seconds)[len(seconds) // 2], "cpu_seconds": busy, "peak_gb": peak}


def disagreement(clip: Tensor) -> dict[str, float]:
    """Per channel the largest difference between the CPU's and the GPU's value of the clip and of half its size, relative above 1."""
    worst = dict.fromkeys(METRICS, 0.0)
    for one in (clip, clip[:, ::2, ::2], clip.float() / 255):
        here, there = measure(one), measure(one.cuda())
        for name in METRICS:
            worst[name] = max(worst[name], abs(here[name] - there[name]) / max(1.0, abs(here[name])))
    return worst
