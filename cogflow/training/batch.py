"""One micro batch: clips from the cache, and every random choice made for them.

All randomness is a function of (seed, step, place in the global batch): no random state is kept, so nothing that
runs in between (a validation, a checkpoint, another rank count) can change what the next step sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from cogflow.data.cache import LatentCache

TRAIN_TIMESTEPS = 1000
HELDOUT_TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass
class Batch:
    """``latents`` (scaled) and ``noise``: fp32 ``[batch, frames, channels, h, w]``; ``embeds`` ``[batch, tokens, width]``;
    ``timesteps`` int64 ``[batch]``."""

    latents: torch.Tensor
    noise: torch.Tensor
    embeds: torch.Tensor
    timesteps: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if value is None else change(value) for name, value in values.items()})


def training_batch(
    cache: LatentCache, chosen: Sequence[int], key: Sequence[int], first_slot: int, *, text_dropout: float, scaling_factor: float
) -> Batch:
    """Clips ``chosen`` with noise, timesteps, posterior samples and text dropout drawn from ``key`` and each clip's slot.

    ``key``: (seed, step); ``first_slot``: place of the first clip in the batch of all ranks and micro steps.
    """
    latents, noises, embeds, timesteps = [], [], [], []
    for slot, index in enumerate(chosen, start=first_slot):
        rng = np.random.default_rng([*key, slot, 0x7A1])
        clip = cache.entry(index)
        mean = clip.mean.float()
        posterior = _normal(rng, mean.shape)
        sample = mean + torch.exp(0.5 * clip.logvar.float().clamp(-30.0, 20.0)) * posterior
        latents.append(scaling_factor * sample.transpose(0, 1))
        noises.append(_normal(rng, latents[-1].shape))
        timesteps.append(int(rng.integers(0, TRAIN_TIMESTEPS)))
        embeds.append(cache.empty_embeds if rng.random() < text_dropout else clip.embeds)
    return Batch(torch.stack(latents), torch.stack(noises), torch.stack(embeds), torch.tensor(timesteps))


def heldout_batch(cache: LatentCache, chosen: Sequence[tuple[int, int]], *, scaling_factor: float) -> Batch:
    """Pairs of (clip, timestep) with the posterior's mean and a noise that depends on the pair alone."""
    latents, noises, embeds = [], [], []
    for index, timestep in chosen:
        clip = cache.entry(index)
        latents.append(scaling_factor * clip.mean.float().transpose(0, 1))
        rng = np.random.default_rng([int(clip.key[:12], 16), timestep])
        noises.append(_normal(rng, latents[-1].shape))
        embeds.append(clip.embeds)
    return Batch(torch.stack(latents), torch.stack(noises), torch.stack(embeds), torch.tensor([timestep for _, timestep in chosen]))


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
