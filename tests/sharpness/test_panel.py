"""The panel sees blur, and does not take contrast for it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cogflow.data.shapes import draw, scenes
from cogflow.sharpness.panel import compare, measure


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [draw(scene, 5, 64, 96) for scene in scenes(6, seed=3)]


def blurred(clip: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([gaussian_filter(frame.astype(float), (sigma, sigma, 0)) for frame in clip]).round().astype(np.uint8)


def with_contrast(clip: np.ndarray, factor: float) -> np.ndarray:
    return ((clip.astype(float) - 128) * factor + 128).round().astype(np.uint8)


def test_a_gaussian_of_one_pixel_is_plain(clips: list[np.ndarray]) -> None:
    results = [compare(measure(blurred(clip, 1.0)), measure(clip)) for clip in clips]
    # The texture is faint where a shape is nearly as bright as its ground: the drop differs from clip to clip.
    assert all(result["wavelet_ratio"] < -0.1 and result["blur_effect"] < -0.03 for result in results)
    assert np.mean([result["wavelet_ratio"] for result in results]) < -0.3
    assert sum(result["blurrier"] for result in results) >= 4


def test_more_blur_measures_lower(clips: list[np.ndarray]) -> None:
    for clip in clips:
        ladder = [measure(clip)] + [measure(blurred(clip, sigma)) for sigma in (0.8, 1.5, 2.5)]
        for sharper, softer in pairwise(ladder):
            assert softer["wavelet_ratio"] < sharper["wavelet_ratio"]
            assert softer["blur_effect"] < sharper["blur_effect"]


@pytest.mark.parametrize("factor", [0.6, 0.9])
def test_contrast_is_not_taken_for_blur(clips: list[np.ndarray], factor: float) -> None:
    for clip in clips:
        result = compare(measure(with_contrast(clip, factor)), measure(clip))
        assert abs(result["wavelet_ratio"]) < 0.05
        assert result["contrast"] == pytest.approx(np.log(factor), abs=0.05)
        assert not result["blurrier"]


def test_the_same_clip_is_not_blurrier_nor_is_a_sharper_one(clips: list[np.ndarray]) -> None:
    assert compare(measure(clips[0]), measure(clips[0])) == {"wavelet_ratio": 0, "blur_effect": 0, "contrast": 0, "z": 0, "blurrier": False}
    assert not compare(measure(clips[0]), measure(blurred(clips[0], 1.0)))["blurrier"]


def test_bytes_floats_and_tensors_measure_alike(clips: list[np.ndarray]) -> None:
    expected = measure(clips[0])
    for same in (clips[0] / 255.0, torch.from_numpy(clips[0]), torch.from_numpy(clips[0]).float() / 255):
        assert measure(same) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_flat_clip_has_numbers(clips: list[np.ndarray]) -> None:
    flat = measure(np.full((2, 64, 96, 3), 90, dtype=np.uint8))
    assert all(np.isfinite(value) for value in flat.values())
    assert flat["contrast"] == pytest.approx(0, abs=1e-9)
    assert compare(flat, measure(clips[0]))["blurrier"]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        measure(np.zeros((3, 64, 96), dtype=np.uint8))
