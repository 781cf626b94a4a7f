"""Make random weights and clips with the real names and shapes, so that a step can be timed without a download."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from cogflow.data.latent_cache import CachedClip
from cogflow.weights.tensor_source import TensorInfo

POOL = 1 << 22
"""Number of random values. All weights are slices of them, because drawing 5.6 billion values takes minutes."""


class RandomWeights:
    """Random values for every tensor of ``shapes``, on ``device``: normal with a deviation of 0.02, and 1 for scales of
    norms."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | None = None) -> None:
        self.tensors = {name: TensorInfo(name, shape, torch.float32, Path()) for name, shape in shapes.items()}
        self._pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(device or "cpu")

    def read(self, name: str) -> torch.Tensor:
        shape = self.tensors[name].shape
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, device=self._pool.device)
        return cut_from_pool(self._pool, name, shape)


def cut_from_pool(pool: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a slice of the flat ``pool`` as a tensor of ``shape``. ``name`` decides where the slice begins."""
    count = int(torch.Size(shape).numel())
    start = zlib.crc32(name.encode()) % (len(pool) // 2)
    return pool[start:].repeat(-(-count // (len(pool) - start)))[:count].reshape(shape)


def pool_values(dtype: torch.dtype, size: int = 1 << 24) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Return a function (name, shape) -> tensor of ``dtype``. Its values are slices of one pool of ``size`` values,
    normal with a deviation of 0.02."""
    pool = (torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    return lambda name, shape: cut_from_pool(pool, name, shape)


class RandomClips:
    """Replacement of a latent cache with ``count`` clips of noise. ``latents``: latent frames, rows and columns."""

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
