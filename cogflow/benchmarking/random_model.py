"""Random weights and clips with the real names and shapes, to time a step without any download."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from cogflow.data.latent_cache import CachedClip
from cogflow.weights.tensor_source import TensorInfo

POOL = 1 << 22
"""Random values that all weights are cut from; drawing 5.6 billion would take minutes."""


class RandomWeights:
    """Normal values of deviation 0.02 for every tensor of ``shapes``, on ``device``; scales of norms are 1."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | None = None) -> None:
        self.tensors = {name: TensorInfo(name, shape, torch.float32, Path()) for name, shape in shapes.items()}
        self._pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(device or "cpu")

    def read(self, name: str) -> torch.Tensor:
        shape = self.tensors[name].shape
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, device=self._pool.device)
        return cut_from_pool(self._pool, name, shape)


def cut_from_pool(pool: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return values of the flat ``pool`` as a tensor of ``shape``. ``name`` chooses where the cut begins."""
    count = int(torch.Size(shape).numel())
    start = zlib.crc32(name.encode()) % (len(pool) // 2)
    return pool[start:].repeat(-(-count // (len(pool) - start)))[:count].reshape(shape)


def pool_values(dtype: torch.dtype, size: int = 1 << 24) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Return a function (name, shape) -> tensor of ``dtype``: 0.02 times a normal distribution, cut from one pool of
    ``size`` values."""
    pool = (torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    return lambda name, shape: cut_from_pool(pool, name, shape)


class RandomClips:
    """Stands in for a latent cache: ``count`` clips of noise. ``latents``: latent frames, rows and columns."""

    holdout: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    image_variants = 1

    def __init__(self, count: int, latents: tuple[int, int, int], text_tokens: int, text_width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.train = list(range(count))
        self.empty_embeds = torch.zeros(text_tokens, text_width)
        self._clips = [
            CachedClip(
                key=str(number),
                name=f"clip {number}",
                text="",
                mean=torch.randn(16, *latents, generator=generator),
                logvar=torch.full((16, *latents), -6.0),
                embeds=torch.randn(text_tokens, text_width, generator=generator),
            )
            for number in self.train
        ]

    def entry(self, position: int) -> CachedClip:
        return self._clips[position]

    def image(self, position: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of the first frame's latents, fp32 ``[16, 1, h, w]``."""
        clip = self._clips[position]
        return clip.mean[:, :1], clip.logvar[:, :1]

    def name_of(self, position: int) -> str:
        return self._clips[position].name
