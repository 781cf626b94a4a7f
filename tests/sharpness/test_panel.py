"""The panel sees blur, and does not take contrast for it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cogflow.data.shapes import draw, scenes
from cogflow.sharpness.panel import CHANNELS, measure


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [draw(scene, 5, 64, 96) for scene in scenes(6, seed=3)]


def blurred(clip: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([gaussian_filter(frame.astype(float), (sigma, sigma, 0)) for frame in clip]).round().astype(np.uint8)


def test_more_blur_measures_lower(clips: list[np.ndarray]) -> None:
    for clip in clips:
        ladder = [measure(clip)] + [measure(blurred(clip, sigma)) for sigma in (0.8, 1.5, 2.5)]
        for sharper, softer in pairwise(ladder):
            assert softer["wavelet_ratio"] < sharper["wavelet_ratio"]
            assert softer["blur_effect"] < sharper["blur_effect"]


def test_bytes_floats_and_tensors_measure_alike(clips: list[np.ndarray]) -> None:
    expected = measure(clips[0])
    for same in (clips[0] / 255.0, torch.from_numpy(clips[0]), torch.from_numpy(clips[0]).float() / 255):
        assert measure(same) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_flat_clip_has_numbers(clips: list[np.ndarray]) -> None:
    flat = measure(np.full((2, 64, 96, 3), 90, dtype=np.uint8))
    assert set(flat) == set(CHANNELS) and all(np.isfinite(value) for value in flat.values())
    assert flat["contrast"] == pytest.approx(0, abs=1e-6)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        measure(np.zeros((3, 64, 96), dtype=np.uint8))
