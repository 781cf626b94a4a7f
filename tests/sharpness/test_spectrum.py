"""The bands of the x0 prediction: an exact division of the energy, and each kind of damage in its own number."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.fft import dctn, idctn

from cogflow.sharpness.spectrum import (
    BANDS,
    ROWS,
    SPATIAL,
    TEMPORAL,
    Spectrum,
    band_masks,
    bands,
    dct_matrix,
    metrics,
    scale_seen,
)

SHAPE = (6, 5, 4, 12, 18)


def latents(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Noise with a falling spectrum, as pictures have: each halving of the size adds an octave."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(shape)
    for factor in (1, 2, 4):
        small = torch.randn(*shape[:3], -(-shape[3] // factor), -(-shape[4] // factor), generator=generator)
        large = small.repeat_interleave(factor, 3).repeat_interleave(factor, 4)[..., : shape[3], : shape[4]]
        total += factor * large
    return total


def smooth(x: torch.Tensor) -> torch.Tensor:
    flat = torch.nn.functional.pad(x.flatten(0, 2)[:, None], (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool2d(flat, 3, stride=1)[:, 0].view_as(x)


def table(predicted: torch.Tensor, truth: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """All clips in the first quarter."""
    rows = Spectrum().sums(predicted, truth, torch.full((len(truth),), alpha))
    assert rows.shape == (len(truth), ROWS) and rows.dtype == torch.float32
    whole = torch.zeros(ROWS, 4, dtype=torch.float64)
    whole[:, 0] = rows.double().sum(0)
    return whole


def test_transform_equals_scipy_and_bands_add_up_to_its_energy() -> None:
    x = latents()
    for size in (1, 2, 3, 13, 60):
        assert torch.allclose(dct_matrix(size) @ dct_matrix(size).T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    coefficients = torch.from_numpy(dctn(x.double().numpy(), axes=(1, 3, 4), norm="ortho")).square().sum(2).flatten(1)
    expected = coefficients @ band_masks(SHAPE[1], SHAPE[3], SHAPE[4])
    found = Spectrum().sums(x, x, torch.full((len(x),), 0.5))[:, : len(BANDS)]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    for group in (SPATIAL, TEMPORAL):
        places = [BANDS.index(name) for name in group]
        torch.testing.assert_close(found[:, places].sum(1), x.square().flatten(1).sum(1), rtol=1e-4, atol=1e-3)


def test_perfect_prediction_recovers_all_and_zero_prediction_nothing() -> None:
    x = latents()
    for (name, quarter), band in bands(table(x, x)).items():
        assert quarter == 1 and (band.recovered, band.energy) == pytest.approx((1.0, 1.0), abs=1e-5), name
    assert all(band.recovered == band.energy == 0.0 for band in bands(table(torch.zeros_like(x), x)).values())


def test_blur_lowers_the_high_band_and_noise_adds_energy_without_recovery() -> None:
    x = latents()
    blurred = {name: band for (name, _), band in bands(table((x + smooth(x)) / 2, x)).items()}
    assert blurred["high"].recovered < 0.6 < 0.9 < blurred["low"].recovered
    # A blurred prediction has less energy than it recovers: it shrinks what it knows.
    assert blurred["high"].energy < blurred["high"].recovered - 0.05
    generator = torch.Generator().manual_seed(1)
    noisy = {name: band for (name, _), band in bands(table(x + torch.randn(x.shape, generator=generator), x)).items()}
    assert noisy["high"].energy > noisy["high"].recovered + 0.1 and noisy["high"].recovered == pytest.approx(
        1.0, abs=0.1
    )


def test_smear_over_frames_lowers_the_fast_band() -> None:
    x = latents()
    smeared = (x + x.roll(1, 1) + x.roll(-1, 1)) / 3
    found = {name: band for (name, _), band in bands(table(smeared, x)).items()}
    assert found["fast"].recovered < 0.3 and found["static"].recovered == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.99, 0.5, 0.05])
def test_expected_share_equals_the_wiener_filters(alpha: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x = latents()
    x_t = math.sqrt(alpha) * x + math.sqrt(1 - alpha) * torch.randn(x.shape, generator=generator)
    axes = (1, 3, 4)
    clean, seen = (
        torch.from_numpy(dctn(y.double().numpy(), axes=axes, norm="ortho")) for y in (x, x_t / math.sqrt(alpha))
    )
    filtered = torch.from_numpy(
        idctn((seen * clean**2 / (clean**2 + (1 - alpha) / alpha)).numpy(), axes=axes, norm="ortho")
    ).float()
    for (name, _), band in bands(table(filtered, x, alpha)).items():
        assert band.expected == pytest.approx(band.recovered, abs=2e-2), name
        assert band.energy == pytest.approx(band.recovered, abs=4e-2), name


def test_latent_metrics_show_a_wrong_scale_and_soft_data() -> None:
    x = latents()
    plain, scaled, soft = (metrics(table(y, y), "spectrum") for y in (x, 1.15258426 / 0.7 * x, smooth(x)))
    assert plain["spectrum/latent_std"] == pytest.approx(float(x.std(correction=0)), rel=1e-4)
    assert scaled["spectrum/latent_std"] == pytest.approx(1.6465 * plain["spectrum/latent_std"], rel=1e-3)
    assert scaled["spectrum/latent_high"] == pytest.approx(plain["spectrum/latent_high"], rel=1e-4)
    assert soft["spectrum/latent_high"] < 0.3 * plain["spectrum/latent_high"]


def test_metric_names_are_flat_and_a_single_frame_has_no_moving_bands() -> None:
    x = latents(shape=(2, 1, 4, 8, 12))
    values = metrics(table(x, x), "heldout")
    assert values["heldout/high_q1"] == pytest.approx(1.0, abs=1e-5) and "heldout/high_energy_q1" in values
    assert not [name for name in values if "_q2" in name or name.startswith(("heldout/fast", "heldout/slow"))]


def test_sums_do_not_touch_the_gradient() -> None:
    x = latents()
    predicted = x.clone().requires_grad_()
    assert not Spectrum().sums(predicted, x, torch.full((len(x),), 0.5)).requires_grad


def test_bf16_predictions_are_summed_in_fp32() -> None:
    x = latents()
    rows = Spectrum().sums(x.bfloat16(), x, torch.full((len(x),), 0.5))
    torch.testing.assert_close(rows, Spectrum().sums(x, x, torch.full((len(x),), 0.5)), rtol=1e-2, atol=1.0)


def test_scale_seen_is_the_factor_between_truth_and_prediction() -> None:
    x = latents()
    moved = table(x / 1.65, x).roll(2, 1)
    assert scale_seen(bands(moved)) == pytest.approx(1.65, rel=1e-4)
    assert scale_seen(bands(table(x, x))) is None
