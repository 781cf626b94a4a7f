"""Peak signal-to-noise ratio (PSNR) in dB of frames against reference frames."""

from __future__ import annotations

import math

import torch

IDENTICAL_PSNR = 100.0
"""PSNR in dB that stands for equal frames, instead of infinity. It is also the largest value."""


def frames_psnr(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the PSNR in dB of frames in 0..1, at most :data:`IDENTICAL_PSNR`; 0 for frames of different shapes.

    A value of ``frames`` that is not finite counts as an error of 1, the largest.
    """
    if frames.shape != reference.shape:
        return 0.0
    return psnr_of_error(float(torch.where(frames.isfinite(), frames - reference, 1.0).double().square().mean()))


def psnr_of_error(error: float) -> float:
    """Return the PSNR in dB of a mean squared error of values in 0..1, at most :data:`IDENTICAL_PSNR`."""
    return IDENTICAL_PSNR if error == 0 else min(IDENTICAL_PSNR, -10 * math.log10(error))
