"""The rungs of the clips, source and clip, from what ``stage=prepare`` measured."""

from __future__ import annotations

from pathlib import Path

from cogflow.config.data_section import DataConfig
from cogflow.data.latent_cache import CLIPS, scan_shards
from cogflow.files.record_io import read_record
from cogflow.ladder.ladder_record import MOST_CLIPS, write_rung
from cogflow.ladder.rung import Rung
from cogflow.records.cache_records import CacheIndex
from cogflow.records.ladder_records import ClipRung, ClipSizes, SourceRung
from cogflow.runtime.console import echo


def record_clip_rungs(folder: Path, cache_folder: Path, data: DataConfig) -> None:
    """Write the source and clip rungs of ``folder/ladder.json`` from the prepared cache. Rank 0 only.

    A cache that was prepared before clips were measured gives a note instead of the rungs.
    """
    index = read_record(cache_folder / CacheIndex.file_name, CacheIndex)
    softness = index.softness
    if not softness.measured:
        echo(
            "note: these clips were prepared without measuring them; remove the cache and run stage=prepare to measure"
        )
        return
    stored = {key: one.clip for key, one in scan_shards(cache_folder, CLIPS).items() if one.clip is not None}
    clips = {entry.name: stored[entry.clip] for entry in index.entries if entry.clip in stored}
    measured = {name: clip.measurement for name, clip in clips.items() if clip.measurement is not None}
    source = SourceRung(
        metrics={name: one.source.metrics for name, one in measured.items()},
        clips_in_all=len(clips),
        measured=softness.measured,
        scaled_up=softness.scaled_up,
        groups=softness.groups,
        sizes={
            name: ClipSizes(_format_size(clips[name].size), _format_size(measured[name].source.effective))
            for name in list(measured)[:MOST_CLIPS]
        },
        soft_style=data.soft_style,
    )
    clip = ClipRung(
        metrics={name: one.metrics for name, one in measured.items()},
        clips_in_all=len(clips),
        upscaled=softness.upscaled,
        size=f"{data.width}x{data.height}",
        loader={name: one.loader for name, one in measured.items() if one.loader},
        cache=index.fingerprint,
    )
    write_rung(folder, Rung.SOURCE, source)
    write_rung(folder, Rung.CLIP, clip)


def _format_size(size: tuple[int, int]) -> str:
    """Return (height, width) as ``WxH``."""
    return f"{size[1]}x{size[0]}"
