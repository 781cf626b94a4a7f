"""Metric table of a step: losses and band energies by quarter of the timesteps, summed over clips and ranks in one
small tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cogflow.sharpness import spectrum
from cogflow.training.batch import TRAIN_TIMESTEPS

LOSS_ROWS = 2
ROWS = LOSS_ROWS + spectrum.ROWS
"""Rows of a table: sum and number of the losses, then those of :mod:`cogflow.sharpness.spectrum`.

Columns are quarters of the timesteps.
"""


def empty(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a table of zeros, fp64 ``[ROWS, 4]``."""
    return torch.zeros(ROWS, spectrum.QUARTERS, dtype=torch.float64, device=device)


def by_quarter(per_sample: torch.Tensor, bands: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return the table ``[ROWS, 4]`` (fp64, on the device, without a host sync) of a batch.

    ``per_sample``: losses ``[batch]``; ``bands``: ``[batch, spectrum.ROWS]``; ``timesteps``: ``[batch]``.
    """
    values = torch.cat([per_sample.detach()[:, None], torch.ones_like(per_sample)[:, None], bands], 1).double()
    quarter = (timesteps * spectrum.QUARTERS // TRAIN_TIMESTEPS).clamp(0, spectrum.QUARTERS - 1)
    chosen = quarter[None] == torch.arange(spectrum.QUARTERS, device=quarter.device)[:, None]
    # Selected, not multiplied by 0 and 1: a value that is not finite stays in its own quarter. The order of the sum is
    # fixed, unlike that of index_add on a GPU.
    return torch.where(chosen[:, :, None], values[None], 0.0).sum(1).T


def losses(table: torch.Tensor, prefix: str) -> dict[str, float]:
    """Return ``<prefix>/loss`` and ``<prefix>/loss_q1`` (least noise) to ``_q4``; quarters without a sample are left
    out.
    """
    sums, counts = table[:2].tolist()
    values = {f"{prefix}/loss": sum(sums) / max(1.0, sum(counts))}
    for quarter, (total, count) in enumerate(zip(sums, counts, strict=True), start=1):
        if count > 0:
            values[f"{prefix}/loss_q{quarter}"] = total / count
    return values


def mean_loss(table: torch.Tensor) -> float:
    """Return the mean loss over all quarters; waits for the device."""
    return float(table[0].sum() / table[1].sum().clamp(min=1))


def bands(
    table: torch.Tensor, prefix: str, found: Mapping[tuple[str, int], spectrum.Band] | None = None
) -> dict[str, float]:
    """Return the flat metrics of :func:`cogflow.sharpness.spectrum.metrics`.

    ``found``: the bands of ``table``, if known.
    """
    return spectrum.metrics(table[LOSS_ROWS:], prefix, found)
