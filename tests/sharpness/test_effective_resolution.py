"""Test the effective resolution on drawn clips and on the photographs of scikit-image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data

from cogflow.data.shapes import COLOURS, MOTION_NAMES, SHAPES, Scene, draw
from cogflow.sharpness.effective_resolution import resolution, two_groups

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")


def photograph(name: str) -> np.ndarray:
    image = getattr(data, name)()
    height, width = (side // 16 * 16 for side in image.shape[:2])
    return image[None, :height, :width]


def scaled(clip: np.ndarray, factor: float, how: Image.Resampling) -> np.ndarray:
    height, width = clip.shape[1:3]
    small = [
        Image.fromarray(frame).resize((round(width / factor), round(height / factor)), Image.Resampling.LANCZOS)
        for frame in clip
    ]
    return np.stack([np.asarray(frame.resize((width, height), how)) for frame in small])


def drawn(number: int) -> np.ndarray:
    scene = Scene(
        list(COLOURS)[number % 8],
        list(SHAPES)[number % 6],
        MOTION_NAMES[number % 4],
        ("light", "dark")[number // 8 % 2],
        number,
    )
    frames = np.asarray(draw(scene, 3, 64, 96))
    return frames if frames.dtype == np.uint8 else (frames * 255).round().astype(np.uint8)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_scaled_up_photographs_are_distinguished_from_the_originals(name: str) -> None:
    clip = photograph(name)
    as_is = resolution(clip)
    assert not as_is.scaled_up and as_is.effective == clip.shape[1:3]
    for factor in (2, 4):
        for how in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
            seen = resolution(scaled(clip, factor, how))
            assert seen.scaled_up, (factor, how, seen)
            assert 0.7 / factor < seen.effective[0] / clip.shape[1] < 1.6 / factor


def test_shallow_focus_is_not_called_scaled_up() -> None:
    clip = photograph("astronaut")
    soft = gaussian_filter(clip.astype(float), (0, 3, 3, 0))
    rows, columns = np.mgrid[: clip.shape[1], : clip.shape[2]]
    focus = np.exp(-(((rows - 240) / 100) ** 2 + ((columns - 250) / 100) ** 2))[None, ..., None]
    assert not resolution((focus * clip + (1 - focus) * soft).round().astype(np.uint8)).scaled_up


def test_drawn_clips_are_called_scaled_up_only_when_they_are() -> None:
    clips = [drawn(number) for number in range(8)]
    assert not any(resolution(clip).scaled_up for clip in clips)
    assert all(resolution(scaled(clip, 4, Image.Resampling.BICUBIC)).scaled_up for clip in clips)


def test_resolution_does_not_depend_on_dtype_and_refuses_small_frames() -> None:
    clip = drawn(1)
    ours = resolution(clip)
    assert resolution(torch.from_numpy(clip)) == ours
    assert resolution(torch.from_numpy(clip).float() / 255).detail == pytest.approx(ours.detail, abs=1e-4)
    assert resolution(np.full((2, 64, 64, 3), 77, np.uint8)).scaled_up is False
    with pytest.raises(ValueError, match="32 pixels"):
        resolution(np.zeros((2, 16, 64, 3), np.uint8))


def test_two_groups_finds_the_blurred_half() -> None:
    values = {}
    for number in range(32):
        clip = drawn(number)
        blurred = gaussian_filter(clip.astype(float), (0, 1.2, 1.2, 0)).round().astype(np.uint8) if number % 2 else clip
        values[f"{number:02d}"] = resolution(blurred).detail
    groups = two_groups(values)
    assert groups is not None and groups.total == 32
    # All that were blurred, and hardly another: a drawn clip can have so little texture that it looks soft by itself.
    blurred_ones = {f"{number:02d}" for number in range(1, 32, 2)}
    assert set(groups.soft) >= blurred_ones and len(groups.soft) <= 17
    assert f"{len(groups.soft)} of 32 clips are softer than the rest" in groups.line()
    assert two_groups({name: value for name, value in values.items() if int(name) % 2 == 0}) is None


def test_two_groups_rarely_splits_one_distribution() -> None:
    """False alarms on sets from one distribution: normal, skewed, heavy-tailed."""
    random = np.random.default_rng(0)
    draws: dict[str, Callable[[int], list[float]]] = {
        "normal": lambda count: list(random.normal(0, 4, count)),
        "skewed": lambda count: list(random.gamma(2, 3, count)),
        "heavy": lambda count: list(3 * random.standard_t(4, count)),
    }
    for name, one in draws.items():
        hits = sum(two_groups(dict(zip(map(str, range(96)), one(96), strict=True))) is not None for _ in range(60))
        assert hits <= 1, (name, hits)
