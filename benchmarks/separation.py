"""Measure on real clips how well the sharpness metrics separate blur from other changes: ``python -m
benchmarks.separation``.

The results are the AUC per degradation and metric, the effect of confounds on verdicts, the monotonicity in sigma, and
the deviations of the noise model.

*Paired*: variant j of a content, degraded, against variant i of the same content, clean
(:func:`benchmarks.real_clips.make_variant`). *Same*: the same clip, degraded, against itself. *Unpaired*: against all
other contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.degrade import BLURS, CLEAN, CONFOUNDS, OTHERS, SIGMAS, Degradation
from benchmarks.output import add_size_options, new_parser, report
from benchmarks.real_clips import Content, enlargement, find_contents, make_variant
from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.errors import DataError
from cogflow.runtime.progress import progress
from cogflow.sharpness.metrics import METRICS, Metrics, measure
from cogflow.sharpness.verdict import DERIVED, compare, metric_changes

MetricsByContent = dict[str, list[dict[str, Metrics]]]
"""Content name -> for each variant: degradation name -> metrics."""

DEGRADATIONS: dict[str, Degradation] = {CLEAN: lambda clip: clip, **BLURS, **CONFOUNDS, **OTHERS}
ALL_METRICS = (*METRICS, *DERIVED)
SHOWN = ("blur", "edge_sharpness", "reblur", "wavelet_ratio", "blur_effect", "temporal_sharpness", "contrast", "grain")
BLUR_DEFECTS = {"soft", "over_sharpened"}
MOST_ENLARGED = 2.0
"""Largest factor of scaling up. Contents above it are left out, because a blur of one pixel does not change them."""
SMALLEST_H264 = 128
"""Smallest frame height in pixels for H.264. Smaller frames have only a few macroblocks."""


@dataclass(frozen=True)
class Separation:
    """``auc`` and ``unpaired``: degradation -> metric -> share of degraded values below the clean ones. ``defects``:
    degradation -> defect -> share of paired verdicts that raise it as an alarm. ``same``: degradation -> metric ->
    median change of the same clip. ``blur_verdict_changed``: confound -> share of pairs whose blur verdict differs from
    that without it. ``monotone``: share of contents whose blur falls with every step of sigma. ``noise``: metric ->
    deviation of its change (:func:`noise_deviations`)."""

    contents: int
    pairs: int
    auc: dict[str, dict[str, float]]
    unpaired: dict[str, dict[str, float]]
    defects: dict[str, dict[str, float]]
    same: dict[str, dict[str, float]]
    blur_verdict_changed: dict[str, float]
    monotone: float | None
    noise: dict[str, dict[str, float]]


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("separation", __doc__)
    parser.add_argument(
        "--clips", type=Path, help="a folder of videos or frames; default: contents of installed packages"
    )
    parser.add_argument("--contents", type=int, default=0, help="largest number of contents; 0: all")
    parser.add_argument(
        "--variants", type=int, default=3, help="number of variants of each content, default: %(default)s"
    )
    add_size_options(parser)
    given = parser.parse_args(words)
    size = (given.frames, given.height, given.width)
    contents = contents_of(given.clips, given.contents)
    with progress(len(contents), "contents") as bar:
        measured = measure_contents(contents, given.variants, size, advance=bar.advance)
    if not measured:
        raise DataError(
            f"No clip is large enough for {size[1]}x{size[2]}.", "Give larger clips, or a smaller --height and --width."
        )
    report(separation_result(separation_of(measured), size), given.output)


def contents_of(folder: Path | None, most: int = 0) -> list[Content]:
    """Return the contents to measure. Raises :class:`DataError` for a folder that does not exist."""
    if folder is not None and not folder.exists():
        raise DataError(f"--clips {folder} does not exist.", "Give a folder of videos, or leave it out.")
    return find_contents(folder, most)


def separation_result(found: Separation, size: tuple[int, int, int]) -> BenchmarkResult:
    """Return ``found`` as a table with one row per degradation."""
    changed = max(found.blur_verdict_changed.values())
    summary = f"separation: {found.contents} contents, {found.pairs} pairs at {'x'.join(map(str, size))}; "
    summary += f"gauss 0.8 AUC {found.auc['gauss 0.8']['blur']:.3f}; monotone on {found.monotone or 0:.0%}; "
    summary += f"confounds change the blur verdict in at most {changed:.1%} of pairs"
    rows: list[list[Cell]] = [
        [
            name,
            *(by_metric[metric] for metric in SHOWN),
            found.unpaired[name]["blur"],
            format_shares(found.defects[name]),
        ]
        for name, by_metric in found.auc.items()
    ]
    columns = ["degradation", *SHOWN, "blur, unpaired", "defects in alarms"]
    return BenchmarkResult(summary, columns, rows, asdict(found))


def format_shares(shares: Mapping[str, float]) -> str:
    """Return the defects that at least 5 % of the pairs raise, the most frequent first."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{defect} {share:.0%}" for defect, share in ordered if share >= 0.05)


def measure_contents(
    contents: Sequence[Content],
    variants: int,
    size: tuple[int, int, int],
    *,
    degradations: Mapping[str, Degradation] = DEGRADATIONS,
    advance: Callable[[], None] = lambda: None,
) -> MetricsByContent:
    """Measure every variant of every content under every degradation at ``size`` (frames, height, width).

    Contents that would be scaled up by more than :data:`MOST_ENLARGED` are left out.
    """
    frames, height, width = size
    wanted = {
        name: apply for name, apply in degradations.items() if not name.startswith("h264") or height >= SMALLEST_H264
    }
    measured: MetricsByContent = {}
    for content in contents:
        if enlargement(content, height, width) <= MOST_ENLARGED:
            clips = [make_variant(content, number, frames, height, width) for number in range(variants)]
            measured[content.name] = [{name: measure(apply(clip)) for name, apply in wanted.items()} for clip in clips]
        advance()
    return measured


def separation_of(measured: MetricsByContent) -> Separation:
    """Return AUC, defects, confounds, monotonicity and deviations of ``measured``."""
    names = list(next(iter(measured.values()))[0])
    degraded = [name for name in names if name != CLEAN]
    clean = paired_changes(measured, CLEAN)
    verdicts = {name: defects_of(measured, name) for name in names}
    return Separation(
        contents=len(measured),
        pairs=len(clean),
        auc={name: _auc_by_metric(paired_changes(measured, name), clean) for name in degraded},
        unpaired={name: unpaired_auc(measured, name) for name in degraded},
        defects={name: shares(verdicts[name]) for name in names},
        same={name: {metric: median_change(measured, name, metric) for metric in ALL_METRICS} for name in degraded},
        blur_verdict_changed={
            name: _share_of_changed(verdicts[name], verdicts[CLEAN]) for name in CONFOUNDS if name in names
        },
        monotone=monotone_share(measured) if all(f"gauss {sigma:g}" in names for sigma in SIGMAS) else None,
        noise=noise_deviations(measured),
    )


def paired_changes(measured: MetricsByContent, name: str) -> list[dict[str, float]]:
    """Return the changes of variant j under ``name`` against variant i, clean, i != j, of every content."""
    return [
        metric_changes(variants[j][name], variants[i][CLEAN])
        for variants in measured.values()
        for i, j in product(range(len(variants)), repeat=2)
        if i != j
    ]


def defects_of(measured: MetricsByContent, name: str) -> list[set[str]]:
    """Return the defects that the verdict on each pair raises as an alarm."""
    pairs = [
        (variants[j][name], variants[i][CLEAN])
        for variants in measured.values()
        for i, j in product(range(len(variants)), repeat=2)
        if i != j
    ]
    findings = [compare(changed, clean).findings for changed, clean in pairs]
    return [{finding.defect for finding in pair if finding.level == "alarm"} for pair in findings]


def shares(verdicts: Sequence[set[str]]) -> dict[str, float]:
    """Return defect -> share of ``verdicts`` that raise it."""
    defects = sorted({defect for verdict in verdicts for defect in verdict})
    return {defect: sum(defect in verdict for verdict in verdicts) / len(verdicts) for defect in defects}


def _share_of_changed(verdicts: Sequence[set[str]], clean: Sequence[set[str]]) -> float:
    pairs = zip(verdicts, clean, strict=True)
    return float(np.mean([verdict & BLUR_DEFECTS != before & BLUR_DEFECTS for verdict, before in pairs]))


def median_change(measured: MetricsByContent, name: str, metric: str) -> float:
    """Return the median change of the same clip under ``name``."""
    changes = [metric_changes(row[name], row[CLEAN])[metric] for variants in measured.values() for row in variants]
    return float(np.median(changes))


def unpaired_auc(measured: MetricsByContent, name: str) -> dict[str, float]:
    """Return metric -> probability that a degraded clip of one content scores below a clean clip of another."""
    first = next(iter(measured.values()))[0][CLEAN]  # changes from a fixed clip have the same order as the values
    degraded, clean = (
        [metric_changes(row[which], first) for variants in measured.values() for row in variants]
        for which in (name, CLEAN)
    )
    return _auc_by_metric(degraded, clean)


def monotone_share(measured: MetricsByContent) -> float:
    """Return the share of contents whose blur (median of the variants) falls with every step of sigma from the clean
    clip on."""
    falls = []
    for variants in measured.values():
        by_sigma = [
            [metric_changes(row[f"gauss {sigma:g}"], row[CLEAN])["blur"] for sigma in SIGMAS] for row in variants
        ]
        middle = [0.0, *np.median(by_sigma, axis=0)]
        falls.append(all(later < earlier for earlier, later in zip(middle, middle[1:], strict=False)))
    return float(np.mean(falls))


def noise_deviations(measured: MetricsByContent) -> dict[str, dict[str, float]]:
    """Return metric -> deviation of its change when frames are re-rounded ("rounding"), between variants, and between
    contents."""
    between = [
        metric_changes(one[0][CLEAN], other[0][CLEAN])
        for first, one in measured.items()
        for second, other in measured.items()
        if first < second
    ] or paired_changes(measured, CLEAN)
    rounded = [
        metric_changes(row["rounding"], row[CLEAN])
        for variants in measured.values()
        for row in variants
        if "rounding" in row
    ]
    groups = {"rounding": rounded, "variants": paired_changes(measured, CLEAN), "contents": between}
    return {
        metric: {name: _deviation(_column(changes, metric)) for name, changes in groups.items()}
        for metric in ALL_METRICS
    }


def _deviation(values: np.ndarray) -> float:
    """Return the 95 % quantile of the absolute change over 1.96: the deviation of a normal distribution, wider for
    heavy tails."""
    return float(np.quantile(np.abs(values), 0.95) / 1.96) if len(values) else 0.0


def _column(changes: Sequence[Mapping[str, float]], metric: str) -> np.ndarray:
    return np.array([change[metric] for change in changes])


def _auc_by_metric(lower: Sequence[Mapping[str, float]], higher: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: auc(_column(lower, metric), _column(higher, metric)) for metric in ALL_METRICS}


def auc(lower: np.ndarray, higher: np.ndarray) -> float:
    """Return the probability that a value of ``lower`` is below one of ``higher``; ties count half."""
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, "left") + np.searchsorted(ordered, higher, "right")
    return float(below.mean() / (2 * len(ordered)))


if __name__ == "__main__":
    main()
