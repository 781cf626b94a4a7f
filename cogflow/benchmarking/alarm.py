"""The watch's alarms, simulated by resampling measured panels: how often it sees damage, how often it cries for nothing.

Panels of real contents, clean and damaged, several takes of each. One half of the contents calibrates the nulls, the watch is tried on
the other half. A run has a baseline (one take of some contents) and validations (another take of each), each moved by content drift: ``f``
times the difference of two random contents of the same half over the root of two: its deviation is ``f`` times that over contents. All
channels drift together, so that what moves together in real contents moves together here. Drift is drawn anew for each prompt and
validation; ``persistent`` of its variance stays over a run. With ``clips`` the watch has a ceiling of that many contents, drawn without
regard to the prompts'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cogflow.benchmarking.degrade import CLEAN
from cogflow.sharpness.metrics import METRICS, Metrics
from cogflow.sharpness.quality_watch import IN_BLUR_UNITS, QualityWatch, WatchVerdict, blur_value
from cogflow.sharpness.verdict import changes_of
from cogflow.sharpness.watch_noise_model import WatchNoise

BLURRED = "gauss 1"
LEAST = 1e-3  # of a deviation: a few contents may agree entirely
VALIDATIONS = 5  # of a run with nothing wrong

Measured = Mapping[str, Sequence[Mapping[str, Metrics]]]
"""Content to its takes, each degradation's name (``clean`` among them) to the panel: :func:`cogflow.benchmarking.separation.gather`."""


@dataclass(frozen=True)
class Rates:
    """Counts of a trial. ``rounds`` validations with nothing wrong, of which ``alarms`` and ``warnings``; ``kinds`` of those alarms. By
    degradation ``damaged`` runs, of which the level was alarm with kind soft in the ``first`` validation, or ``within`` three."""

    rounds: int
    alarms: int
    warnings: int
    kinds: dict[str, int]
    damaged: int
    first: dict[str, int]
    within: dict[str, int]


def calibrate(measured: Measured, like: WatchNoise, blur: str = BLURRED) -> WatchNoise:
    """``like`` with deviations, unit and gain measured on these contents; ``blur`` is the degradation that the composite calls -1."""
    clean = [[take[CLEAN] for take in takes] for takes in measured.values()]
    own = np.array([[blur_value(panel) for panel in takes] for takes in clean])
    taken = own - np.array([[blur_value(take[blur]) for take in takes] for takes in measured.values()])
    unit = float(np.median(taken))
    slope, at_zero = np.polyfit(own.ravel() / unit, taken.ravel() / unit, 1)
    drifts = {}
    for name, drift in like.drifts.items():
        scale = unit if name in IN_BLUR_UNITS else 1.0
        # Changes from any one clip: on a channel's scale they differ from the values by a constant.
        values = np.array([[changes_of(panel, clean[0][0])[name] for panel in takes] for takes in clean]) / scale
        means = values.mean(axis=1)
        takes = values - means[:, None]
        variants = np.sqrt(2 * np.square(takes).sum() / (takes.size - len(takes)))
        drifts[name] = replace(
            drift, contents=max(LEAST, float(means.std(ddof=1))), variants=max(LEAST, float(variants))
        )
    return replace(like, drifts=drifts, unit=unit, gain=(float(at_zero), float(slope)))


def table(measured: Measured, degradation: str, channels: Sequence[str]) -> np.ndarray:
    """``[contents, takes, channels]``, on the scale on which differences are changes."""
    rows = [[[take[degradation][name] for name in channels] for take in takes] for takes in measured.values()]
    values = np.array(rows, dtype=np.float64)
    for place, name in enumerate(channels):
        if METRICS[name].scale == "log":
            values[..., place] = np.log(values[..., place] + METRICS[name].floor)
    return values


class Simulation:
    """Runs of a watch on ``measured``; ``nulls`` calibrated elsewhere."""

    def __init__(
        self,
        measured: Measured,
        nulls: WatchNoise,
        *,
        prompts: int,
        drift: float,
        persistent: float,
        clips: int,
        seed: int,
    ) -> None:
        self.nulls, self.prompts, self.drift, self.persistent, self.clips = nulls, prompts, drift, persistent, clips
        self.random = np.random.default_rng(seed)
        self.channels = tuple(METRICS)
        self.values = {kind: table(measured, kind, self.channels) for kind in next(iter(measured.values()))[0]}
        means = self.values["clean"].mean(axis=1)
        self.moves = means - means.mean(axis=0)
        self.moves[:, [self.channels.index(name) for name in ("repeated", "finite")]] = 0

    def run(self, damage: Sequence[str]) -> list[WatchVerdict]:
        """The validations of one run; ``damage``: the degradation at each."""
        contents, takes = self.values["clean"].shape[:2]
        which = self.random.choice(contents, self.prompts, replace=self.prompts > contents)
        base = self.random.integers(0, takes, self.prompts)
        stays = self._draw()
        watch = QualityWatch(self._panels(self.values["clean"][which, base]), self._ceiling(), nulls=self.nulls)
        readings = []
        for step, kind in enumerate(damage, start=1):
            take = (base + self.random.integers(1, takes, self.prompts)) % takes
            moved = np.sqrt(self.persistent) * stays + np.sqrt(1 - self.persistent) * self._draw()
            readings.append(watch.update(step, self._panels(self.values[kind][which, take] + self.drift * moved)))
        return readings

    def _ceiling(self) -> dict[str, Metrics] | None:
        """Panels of ``clips`` contents, drawn without regard to the prompts."""
        if not self.clips:
            return None
        clean = self.values["clean"]
        which, take = (self.random.integers(0, length, self.clips) for length in clean.shape[:2])
        return {f"clip:{name}": panel for name, panel in self._panels(clean[which, take]).items()}

    def _draw(self) -> np.ndarray:
        """Either way alike, as baseline and sample are of equal standing when nothing is wrong."""
        one, other = self.random.integers(0, len(self.moves), (2, self.prompts))
        return (self.moves[one] - self.moves[other]) / np.sqrt(2)

    def _panels(self, values: np.ndarray) -> dict[str, Metrics]:
        undone = values.copy()
        for place, channel in enumerate(METRICS.values()):
            if channel.scale == "log":
                undone[:, place] = np.exp(undone[:, place]) - channel.floor
            if channel.name == "brightness":  # other content, not blackness
                undone[:, place] = undone[:, place].clip(0.1, 0.9)
        return {str(index): dict(zip(self.channels, row, strict=True)) for index, row in enumerate(undone.tolist())}


def trial(
    measured: Measured, like: WatchNoise, *, prompts: int, drift: float, rounds: int, damaged: int,
    damages: Sequence[str] = ("gauss 0.8", "gauss 1"), persistent: float = 0.0, clips: int = 0, halves: int = 10, seed: int = 0,
) -> Rates:  # fmt: skip
    """``rounds`` validations with nothing wrong and ``damaged`` runs per degradation, over ``halves`` random splits of the contents.

    The counts are rounded down to what the splits share. Raises ``ValueError`` for fewer than four contents.
    """
    names = list(measured)
    if len(names) < 4:
        raise ValueError(f"a simulation needs at least 4 contents, not {len(names)}")
    random = np.random.default_rng(seed)
    kinds: Counter[str] = Counter()
    first, within = Counter(dict.fromkeys(damages, 0)), Counter(dict.fromkeys(damages, 0))
    seen: Counter[str] = Counter()
    for half in range(halves):
        order = random.permutation(len(names))
        one, other = ({names[i]: measured[names[i]] for i in part} for part in np.array_split(order, 2))
        nulls = calibrate(one, like)
        simulation = Simulation(
            other, nulls, prompts=prompts, drift=drift, persistent=persistent, clips=clips, seed=seed + half
        )
        for _ in range(rounds // (VALIDATIONS * halves)):
            for reading in simulation.run([CLEAN] * VALIDATIONS):
                seen[reading.level] += 1
                kinds.update(finding.kind for finding in reading.findings if finding.level == "alarm")
        for damage in damages:
            for _ in range(damaged // halves):
                soft = [_soft(reading) for reading in simulation.run([damage] * 3)]
                first[damage] += soft[0]
                within[damage] += any(soft)
    return Rates(
        seen.total(), seen["alarm"], seen["warning"], dict(kinds), damaged // halves * halves, dict(first), dict(within)
    )


def _soft(reading: WatchVerdict) -> bool:
    return any(finding.kind == "soft" and finding.level == "alarm" for finding in reading.findings)


TRIALS: tuple[dict[str, Any], ...] = (
    {"drift": 0.0},
    {"drift": 0.25},
    {"rounds": 20000, "damaged": 600},
    {"drift": 1.0},
    {"prompts": 4},
    {"prompts": 16},
    {"persistent": 0.5},
    {"clips": 8},
    {"clips": 32},
    {"clips": 256},
)
"""Trials of :func:`tell`, where they differ from :data:`USUAL`."""
USUAL = {"prompts": 8, "drift": 0.5, "persistent": 0.0, "clips": 0, "rounds": 5000, "damaged": 300}


def tell(
    measured: Measured, like: WatchNoise, share: float = 1.0, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """A row per trial: its settings, false alarms with their kinds, and how many of ``damaged`` runs were seen at once and within three
    validations. ``share`` of the rounds and runs are made."""
    rows = []
    for trial_of in TRIALS:
        settings: dict[str, Any] = USUAL | trial_of
        settings |= {name: max(10, round(settings[name] * share)) for name in ("rounds", "damaged")}
        rates = trial(measured, like, **settings)
        row = settings | {
            "rounds": rates.rounds,
            "damaged": rates.damaged,
            "false alarms": rates.alarms,
            "of kinds": rates.kinds,
        }
        for damage in rates.first:
            row |= {f"{damage}, first": rates.first[damage], f"{damage}, third": rates.within[damage]}
        rows.append(row)
        advance()
    return rows
