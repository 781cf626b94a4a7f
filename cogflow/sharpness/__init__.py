"""Sharpness metrics of clips on raw frames, and verdicts over them. The package imports nothing else of cogflow.

    >>> from cogflow.sharpness import compare, measure
    >>> print(compare(measure(candidate), measure(reference)).line())

It knows no setting, no rung and no model of cogflow; :mod:`cogflow.ladder` connects its verdicts with them.

Add a metric: its formula in ``frame_metrics``, a row and its value in ``metrics``, its deviations in ``noise_model``.
Add a defect: its meaning and rules in ``defects``; its likely causes are in ``cogflow.ladder.causes``. CONTRIBUTING.md
has the recipe.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "METRICS": "metrics",
    "Metric": "metrics",
    "Metrics": "metrics",
    "change": "metrics",
    "measure": "metrics",
    "measure_batch": "metrics",
    "Finding": "verdict",
    "DEFECTS": "defects",
    "Verdict": "verdict",
    "compare": "verdict",
    "METRIC_NOISE": "noise_model",
    "WatchVerdict": "quality_watch",
    "QualityWatch": "quality_watch",
}
"""Public name to its module, which is imported on first use: torch is heavy."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
