"""Compare the x0 prediction of the training forward pass with the true latents, band by band, at every step.

The latents' orthonormal 3D DCT-II (rows, columns, frames; even at the borders, so that a picture's edge does not leak
into the fine bands as in a Fourier transform) is divided into octaves. With ``p`` the coefficients of the predicted and
``t`` those of the true latents in a band, summed over clips, channels and frames:

* recovered share ``<p, t> / <t, t>``: 1 where the model sees through the noise, 0 where it knows nothing;
* energy ratio ``<p, p> / <t, t>``: of a model trained on such clips it equals the recovered share, because the mean is
  the best guess under a squared error. Less: the prediction is softer than what is known; more: it invents detail;
* expected share: what a Wiener filter that knows each true coefficient's size ``t^2`` would recover at this timestep,
  the sum of ``t^4 / (t^2 + noise)``. It takes most of the spread by timestep and by content out of the recovered share
  (:mod:`cogflow.sharpness.trend`).

The true latents' own deviation and band shares show soft data and a wrong scaling factor before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

SPATIAL = ("low", "mid", "high")
"""Radial frequency, as a share of Nyquist: below 1/4, below 1/2, above (the mean belongs to low)."""
TEMPORAL = ("static", "slow", "fast")
"""Temporal frequency: the mean over the latent frames, below 1/2 of Nyquist, above."""
BANDS = SPATIAL + TEMPORAL
QUARTERS = 4
SUMS = ("truth", "cross", "predicted", "expected")
ROWS = len(SUMS) * len(BANDS) + 2
"""Columns of the result of :meth:`Spectrum.sums`: each of SUMS per band, then the sum and the number of the latents'
elements.
"""


class Spectrum:
    """Band sums of latents ``[batch, frames, channels, h, w]``. Keeps the bases of each shape it has seen; no host sync
    after the first.
    """

    def __init__(self) -> None:
        self._bases: dict[tuple[int, int, int, torch.device], tuple[torch.Tensor, ...]] = {}

    @torch.no_grad()
    def sums(self, predicted: torch.Tensor, truth: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Return the sums, fp32 ``[batch, ROWS]``, on the latents' device.

        ``predicted``, ``truth``: ``[batch, frames, channels, h, w]``, fp32; ``alphas_cumprod``: ``[batch]``, of each
        clip's timestep.
        """
        batch, frames, channels, height, width = truth.shape
        in_time, in_rows, in_columns, masks = self._basis(frames, height, width, truth.device)
        both = torch.cat([predicted.detach().float(), truth.detach().float()])
        coefficients = in_rows @ (both @ in_columns.T)
        coefficients = (in_time @ coefficients.reshape(2 * batch, frames, -1)).view(
            2, batch, frames, channels, height * width
        )
        p, t = coefficients.unbind(0)
        power = t * t
        noise = ((1.0 - alphas_cumprod) / alphas_cumprod.clamp(min=1e-8)).float().view(-1, 1, 1, 1)
        rows = torch.stack([power.sum(2), (p * t).sum(2), (p * p).sum(2), (power.square() / (power + noise)).sum(2)])
        by_band = rows.view(len(SUMS), batch, -1) @ masks
        flat = both[batch:].flatten(1)
        own = torch.stack([flat.sum(1), torch.full_like(flat[:, 0], flat.shape[1])], 1)
        return torch.cat([by_band.permute(1, 0, 2).reshape(batch, -1), own], 1)

    def _basis(self, frames: int, height: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        key = (frames, height, width, device)
        if key not in self._bases:
            bases = (dct_matrix(frames), dct_matrix(height), dct_matrix(width), band_masks(frames, height, width))
            self._bases[key] = tuple(basis.float().to(device) for basis in bases)
        return self._bases[key]


def dct_matrix(size: int) -> torch.Tensor:
    """Return the orthonormal DCT-II as a matrix ``[size, size]``, fp64: ``coefficients = matrix @ values``."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (index[None] + 0.5) * index[:, None]) * math.sqrt(2.0 / size)
    matrix[0] = math.sqrt(1.0 / size)
    return matrix


def band_masks(frames: int, height: int, width: int) -> torch.Tensor:
    """Return masks of 0 and 1, ``[frames * height * width, bands]`` fp64, of the coefficients of each of BANDS.

    Each coefficient belongs to one spatial and one temporal band.
    """
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    radius = (rows[:, None].square() + columns[None].square()).sqrt().expand(frames, height, width)
    time = (torch.arange(frames) / frames)[:, None, None].expand_as(radius)
    parts = (
        radius < 0.25,
        (radius >= 0.25) & (radius < 0.5),
        radius >= 0.5,
        time == 0,
        (time > 0) & (time < 0.5),
        time >= 0.5,
    )
    return torch.stack([part.reshape(-1) for part in parts], 1).double()


@dataclass(frozen=True)
class Band:
    """One band in one quarter, as shares of the true energy there: what is recovered, the prediction's energy, and what
    is expected.
    """

    recovered: float
    energy: float
    expected: float


def bands(table: torch.Tensor) -> dict[tuple[str, int], Band]:
    """Return bands by (band, quarter 1..4) of summed rows ``[ROWS, 4]`` (CPU); those without energy are left out."""
    found, rows = {}, table.tolist()
    for place, name in enumerate(BANDS):
        truth, cross, predicted, expected = rows[place : len(SUMS) * len(BANDS) : len(BANDS)]
        for quarter in range(QUARTERS):
            if truth[quarter] > 0:
                e = truth[quarter]
                found[name, quarter + 1] = Band(cross[quarter] / e, predicted[quarter] / e, expected[quarter] / e)
    return found


def scale_seen(found: Mapping[tuple[str, int], Band]) -> float | None:
    """Return how many times larger the latents are than the model takes them to be.

    This is the factor on the prediction's low band that fits the truth best, ``<p, t> / <p, p>``, in the third quarter
    (with less noise the truth shows through, with more the model guesses its prior).

    A trained model's predictions need no factor: 1. A tiny model gives 1.00; with latents at 1.647 and 0.607 of their
    scale 1.44 and 0.67.
    """
    band = found.get(("low", 3))
    return band.recovered / band.energy if band is not None and band.energy > 0 else None


def metrics(table: torch.Tensor, prefix: str, found: Mapping[tuple[str, int], Band] | None = None) -> dict[str, float]:
    """Return metrics by flat name for summed rows ``[ROWS, 4]``.

    The names are ``<prefix>/high_q1`` (recovered share), ``<prefix>/high_energy_q1``
    (energy ratio), the same for every band and quarter that had a clip; ``<prefix>/latent_std`` (deviation of the
    scaled latents) and ``<prefix>/latent_high``, ``_mid``, ``_slow``, ``_fast`` (shares of the true latents' energy).
    Six digits: metrics.jsonl is long enough. ``found``: :func:`bands` of the table, where they are at hand."""
    values = {}
    for (name, quarter), band in (bands(table) if found is None else found).items():
        values[f"{prefix}/{name}_q{quarter}"] = band.recovered
        values[f"{prefix}/{name}_energy_q{quarter}"] = band.energy
    total, count = table[-2:].sum(1).tolist()
    energy = dict(zip(BANDS, table[: len(BANDS)].sum(1).tolist(), strict=True))
    # The transform is orthonormal: the bands' energies add up to the sum of squares.
    squares = sum(energy[name] for name in SPATIAL)
    if count > 0 and squares > 0:
        values[f"{prefix}/latent_std"] = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
        values |= {f"{prefix}/latent_{name}": energy[name] / squares for name in ("mid", "high", "slow", "fast")}
    return {name: float(f"{value:.6g}") for name, value in values.items()}
