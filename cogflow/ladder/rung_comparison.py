"""Compare the metrics of two rungs: changes as medians with 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cogflow.records.ladder_records import ChangeInterval
from cogflow.sharpness.metrics import METRICS, change
from cogflow.sharpness.noise_model import METRIC_NOISE
from cogflow.sharpness.verdict import BLUR_METRICS

MetricsByName = Mapping[str, Mapping[str, float]]
"""Clip or sample name to its metrics, which need not be complete."""
RESAMPLES = 1000
BLUR = "blur"
"""Name of the mean change of the blur metrics beside the metrics' own changes."""


def compare_pairs(candidate: MetricsByName, reference: MetricsByName) -> tuple[dict[str, ChangeInterval], int]:
    """Return the change of every metric and of ``blur`` over the names that both have, and the number of these names.

    Values that are not finite and metrics that a clip lacks are left out.
    """
    shared = [name for name in candidate if name in reference]
    if not shared:
        return {}, 0
    columns = {}
    for metric in METRICS:
        pairs = [(candidate[name], reference[name]) for name in shared]
        complete = [(ours, theirs) for ours, theirs in pairs if _has(ours, metric) and _has(theirs, metric)]
        columns[metric] = np.array([change(metric, ours[metric], theirs[metric]) for ours, theirs in complete])
    changes = {metric: _median_interval(column) for metric, column in columns.items() if len(column)}
    present = [columns[metric] for metric in BLUR_METRICS if metric in changes]
    if _same_length(present):
        changes[BLUR] = _median_interval(np.mean(present, axis=0))
    return changes, len(shared)


def compare_groups(candidate: MetricsByName, reference: MetricsByName) -> tuple[dict[str, ChangeInterval], int]:
    """Return the difference of the groups' medians for every metric and ``blur``, and the size of the smaller group.

    Values that are not finite and metrics that a clip lacks are left out.
    """
    if not candidate or not reference:
        return {}, 0
    columns = {metric: (_on_scale(candidate, metric), _on_scale(reference, metric)) for metric in METRICS}
    changes = {metric: _difference_interval(*pair) for metric, pair in columns.items() if len(pair[0]) and len(pair[1])}
    present = [columns[metric] for metric in BLUR_METRICS if metric in changes]
    ours, theirs = [column for column, _ in present], [column for _, column in present]
    if _same_length(ours) and _same_length(theirs):
        changes[BLUR] = _difference_interval(np.mean(ours, axis=0), np.mean(theirs, axis=0))
    return changes, min(len(candidate), len(reference))


def summarize_changes(pairs: MetricsByName) -> dict[str, ChangeInterval]:
    """Return the intervals of changes that are known already, by pair and metric."""
    changes = {}
    for metric in METRICS:
        values = np.array([one[metric] for one in pairs.values() if _has(one, metric)])
        if len(values):
            changes[metric] = _median_interval(values)
    present = [metric for metric in BLUR_METRICS if metric in changes]
    if present:
        complete = [one for one in pairs.values() if all(_has(one, metric) for metric in present)]
        changes[BLUR] = _median_interval(np.array([np.mean([one[metric] for metric in present]) for one in complete]))
    return changes


def blur_z(changes: Mapping[str, ChangeInterval]) -> float:
    """Return the mean change of the blur metrics in noise deviations of one pair of variants; below zero is
    blurrier.
    """
    present = [metric for metric in BLUR_METRICS if metric in changes]
    if not present:
        return 0.0
    return float(np.mean([changes[metric].size / METRIC_NOISE[metric].variants for metric in present]))


def _has(metrics: Mapping[str, float], metric: str) -> bool:
    value = metrics.get(metric)
    return value is not None and bool(np.isfinite(value))


def _same_length(columns: list[np.ndarray]) -> bool:
    return len({len(column) for column in columns}) == 1


def _on_scale(group: MetricsByName, metric: str) -> np.ndarray:
    """Return the values of ``metric`` on its own scale: a log where it has one."""
    return np.array([change(metric, metrics[metric], 0.0) for metrics in group.values() if _has(metrics, metric)])


def _median_interval(values: np.ndarray) -> ChangeInterval:
    drawn = _resampled_medians(values, np.random.default_rng(0))
    return _interval(float(np.median(values)), drawn)


def _difference_interval(ours: np.ndarray, theirs: np.ndarray) -> ChangeInterval:
    random = np.random.default_rng(0)
    drawn = _resampled_medians(ours, random) - _resampled_medians(theirs, random)
    return _interval(float(np.median(ours)) - float(np.median(theirs)), drawn)


def _resampled_medians(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.asarray(np.median(values[random.integers(0, len(values), (RESAMPLES, len(values)))], axis=1))


def _interval(size: float, drawn: np.ndarray) -> ChangeInterval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return ChangeInterval(size, float(low), float(high))
