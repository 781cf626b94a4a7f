"""How sharp a clip is, measured on raw frames. Of use by itself: imports torch, numpy, PyWavelets and nothing of cogflow but itself.

from cogflow.sharpness import measure, compare
print(compare(measure(candidate), measure(reference)).line())
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "METRICS": "metrics",
    "Metric": "metrics",
    "Metrics": "metrics",
    "change": "metrics",
    "measure": "metrics",
    "measure_batch": "metrics",
    "Finding": "verdict",
    "DEFECTS": "verdict",
    "Verdict": "verdict",
    "compare": "verdict",
    "METRIC_NOISE": "noise_model",
    "WatchVerdict": "quality_watch",
    "QualityWatch": "quality_watch",
}
"""Public name to the module it lives in, imported when first asked for: torch is heavy."""

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
