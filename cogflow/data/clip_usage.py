"""Report what of the clips is not trained on: unlisted files, cut time and picture, and clips that hold little."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogflow.config.data_section import DataConfig
from cogflow.data.buckets import at_bucket_size
from cogflow.data.clip_index import EXTENSIONS, find_layout, unlisted_videos
from cogflow.data.data_changes import NameList
from cogflow.data.holdout import holdout_warnings
from cogflow.data.quarantine import QUARANTINE, read_quarantine
from cogflow.records.cache_records import CacheCounts, CacheEntry, CacheIndex, StoredClip

ENOUGH_FPS = 0.99
"""Share of ``data.fps`` below which a clip counts as slower."""
LONGER = 1.25
"""Ratio of a clip's length to the length that is taken of it above which it counts as longer."""
CROPPED = 0.25
"""Share of the picture that a crop cuts off above which a clip counts as cropped."""


def count_usage(
    entries: Sequence[CacheEntry], clips: Mapping[str, StoredClip], data: DataConfig, *, unreadable: int
) -> CacheCounts:
    """Return the counts of clips that are not used as they are. ``clips``: the record of each clip by its name."""
    used = [_used_part(clips[entry.name], at_bucket_size(data, entry.bucket)) for entry in entries]
    seconds = [(part.seconds, part.taken) for part in used]
    contents = Counter(entry.clip for entry in entries)
    return CacheCounts(
        unreadable=unreadable,
        upscaled=sum(clips[entry.name].upscaled for entry in entries),
        slower=sum(clips[entry.name].fps < ENOUGH_FPS * data.fps for entry in entries),
        longer=sum(whole > LONGER * taken for whole, taken in seconds),
        cropped=sum(part.cut > CROPPED for part in used),
        duplicates=sum(count - 1 for count in contents.values()),
        seconds=round(sum(whole for whole, _ in seconds), 3),
        taken_seconds=round(sum(min(pair) for pair in seconds), 3),
    )


@dataclass(frozen=True)
class _UsedPart:
    """``seconds``: length of a clip; ``taken``: length that a sample has; ``cut``: share of the picture that is cut
    off.
    """

    seconds: float
    taken: float
    cut: float


def _used_part(clip: StoredClip, data: DataConfig) -> _UsedPart:
    height, width = clip.size
    if data.resize == "none":
        cut = 1 - data.height * data.width / (height * width)
    elif data.resize == "cover":
        cut = 1 - math.exp(-abs(math.log(height * data.width / (width * data.height))))
    else:
        cut = 0.0
    return _UsedPart(clip.frames / clip.fps if clip.fps > 0 else 0.0, data.frames / data.fps, cut)


def usage_warnings(folder: Path, index: CacheIndex) -> list[str]:
    """Return a sentence on each kind of clip that harms the training, and on the clips that were left out.

    ``folder``: of the cache.
    """
    counts, settings, total = index.counts, index.settings, len(index.entries)
    warnings = []
    if left_out := left_out_line(folder):
        warnings.append(left_out)
    if counts.upscaled:
        size = "their bucket" if settings.buckets else f"{settings.width}x{settings.height}"
        sizes = ", ".join(f"{count} of {own}" for own, count in list(index.softness.upscaled.items())[:4])
        own = f" ({sizes})" if sizes else ""
        warnings.append(
            f"{counts.upscaled} of {total} clips are smaller than {size} and were upscaled{own}: they are soft, "
            "and a model learns that. Leave them out or lower data.height and data.width"
        )
    if counts.slower:
        warnings.append(
            f"{counts.slower} of {total} clips have fewer than data.fps={settings.fps:g} frames a second: "
            "frames are repeated"
        )
    return warnings + holdout_warnings(index)


def left_out_line(folder: Path) -> str:
    """Return a line on the clips that were left out of the cache in ``folder``; empty when there are none."""
    names = NameList()
    for one in read_quarantine(folder):
        names.add(one.name)
    if not names.count:
        return ""
    are = "clip is" if names.count == 1 else "clips are"
    return f"{names.count} {are} unreadable and left out: {names.short()}; the reasons are in {folder / QUARANTINE}"


def usage_notes(index: CacheIndex, clips_folder: Path, cache_folder: Path) -> list[str]:
    """Return a sentence on each part of the data that training does not see. ``clips_folder``: of the video files."""
    counts, settings, total = index.counts, index.settings, len(index.entries)
    notes = []
    if counts.longer:
        notes.append(
            f"{counts.longer} of {total} clips are longer than the part that is taken of each "
            f"(data.window={settings.window}): {counts.taken_seconds:.4g} s of {counts.seconds:.4g} s are trained on"
        )
    if counts.cropped:
        notes.append(
            f"{counts.cropped} of {total} clips lose more than {CROPPED:.0%} of their picture to the crop "
            f"(data.resize={settings.resize})"
        )
    if counts.duplicates:
        notes.append(
            f"{counts.duplicates} of {total} clips have the same content as another one; each is trained on as often "
            "as it is listed"
        )
    return notes + _unlisted_notes(index, clips_folder, cache_folder)


def _unlisted_notes(index: CacheIndex, clips_folder: Path, cache_folder: Path) -> list[str]:
    layout = find_layout(clips_folder)
    listed = {entry.name for entry in index.entries} | {one.name for one in read_quarantine(cache_folder)}
    unlisted, other_kinds = NameList(), NameList()
    for name in unlisted_videos(clips_folder, listed):
        (unlisted if name.lower().endswith(EXTENSIONS) else other_kinds).add(name)
    notes = []
    if unlisted.count:
        notes.append(
            f"{_video_files(unlisted)} in {clips_folder} but not in {layout}, and not used: {unlisted.short()}"
        )
    if other_kinds.count:
        notes.append(
            f"{_video_files(other_kinds)} in {clips_folder} of a kind that is not read: {other_kinds.short()} "
            f"(read are {' '.join(EXTENSIONS)})"
        )
    return notes


def _video_files(names: NameList) -> str:
    return "1 video file is" if names.count == 1 else f"{names.count} video files are"
