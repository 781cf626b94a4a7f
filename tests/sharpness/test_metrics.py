"""Metrics equal the libraries they follow, are independent of dtype, batch and device, and are always finite."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import pywt
import torch
from scipy.ndimage import gaussian_filter
from skimage.measure import blur_effect

from cogflow.data.shapes import draw, scenes
from cogflow.sharpness import METRICS, change, measure, measure_batch
from cogflow.sharpness.filters import wavelet_bands
from cogflow.sharpness.frame_metrics import block_grid, edge_log_slope, noise_deviation
from cogflow.sharpness.frame_metrics import blur_effect as our_blur_effect


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [draw(scene, 5, 64, 96) for scene in scenes(6, seed=3)]


def blurred(clip: np.ndarray, sigma: float) -> np.ndarray:
    return (
        np.stack([gaussian_filter(frame.astype(float), (sigma, sigma, 0)) for frame in clip]).round().astype(np.uint8)
    )


@pytest.mark.parametrize("shape", [(24, 24), (64, 96), (65, 97), (31, 50)])
def test_wavelet_bands_equal_pywavelets(shape: tuple[int, int]) -> None:
    luma = np.random.default_rng(1).random(shape, dtype=np.float32)
    wanted = pywt.wavedec2(luma, "db2", level=3)
    for level, band in enumerate(wavelet_bands(torch.from_numpy(luma)[None])):
        for ours, theirs in zip(band, wanted[3 - level], strict=True):
            np.testing.assert_allclose(ours[0], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (64, 96), (65, 97)])
def test_blur_effect_equals_scikit_image(shape: tuple[int, int]) -> None:
    luma = np.random.default_rng(2).random(shape)
    for sigma in (0, 1, 3):
        soft = gaussian_filter(luma, sigma) if sigma else luma
        ours = float(our_blur_effect(torch.from_numpy(soft).float()[None]))
        assert ours == pytest.approx(1 - blur_effect(soft), rel=1e-4)


def test_grain_measures_the_deviation_of_noise() -> None:
    random = np.random.default_rng(3)
    ramp = np.linspace(0.3, 0.6, 96)[None, :] + np.zeros((64, 1))
    for deviation in (0.01, 0.04):
        noisy = torch.from_numpy(ramp + random.normal(0, deviation, ramp.shape)).float()[None]
        # The lower quartile over tiles reads a few percent low.
        assert float(noise_deviation(wavelet_bands(noisy)[0][2])) == pytest.approx(deviation, rel=0.12)


def test_edge_slope_is_the_inverse_of_the_edge_width() -> None:
    slopes = []
    for width in (2, 4, 6):
        profile = np.clip((np.arange(96) - 48) / width, 0, 1)
        flat = torch.from_numpy(np.tile(profile, (64, 1))).float()[None]
        slopes.append(float(edge_log_slope(flat, -1).exp()))
        assert slopes[-1] == pytest.approx(1 / width, rel=0.25)  # the window of 7 pixels cuts corners off
    assert slopes[0] > slopes[1] > slopes[2]


def test_block_grid_sees_blocks_on_the_borders_only() -> None:
    picture = np.random.default_rng(4).random((64, 96)) * 0.2
    blocks = np.kron(np.random.default_rng(5).random((8, 12)), np.ones((8, 8))) * 0.2
    on_borders, beside = (
        float(block_grid(torch.from_numpy(picture + np.roll(blocks, by, (0, 1))).float()[None])) for by in (0, 2)
    )
    assert on_borders > 0.3 > beside + 0.1


def test_more_blur_lowers_every_blur_metric(clips: list[np.ndarray]) -> None:
    for clip in clips:
        rising_blur = [measure(clip)] + [measure(blurred(clip, sigma)) for sigma in (0.8, 1.5, 2.5)]
        for sharper, softer in pairwise(rising_blur):
            for metric in ("edge_sharpness", "reblur", "wavelet_ratio", "blur_effect", "detail"):
                assert softer[metric] < sharper[metric], metric


def test_metrics_do_not_depend_on_dtype_or_batch(clips: list[np.ndarray]) -> None:
    expected = measure(clips[0])
    for same in (clips[0] / 255.0, torch.from_numpy(clips[0]), torch.from_numpy(clips[0]).float() / 255):
        assert measure(same) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    together = measure_batch(np.stack(clips[:3]))
    for clip, metrics in zip(clips, together, strict=False):
        assert metrics == pytest.approx(measure(clip), rel=1e-5, abs=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.35, 1.0, float("nan"), float("inf")])
def test_metrics_of_a_flat_clip_are_finite(value: float) -> None:
    flat = measure(np.full((4, 64, 96, 3), value, dtype=np.float32))
    assert set(flat) == set(METRICS) and all(np.isfinite(number) for number in flat.values())
    assert flat["contrast"] == pytest.approx(0, abs=1e-6) and flat["repeated"] == 1
    assert flat["finite"] == float(np.isfinite(value))


def test_finite_counts_non_finite_values(clips: list[np.ndarray]) -> None:
    clip = torch.from_numpy(clips[0]).float() / 255
    clip[0, :8] = float("nan")
    metrics = measure(clip)
    assert metrics["finite"] == pytest.approx(1 - 8 / 64 / 5, abs=1e-4) and all(
        np.isfinite(number) for number in metrics.values()
    )


def test_a_single_frame_can_be_measured(clips: list[np.ndarray]) -> None:
    metrics = measure(clips[0][:1])
    assert metrics["motion"] == metrics["temporal_sharpness"] == metrics["repeated"] == 0
    assert metrics["reblur"] > 0


def test_change_is_a_log_ratio_or_a_difference() -> None:
    assert change("contrast", 0.2, 0.1) == pytest.approx(np.log(2), abs=0.02)
    assert change("wavelet_ratio", -1.0, -0.5) == -0.5
    assert all(change(name, 0.3, 0.3) == 0 for name in METRICS)


@pytest.mark.parametrize("shape", [(3, 64, 96), (0, 64, 96, 3), (3, 64, 96, 4), (3, 16, 96, 3)])
def test_measure_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frames are"):
        measure(np.zeros(shape, dtype=np.uint8))


def test_measure_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="uint8 or floating"):
        measure(np.zeros((3, 64, 96, 3), dtype=np.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_metrics_on_a_gpu_equal_those_on_the_cpu(clips: list[np.ndarray]) -> None:
    for clip in clips:
        here = torch.from_numpy(clip)
        for one in (here, here.float() / 255):
            assert measure(one.cuda()) == pytest.approx(measure(one), rel=1e-4, abs=1e-4)
