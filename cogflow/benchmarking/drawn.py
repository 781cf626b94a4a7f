"""A model and clips for a step to be timed on: real names and shapes, drawn values. Nothing needs to be downloaded for it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from cogflow.data.cache import CachedClip
from cogflow.weights.tensor_source import TensorInfo

POOL = 1 << 22
"""Values that all weights are cut from: drawing 5.6 billion would take minutes."""


class DrawnWeights:
    """Values of 0.02 times a normal distribution for every tensor of ``shapes``, on ``device``; scales of norms are 1."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | None = None) -> None:
        self.tensors = {name: TensorInfo(name, shape, torch.float32, Path()) for name, shape in shapes.items()}
        self._pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(device or "cpu")

    def read(self, name: str) -> torch.Tensor:
        shape = self.tensors[name].shape
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, device=self._pool.device)
        count, start = int(torch.Size(shape).numel()), zlib.crc32(name.encode()) % (POOL // 2)
        return self._pool[start:].repeat(-(-count // (POOL - start)))[:count].reshape(shape)


class DrawnClips:
    """What a trainer needs of a latent cache: ``count`` clips of noise. ``latents``: latent frames, rows and columns."""

    holdout: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    image_variants = 1

    def __init__(self, count: int, latents: tuple[int, int, int], text_tokens: int, text_width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.train = list(range(count))
        self.empty_embeds = torch.zeros(text_tokens, text_width)
        self._clips = [
            CachedClip(
                str(number), f"clip {number}", "", torch.randn(16, *latents, generator=generator), torch.full((16, *latents), -6.0),
                torch.randn(text_tokens, text_width, generator=generator),
            )
            for number in self.train
        ]  # fmt: skip

    def entry(self, position: int) -> CachedClip:
        return self._clips[position]

    def image(self, position: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance of the first frame's latents."""
        clip = self._clips[position]
        return clip.mean[:, :1], clip.logvar[:, :1]

    def name_of(self, position: int) -> str:
        return self._clips[position].name
