"""Measure existing videos and compare them with others: at one size, pair by pair where the names agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from cogflow.artifacts.identify import ArtifactKind
from cogflow.sampling.clip_files import ReadClip, read_clips
from cogflow.sharpness.frames import SMALLEST
from cogflow.sharpness.metrics import Metrics, measure
from cogflow.sharpness.verdict import Change, Finding, compare

TEMPORAL_DEFECTS = ("smeared", "frozen", "identical")
"""Defects that depend on the frame rate: not judged where the rates differ."""
SAME_RATE = 1.02  # ratio of frame rates that count as equal
FRAMES_AT_ONCE = 16  # frames resized at once


@dataclass
class MeasuredClips:
    """Metrics of the clips of one place by name, with what a comparison needs: (height, width) and frame rate of each.

    ``raw``: no clip went through a codec; ``notes``: how clips were resized.
    """

    metrics: dict[str, Metrics] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    raw: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def common_size(self) -> tuple[int, int] | None:
        """(height, width) of all clips; ``None`` where they differ."""
        sizes = set(self.sizes.values())
        return sizes.pop() if len(sizes) == 1 else None


@dataclass(frozen=True)
class DescribedFinding:
    """A finding with its sentence, as ``sample.json`` holds it."""

    defect: str
    level: str
    metric: str
    size: float
    z: float
    line: str


@dataclass(frozen=True)
class ClipComparison:
    """The verdict on clips against reference clips, as ``sample.json`` holds it.

    ``worse``: some alarm's defect fails the stage; ``defects``: the defects of such alarms, largest z first;
    ``not_judged``: defects that are left out because the frame rates differ.
    """

    worse: bool
    blurrier: bool
    defects: list[str]
    findings: list[DescribedFinding]
    changes: dict[str, Change]
    pairing: str
    line: str
    not_judged: list[str]

    @property
    def failing_lines(self) -> list[str]:
        """The sentences of the findings that fail the stage."""
        return [finding.line for finding in self.findings if finding.defect in self.defects]


def measure_clips(place: Path, like: MeasuredClips | None = None, kind: ArtifactKind | None = None) -> MeasuredClips:
    """Measure every clip at ``place``. For ``kind`` see :func:`cogflow.sampling.clip_files.read_clips`.

    With ``like``, each clip is first resized to the clip of its name in ``like``, or to the common size of those
    clips. The metrics depend on the number of pixels: a clip of half the size looks sharper pixel by pixel, and a clip
    that was scaled up looks softer. Raise :class:`cogflow.errors.DataError` for files that cannot be read and
    ``ValueError`` for clips that are too small.
    """
    measured = MeasuredClips()
    for clip in read_clips(place, kind):
        size = (int(clip.frames.shape[1]), int(clip.frames.shape[2]))
        wanted = size if like is None else like.sizes.get(clip.name) or like.common_size or size
        if min(wanted) < SMALLEST:
            raise ValueError(f"{place}, {clip.name}: frames of {size[1]}x{size[0]} are too small to measure")
        if wanted != size:
            clip = ReadClip(clip.name, resize_frames(clip.frames, wanted), clip.fps, clip.raw)
            measured.notes.append(f"{clip.name}: {size[1]}x{size[0]} resized to {wanted[1]}x{wanted[0]}")
        measured.metrics[clip.name] = measure(clip.frames)
        measured.sizes[clip.name] = wanted
        measured.rates[clip.name] = clip.fps
        measured.raw &= clip.raw
    return measured


def compare_clips(ours: MeasuredClips, reference: MeasuredClips, fail_on: Sequence[str]) -> ClipComparison:
    """Compare ``ours`` with ``reference``. ``fail_on``: the defects that make the result ``worse``."""
    verdict = compare(ours.metrics, reference.metrics)
    not_judged = TEMPORAL_DEFECTS if rates_differ(ours, reference) else ()
    findings = [_described(finding) for finding in verdict.findings if finding.defect not in not_judged]
    alarms = [finding for finding in findings if finding.level == "alarm"]
    alarms.sort(key=lambda alarm: -abs(alarm.z))
    defects = [alarm.defect for alarm in alarms if alarm.defect in fail_on]
    return ClipComparison(
        worse=bool(defects),
        blurrier="soft" in defects,
        defects=defects,
        findings=findings,
        changes=verdict.changes,
        pairing=verdict.pairing,
        line=f"{'; '.join(finding.line for finding in findings) or 'nothing wrong'} ({verdict.pairing})",
        not_judged=list(not_judged),
    )


def rates_differ(ours: MeasuredClips, reference: MeasuredClips) -> bool:
    """Return whether any two known frame rates are more than 2 % apart."""
    rates = [rate for rate in [*ours.rates.values(), *reference.rates.values()] if rate > 0]
    return bool(rates) and max(rates) > SAME_RATE * min(rates)


def resize_frames(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return uint8 ``[T, H, W, 3]`` at (height, width), by antialiased bicubic interpolation."""
    resized = []
    for some in frames.split(FRAMES_AT_ONCE):
        planes = functional.interpolate(
            some.permute(0, 3, 1, 2).float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        resized.append(planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(resized).contiguous()


def mean_metrics(metrics: Mapping[str, Metrics]) -> Metrics:
    """Return the mean of each metric over the clips."""
    clips = list(metrics.values())
    return {name: sum(clip[name] for clip in clips) / len(clips) for name in clips[0]}


def _described(finding: Finding) -> DescribedFinding:
    return DescribedFinding(finding.defect, finding.level, finding.metric, finding.size, finding.z, finding.line())
