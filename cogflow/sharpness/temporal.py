"""Motion and smear, from triples of neighbouring frames ``[B, 3, H, W]`` of luma; each gives ``[B]``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

FLOOR = 1e-8


def energies(triples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(change over two frames, second difference, spatial variance): mean squares, after averaging 2x2 pixels, which tames noise."""
    small = functional.avg_pool2d(triples, 2)
    before, now, after = small.unbind(1)
    change = (after - before).square().mean(dim=(-2, -1))
    bend = (after - 2 * now + before).square().mean(dim=(-2, -1))
    return change, bend, small.var(dim=(-2, -1), correction=0).mean(dim=1)
