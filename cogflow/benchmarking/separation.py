"""How well the panel tells blur from what is none, on real clips: AUC per degradation and channel, confounds, monotonicity, nulls.

*Paired*: variant j of a content, degraded, against variant i of the same content, clean (:func:`cogflow.benchmarking.clips.variant`).
*Same*: the very clip, degraded, against itself. *Unpaired*: against all other contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from cogflow.benchmarking.clips import Content, enlargement, variant
from cogflow.benchmarking.degrade import BLURS, CLEAN, CONFOUNDS, OTHERS, SIGMAS, Degradation
from cogflow.sharpness.metrics import METRICS, Metrics, measure
from cogflow.sharpness.verdict import DERIVED, changes_of, compare

Panels = dict[str, list[dict[str, Metrics]]]
"""Content to its variants, each degradation's name to the panel."""
DEGRADATIONS: dict[str, Degradation] = {CLEAN: lambda clip: clip, **BLURS, **CONFOUNDS, **OTHERS}
BLUR_KINDS = ("soft", "over_sharpened")
MOST_ENLARGED = 2.0  # a clip scaled up further has nothing left that a blur of one pixel could take away
SMALLEST_H264 = 128  # pixels: smaller frames are less than a few macroblocks


def gather(
    found: Sequence[Content], variants: int, frames: int, height: int, width: int, advance: Callable[[], None] = lambda: None,
    degradations: Mapping[str, Degradation] = DEGRADATIONS,
) -> Panels:  # fmt: skip
    """Measure every variant of every content under every degradation. Contents that would be scaled up by more than 2 are left out."""
    panels: Panels = {}
    for content in found:
        if enlargement(content, height, width) > MOST_ENLARGED:
            advance()
            continue
        rows = []
        for number in range(variants):
            clip = variant(content, number, frames, height, width)
            wanted = {
                name: apply
                for name, apply in degradations.items()
                if not name.startswith("h264") or height >= SMALLEST_H264
            }
            rows.append({name: measure(apply(clip)) for name, apply in wanted.items()})
        panels[content.name] = rows
        advance()
    return panels


def figures(panels: Panels) -> dict[str, Any]:
    """``auc`` (degradation to channel: share of paired changes below the clean ones'), ``unpaired`` likewise, ``kinds`` (degradation to
    kind: share of paired verdicts that raise it as an alarm), ``blur_verdict_changed`` (confound: share of pairs whose soft or
    over-sharpened is another than without it), ``monotone`` (share of clips whose blur falls with every step of sigma), ``nulls`` (channel
    to deviations)."""
    names = list(next(iter(panels.values()))[0])
    clean = paired(panels, CLEAN)
    result: dict[str, Any] = {
        "contents": len(panels),
        "pairs": len(clean),
        "auc": {},
        "unpaired": {},
        "kinds": {},
        "same": {},
    }
    verdicts = {CLEAN: kinds_of(panels, CLEAN)}
    for name in names:
        changed = paired(panels, name)
        if name != CLEAN:
            result["auc"][name] = {
                channel: auc(column(changed, channel), column(clean, channel)) for channel in (*METRICS, *DERIVED)
            }
            result["unpaired"][name] = unpaired(panels, name)
            verdicts[name] = kinds_of(panels, name)
            result["same"][name] = {channel: shift(panels, name, channel) for channel in (*METRICS, *DERIVED)}
        result["kinds"][name] = shares(verdicts[name])
    result["blur_verdict_changed"] = {
        name: float(np.mean([one & set(BLUR_KINDS) != other & set(BLUR_KINDS) for one, other in zip(verdicts[name], verdicts[CLEAN],
        strict=True)])) for name in CONFOUNDS if name in names
    }  # fmt: skip
    if all(f"gauss {sigma:g}" in names for sigma in SIGMAS):
        result["monotone"] = monotone(panels)
    result["nulls"] = nulls(panels)
    return result


def paired(panels: Panels, name: str) -> list[dict[str, float]]:
    """Changes of variant j under ``name`` against variant i, clean, i != j, of every content."""
    return [
        changes_of(rows[j][name], rows[i][CLEAN])
        for rows in panels.values()
        for i, j in product(range(len(rows)), repeat=2)
        if i != j
    ]


def kinds_of(panels: Panels, name: str) -> list[set[str]]:
    """The kinds that the verdict on each pair raises as an alarm."""
    return [
        {finding.kind for finding in compare(rows[j][name], rows[i][CLEAN]).findings if finding.level == "alarm"}
        for rows in panels.values() for i, j in product(range(len(rows)), repeat=2) if i != j
    ]  # fmt: skip


def shares(verdicts: Sequence[set[str]]) -> dict[str, float]:
    kinds = sorted({kind for verdict in verdicts for kind in verdict})
    return {kind: sum(kind in verdict for verdict in verdicts) / len(verdicts) for kind in kinds}


def shift(panels: Panels, name: str, channel: str) -> float:
    """Median change of the very same clip."""
    return float(np.median([changes_of(row[name], row[CLEAN])[channel] for rows in panels.values() for row in rows]))


def unpaired(panels: Panels, name: str) -> dict[str, float]:
    """AUC over contents: a degraded clip of one content scores below a clean one of another."""
    first = next(iter(panels.values()))[0][CLEAN]  # any fixed panel will do: changes from it order as the values do
    degraded, clean = (
        [changes_of(row[which], first) for rows in panels.values() for row in rows] for which in (name, CLEAN)
    )
    return {channel: auc(column(degraded, channel), column(clean, channel)) for channel in (*METRICS, *DERIVED)}


def monotone(panels: Panels) -> float:
    """Share of contents (the median of its variants) whose blur composite falls with every step of sigma from the clean clip on."""
    falls = []
    for rows in panels.values():
        ladder = [[changes_of(row[f"gauss {sigma:g}"], row[CLEAN])["blur"] for sigma in SIGMAS] for row in rows]
        middle = [0.0, *np.median(ladder, axis=0)]
        falls.append(all(later < earlier for earlier, later in zip(middle, middle[1:], strict=False)))
    return float(np.mean(falls))


def nulls(panels: Panels) -> dict[str, dict[str, float]]:
    """Per channel the deviation of its change: re-rounded (``rounding``), between variants, and between contents."""
    between = [
        changes_of(one[0][CLEAN], other[0][CLEAN]) for a, one in panels.items() for b, other in panels.items() if a < b
    ] or paired(panels, CLEAN)  # fmt: skip
    rounded = [changes_of(row["rounding"], row[CLEAN]) for rows in panels.values() for row in rows if "rounding" in row]
    groups = {"rounding": rounded, "variants": paired(panels, CLEAN), "contents": between}
    return {
        channel: {name: deviation(column(rows, channel)) for name, rows in groups.items()}
        for channel in (*METRICS, *DERIVED)
    }


def deviation(values: np.ndarray) -> float:
    """From the 95 % quantile of the absolute change: a normal one's deviation, but wide where the tails are."""
    return float(np.quantile(np.abs(values), 0.95) / 1.96) if len(values) else 0.0


def column(rows: Sequence[Mapping[str, float]], channel: str) -> np.ndarray:
    return np.array([row[channel] for row in rows])


def auc(lower: np.ndarray, higher: np.ndarray) -> float:
    """Probability that a value of ``lower`` lies below one of ``higher``, ties counted half."""
    ordered = np.sort(lower)
    return float(
        (np.searchsorted(ordered, higher, "left") + np.searchsorted(ordered, higher, "right")).mean()
        / (2 * len(ordered))
    )
