"""The ceiling of what samples can reach: all measured clips, moved by what the VAE's round trip does to those that went through it.

The round trip is dear and a few clips go through it; every prepared clip has a panel. What the VAE does to a clip varies little over clips,
what clips look like varies much: the ceiling's place is known far better from all of them. Of 8 clips at 480x720 a blur of one pixel leaves
the interval between samples and ceiling at the first validation in 58 of 100 runs, of all clips in 79.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from cogflow.ladder import store
from cogflow.sharpness.metrics import METRICS, Metrics, change, moved

Panels = Mapping[str, Metrics]


def read(folder: Path) -> dict[str, dict[str, float]]:
    """The ceiling of the run in ``folder``, from the rungs 1 and 2 of its ladder; a panel by clip. Empty without a round trip that is
    finite; the round trip's own panels where the clips were not measured at preparation."""
    rungs = store.read(folder)["rungs"]
    trip, clips = rungs.get("2", {}).get("panels") or {}, (rungs.get("2", {}).get("facts") or {}).get("clips") or {}
    return project(rungs.get("1", {}).get("panels") or {}, trip, clips)


def project(every: Panels, trip: Panels, before: Panels) -> dict[str, dict[str, float]]:
    """``every`` clip's panel moved by the mean change from ``before`` to ``trip``, the panels of some of them without and with the VAE."""
    sound = [name for name in trip if name in before and trip[name]["finite"] == 1]
    whole = {name: panel for name, panel in every.items() if set(METRICS) <= set(panel)}
    if len(sound) < len(trip) or not sound:
        return {}
    if len(whole) <= len(trip):
        return {name: dict(panel) for name, panel in trip.items()}
    by = {
        channel: fmean(change(channel, trip[name][channel], before[name][channel]) for name in sound)
        for channel in METRICS
    }
    return {
        name: {channel: moved(channel, panel[channel], by[channel]) for channel in METRICS}
        for name, panel in whole.items()
    }
