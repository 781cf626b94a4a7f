"""The rungs of the clips, source and clip, from what ``stage=prepare`` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogflow.config.data_section import DataConfig
from cogflow.data.cache import INDEX
from cogflow.data.cache_shards import scan
from cogflow.data.encode import CLIPS
from cogflow.ladder.ladder_record import MOST_CLIPS, write_rung
from cogflow.ladder.rung import Rung
from cogflow.records.cache_records import SoftGroup
from cogflow.records.ladder_records import ClipRung, ClipSizes, SourceRung
from cogflow.runtime.console import echo


def record_clip_rungs(folder: Path, cache_folder: Path, data: DataConfig) -> None:
    """Write the source and clip rungs of ``folder/ladder.json`` from the prepared cache. Rank 0 only.

    A cache that was prepared before clips were measured gives a note instead of the rungs.
    """
    index: dict[str, Any] = json.loads((cache_folder / INDEX).read_text(encoding="utf-8"))
    softness: dict[str, Any] = index.get("softness") or {}
    if not softness.get("measured"):
        echo(
            "note: these clips were prepared without measuring them; remove the cache and run stage=prepare to measure"
        )
        return
    stored = scan(cache_folder, CLIPS)
    facts = {entry["name"]: stored[entry["clip"]].facts for entry in index["entries"] if entry["clip"] in stored}
    measured = {name: one for name, one in facts.items() if one.get("panel")}
    group = softness.get("groups")
    source = SourceRung(
        metrics={name: one["source"]["panel"] for name, one in measured.items()},
        clips_in_all=len(facts),
        measured=softness["measured"],
        scaled_up=softness.get("scaled_up") or {},
        groups=None if group is None else SoftGroup(**group),
        sizes={name: _source_size(one) for name, one in list(measured.items())[:MOST_CLIPS]},
        soft_style=data.soft_style,
    )
    clip = ClipRung(
        metrics={name: one["panel"] for name, one in measured.items()},
        clips_in_all=len(facts),
        upscaled=softness.get("upscaled") or {},
        size=f"{data.width}x{data.height}",
        loader={name: one["loader"] for name, one in measured.items() if one.get("loader")},
    )
    write_rung(folder, Rung.SOURCE, source)
    write_rung(folder, Rung.CLIP, clip)


def _source_size(facts: Mapping[str, Any]) -> ClipSizes:
    (height, width), (effective_height, effective_width) = facts["size"], facts["source"]["effective"]
    return ClipSizes(f"{width}x{height}", f"{effective_width}x{effective_height}")
