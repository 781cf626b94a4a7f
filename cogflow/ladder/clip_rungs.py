"""Rungs 0 and 1: the clips' files and what the loader makes of them, from what ``stage=prepare`` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogflow.config.schema import DataConfig
from cogflow.data.cache import INDEX
from cogflow.data.cache_shards import scan
from cogflow.data.encode import CLIPS
from cogflow.ladder import store
from cogflow.runtime.console import echo


def gather(folder: Path, cache_folder: Path, data: DataConfig) -> None:
    """Write rungs 0 and 1 of ``folder/ladder.json`` from the prepared cache. Rank 0 only.

    Clips that were prepared before clips were measured have no panels: a line says so, and the rungs stay away.
    """
    index: dict[str, Any] = json.loads((cache_folder / INDEX).read_text(encoding="utf-8"))
    softness = index.get("softness") or {}
    stored = scan(cache_folder, CLIPS)
    facts = {entry["name"]: stored[entry["clip"]].facts for entry in index["entries"] if entry["clip"] in stored}
    known = {name: one for name, one in facts.items() if one.get("panel")}
    if not softness.get("measured"):
        echo(
            "note: these clips were prepared without measuring them; remove the cache and run stage=prepare for the ladder's first rungs"
        )
        return
    own = {
        name: {
            "size": f"{one['size'][1]}x{one['size'][0]}",
            "effective": f"{one['source']['effective'][1]}x{one['source']['effective'][0]}",
        }
        for name, one in list(known.items())[: store.MOST]
    }
    groups, scaled_up, measured = (softness.get(key) for key in ("groups", "scaled_up", "measured"))
    store.put(
        folder, 0, {name: one["source"]["panel"] for name, one in known.items()},
        {
            "clips_in_all": len(facts), "measured": measured, "scaled_up": scaled_up, "groups": groups, "sizes": own,
            "soft_style": data.soft_style,
        },
    )  # fmt: skip
    store.put(
        folder, 1, {name: one["panel"] for name, one in known.items()},
        {
            "clips_in_all": len(facts), "upscaled": softness.get("upscaled"), "size": f"{data.width}x{data.height}",
            "loader": {name: one["loader"] for name, one in known.items() if one.get("loader")},
        },
    )  # fmt: skip
