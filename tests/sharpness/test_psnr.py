"""Test the PSNR of frames."""

from __future__ import annotations

import math

import pytest
import torch

from cogflow.sharpness.psnr import IDENTICAL_PSNR, frames_psnr, psnr_of_error


def test_a_tenth_of_the_range_is_20_db() -> None:
    reference = torch.full((2, 4, 4, 3), 0.5)
    assert frames_psnr(reference + 0.1, reference) == pytest.approx(20, abs=1e-4)


def test_equal_frames_have_the_largest_value() -> None:
    frames = torch.rand(2, 4, 4, 3)
    assert frames_psnr(frames, frames) == IDENTICAL_PSNR == psnr_of_error(1e-30)


def test_frames_of_another_shape_have_0_db() -> None:
    assert frames_psnr(torch.zeros(1, 4, 4, 3), torch.zeros(2, 4, 4, 3)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_counts_as_the_largest_error(value: float) -> None:
    reference = torch.zeros(1, 2, 2, 1)
    frames = reference.clone()
    frames[0, 0, 0, 0] = value
    assert frames_psnr(frames, reference) == pytest.approx(-10 * math.log10(1 / 4))
