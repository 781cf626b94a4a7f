"""Videos that exist, measured and held against others: at one size, pair by pair where the names agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cogflow.sampling.clip_files import ReadClip, read_clips
from cogflow.sharpness.metrics import Metrics, measure
from cogflow.sharpness.verdict import Verdict, compare

IN_TIME = ("smeared", "frozen", "identical")
"""Kinds that depend on the frame rate: not judged where the rates differ."""
SMALLEST = 24  # pixels of the shorter side, below which the panel has nothing to measure


@dataclass
class Scored:
    """Panels of the clips of one place by name, with what must be known to compare them: (height, width) and rate of each."""

    panels: dict[str, Metrics] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    raw: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def common_size(self) -> tuple[int, int] | None:
        found = set(self.sizes.values())
        return found.pop() if len(found) == 1 else None


def score(place: Path, like: Scored | None = None) -> Scored:
    """Measure every clip at ``place``. With ``like`` each clip is first brought to the size of its namesake there, or of all there.

    The number of pixels decides what a blur of one pixel is: a clip of half the size looks sharper pixel by pixel, and one that was
    scaled up softer. Sizes change by antialiased bicubic interpolation. Raises :class:`cogflow.errors.DataError`; ``ValueError`` for
    clips that are too small.
    """
    found = Scored()
    for clip in read_clips(place):
        size = (int(clip.frames.shape[1]), int(clip.frames.shape[2]))
        wanted = like and (like.sizes.get(clip.name) or like.common_size)
        if min(wanted or size) < SMALLEST:
            raise ValueError(f"{place}, {clip.name}: frames of {size[1]}x{size[0]} are too small to measure")
        if wanted and wanted != size:
            clip = ReadClip(clip.name, resized(clip.frames, wanted), clip.fps, clip.raw)
            found.notes.append(f"{clip.name}: {size[1]}x{size[0]} brought to {wanted[1]}x{wanted[0]}")
        found.panels[clip.name], found.sizes[clip.name], found.rates[clip.name] = (
            measure(clip.frames),
            wanted or size,
            clip.fps,
        )
        found.raw &= clip.raw
    return found


def against(ours: Scored, reference: Scored, fail_on: Sequence[str]) -> dict[str, Any]:
    """The verdict as a record. ``worse``: some alarm is of a kind in ``fail_on``; ``kinds``: those, the largest first."""
    verdict = compare(ours.panels, reference.panels)
    skipped = IN_TIME if rates_differ(ours, reference) else ()
    findings = [finding for finding in verdict.findings if finding.kind not in skipped]
    alarms = sorted((finding for finding in findings if finding.level == "alarm"), key=lambda finding: -abs(finding.z))
    kinds = [finding.kind for finding in alarms if finding.kind in fail_on]
    return {
        "worse": bool(kinds),
        "blurrier": "soft" in kinds,
        "kinds": kinds,
        "findings": [asdict(finding) | {"line": finding.line()} for finding in findings],
        "changes": {name: asdict(one) for name, one in verdict.changes.items()},
        "pairing": verdict.pairing,
        "line": told(verdict, [finding.line() for finding in findings]),
        "not_judged": list(skipped),
    }


def told(verdict: Verdict, lines: Sequence[str]) -> str:
    return f"{'; '.join(lines) or 'nothing wrong'} ({verdict.pairing})"


def rates_differ(ours: Scored, reference: Scored) -> bool:
    """Whether any two known frame rates are more than 2 % apart."""
    rates = [rate for rate in [*ours.rates.values(), *reference.rates.values()] if rate > 0]
    return bool(rates) and max(rates) > 1.02 * min(rates)


def resized(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 ``[T, H, W, 3]`` at (height, width), some frames at a time."""
    parts = []
    for some in frames.split(16):
        planes = functional.interpolate(
            some.permute(0, 3, 1, 2).float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        parts.append(planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(parts).contiguous()


def mean(panels: Mapping[str, Metrics]) -> Metrics:
    return {key: sum(panel[key] for panel in panels.values()) / len(panels) for key in next(iter(panels.values()))}
