"""The sharpness panel: three numbers per clip, from raw frames, and the comparison of two clips that should look the same.

* ``wavelet_ratio``: log of the db2 wavelet energy of the second-finest band over that of the third, on luma. Falls with blur;
  a ratio of two bands does not see contrast, and leaving out the finest band it is little moved by grain.
* ``blur_effect``: 1 minus the blur effect of Crete et al. (``skimage.measure.blur_effect``), 0 (blurred) to 1 (sharp).
* ``contrast``: standard deviation of luma (0..1). No measure of blur: a wrong VAE scale changes it, and it is its own alarm.

Content moves these as much as blur does, so that numbers of different clips say little: compare the same prompt and noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pywt
import torch
from skimage.measure import blur_effect

LUMA = np.array([0.299, 0.587, 0.114])
MAX_FRAMES = 16  # measured, evenly spread; a 49-frame clip at 480x720 takes 0.6 s on one core
FLOOR = 1e-8  # energy of a flat frame; far below that of 8-bit rounding (1.3e-6)
NULL_DEVIATION = {"wavelet_ratio": 0.053, "blur_effect": 0.022}
"""Standard deviation of the paired log ratio with nothing wrong (27 contents at 480x720, variants of the same content). A
Gaussian of sigma 1 moves them by -0.55 and -0.17."""
ALARM = -4.0
"""A log ratio below this many null deviations (-0.21 and -0.088) makes a clip blurrier. On drawn clips at 64x96, whose fine
texture is faint, a Gaussian of sigma 1 moves the wavelet ratio by -0.16 to -0.51."""


def measure(frames: torch.Tensor | np.ndarray) -> dict[str, float]:
    """The panel of one clip. ``frames``: ``[T, H, W, 3]`` sRGB, uint8 or float in 0..1; at least 24 pixels high and wide.

    Means over at most 16 frames, evenly spread. Raises ``ValueError`` for another shape.
    """
    luma = _luma(frames)
    picked = luma[np.unique(np.linspace(0, len(luma) - 1, min(len(luma), MAX_FRAMES)).round().astype(int))]
    energies = np.mean([_band_energies(frame) for frame in picked], axis=0)
    return {
        "wavelet_ratio": float(np.log((energies[0] + FLOOR) / (energies[1] + FLOOR))),
        "blur_effect": float(np.mean([_crete(frame) for frame in picked])),
        "contrast": float(np.mean([frame.std() for frame in picked])),
    }


def compare(candidate: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, Any]:
    """Per metric the natural log of candidate over reference, ``z`` and ``blurrier``, for two panels of the same content.

    ``z`` is the lower of the two blur metrics' log ratios in null deviations; below -4 the candidate is ``blurrier``. Contrast
    has no part in it.
    """
    ratios = {
        # Already a log.
        "wavelet_ratio": candidate["wavelet_ratio"] - reference["wavelet_ratio"],
        "blur_effect": _log_ratio(candidate["blur_effect"], reference["blur_effect"]),
        "contrast": _log_ratio(candidate["contrast"], reference["contrast"]),
    }
    z = min(ratios[name] / deviation for name, deviation in NULL_DEVIATION.items())
    return {**ratios, "z": z, "blurrier": z < ALARM}


def _luma(frames: torch.Tensor | np.ndarray) -> np.ndarray:
    array = frames.detach().cpu().float().numpy() if isinstance(frames, torch.Tensor) and frames.is_floating_point() else np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or len(array) == 0:
        raise ValueError(f"frames are [T, H, W, 3], not {list(array.shape)}")
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return array.astype(np.float64) @ (LUMA / scale)


def _band_energies(frame: np.ndarray) -> tuple[float, float]:
    """Mean squared detail coefficient of the second-finest and of the third band."""
    _, third, second, _ = pywt.wavedec2(frame, "db2", level=3)
    return tuple(float(np.mean([np.square(detail).mean() for detail in band])) for band in (second, third))  # type: ignore[return-value]


def _crete(frame: np.ndarray) -> float:
    if np.ptp(frame) < 1 / 512:
        return 0.0  # the blur effect of a flat frame is 0 / 0
    return 1.0 - float(blur_effect(frame))


def _log_ratio(one: float, other: float) -> float:
    tiny = 1e-6
    return math.log((one + tiny) / (other + tiny))
