"""How sharp each clip is, measured while it is prepared: the file at its own size, what the loader made of it, and what the loader should
have made of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogflow.config.data_section import DataConfig
from cogflow.data.buckets import sized
from cogflow.data.clips import Clip, corner, scaled_size
from cogflow.sharpness.effective_resolution import resolution, two_groups
from cogflow.sharpness.metrics import METRICS, change, measure

SMALLEST = 32  # pixels; smaller clips are not measured
RESAMPLED = 16  # clips whose frames are made again in another way, to check the loader
SPATIAL = tuple(name for name, channel in METRICS.items() if channel.group in ("blur", "tone", "grain"))
"""Channels that a few frames tell."""
ENOUGH = 0.8
"""A clip whose picture would fit into this share of the training size, in height and width, is named: a model learns its softness."""


def measured(clip: Clip, data: DataConfig, content: str, *, resampled: bool) -> dict[str, Any]:
    """Facts to keep with a clip: ``source`` (rung 0: ``panel``, ``effective`` size, ``reach``), ``detail`` of the clip, and with
    ``resampled`` the change of the loader's frames against Pillow's Lanczos on the same source frames (``loader``).

    Run in the thread that decodes; rung 1's ``panel`` is added by who has the clip on the device. All of it takes 2.4 s of one CPU core for
    49 frames of 480x720 from 720x1280. Empty for clips below 32 pixels.
    """
    if min(*clip.source.shape[1:3], *clip.frames.shape[1:3]) < SMALLEST:
        return {}
    reach = resolution(clip.source)
    facts: dict[str, Any] = {
        "source": {
            "panel": _spatial(clip.source),
            "effective": reach.effective,
            "scaled_up": reach.scaled_up,
            "reach": [round(share, 3) for share in reach.reach],
            "detail": round(reach.detail, 3),
        },
        "detail": round(resolution(clip.frames[list(clip.source_at)]).detail, 3),
    }
    if resampled:
        ours, theirs = _spatial(clip.frames[list(clip.source_at)]), _spatial(lanczos(clip.source, data, content))
        facts["loader"] = {name: change(name, ours[name], theirs[name]) for name in SPATIAL}
    return facts


def lanczos(source: torch.Tensor, data: DataConfig, content: str) -> torch.Tensor:
    """``source`` (uint8 ``[K, h, w, 3]``) on the clip's grid, resampled by Pillow instead of by the loader."""
    size = scaled_size((source.shape[1], source.shape[2]), data)
    down, right = corner(size, data, content)
    images = [Image.fromarray(frame) for frame in source.numpy()]
    if size != tuple(source.shape[1:3]):
        images = [image.resize((size[1], size[0]), Image.Resampling.LANCZOS) for image in images]
    frames = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(frames[:, down : down + data.height, right : right + data.width].copy())


def summary(facts: Mapping[str, Mapping[str, Any]], data: DataConfig) -> dict[str, Any]:
    """What the clips' facts (by name; with their ``bucket`` where there are buckets) say together.

    ``measured``: how many were. ``upscaled``: sizes (``WxH``) of clips smaller than wanted, with their counts. ``scaled_up``: by name the
    size that clips look scaled up from. ``groups``: the softer of two groups, or ``None``. ``loader``: median change by channel against the
    independent resampling, and over how many resized clips.
    """
    known = {name: one for name, one in facts.items() if one.get("panel")}
    sizes = Counter(
        f"{one['size'][1]}x{one['size'][0]}" for one in facts.values() if one.get("upscaled") and one.get("size")
    )
    scaled_up = {}
    for name, one in known.items():
        size, effective = one["size"], one["source"]["effective"]
        wanted = scaled_size((size[0], size[1]), sized(data, one.get("bucket")))
        if one["source"]["scaled_up"] and all(
            part < ENOUGH * whole for part, whole in zip(effective, wanted, strict=True)
        ):
            scaled_up[name] = f"{effective[1]}x{effective[0]}"
    groups = two_groups({name: one["detail"] for name, one in known.items()})
    compared = [one["loader"] for one in known.values() if one.get("loader") and any(map(abs, one["loader"].values()))]
    return {
        "measured": len(known),
        "upscaled": dict(sizes.most_common()),
        "scaled_up": scaled_up,
        "groups": None
        if groups is None
        else {"soft": list(groups.soft), "gap": groups.gap, "distance": groups.distance, "line": groups.line()},
        "loader": {
            "clips": len(compared),
            "changes": {name: median(one[name] for one in compared) for name in compared[0]} if compared else {},
        },
    }


def _spatial(frames: torch.Tensor) -> dict[str, float]:
    panel = measure(frames)
    return {name: panel[name] for name in SPATIAL if math.isfinite(panel[name])}
