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
from cogflow.models.transformer_inputs import TransformerInputs

TRAIN_TIMESTEPS = 1000
HELDOUT_TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass
class Batch:
    """``latents`` (scaled) and ``noise``: fp32 ``[batch, frames, channels, h, w]``; ``embeds`` ``[batch, tokens, width]``;
    ``timesteps`` int64 ``[batch]``. ``image``: what an image-to-video model gets on the channel axis, of the latents' shape."""

    latents: torch.Tensor
    noise: torch.Tensor
    embeds: torch.Tensor
    timesteps: torch.Tensor
    image: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if value is None else change(value) for name, value in values.items()})

    def seen(self, x_t: torch.Tensor) -> torch.Tensor:
        """The noised latents ``x_t`` with what stands beside them: the transformer's input."""
        return x_t if self.image is None else torch.cat([x_t, self.image], dim=2)


def training_batch(
    cache: LatentCache, chosen: Sequence[int], key: Sequence[int], first_slot: int, *, inputs: TransformerInputs, text_dropout: float,
    image_dropout: float = 0.0,
) -> Batch:  # fmt: skip
    """Clips ``chosen`` with noise, timesteps, posterior samples, noised first frames and dropout drawn from ``key`` and each clip's slot.

    ``key``: (seed, step); ``first_slot``: place of the first clip in the batch of all ranks and micro steps.
    """
    latents, noises, embeds, timesteps, images = [], [], [], [], []
    for slot, index in enumerate(chosen, start=first_slot):
        rng = np.random.default_rng([*key, slot, 0x7A1])
        clip = cache.entry(index)
        mean = clip.mean.float()
        posterior = _normal(rng, mean.shape)
        sample = _sampled(mean, clip.logvar, posterior)
        latents.append(inputs.padded(inputs.scaling_factor * sample.transpose(0, 1)))
        noises.append(_normal(rng, latents[-1].shape))
        timesteps.append(int(rng.integers(0, TRAIN_TIMESTEPS)))
        embeds.append(cache.empty_embeds if rng.random() < text_dropout else clip.embeds)
        if inputs.image_factor is not None:
            images.append(inputs.beside(_first_frame(cache, index, [*key, slot], image_dropout), latents[-1]))
    return Batch(
        torch.stack(latents), torch.stack(noises), torch.stack(embeds), torch.tensor(timesteps), _stacked(images)
    )


def heldout_batch(cache: LatentCache, chosen: Sequence[tuple[int, int]], *, inputs: TransformerInputs) -> Batch:
    """Pairs of (clip, timestep) with the posterior's mean, the first of the noised first frames, and a noise of the pair alone."""
    latents, noises, embeds, images = [], [], [], []
    for index, timestep in chosen:
        clip = cache.entry(index)
        latents.append(inputs.padded(inputs.scaling_factor * clip.mean.float().transpose(0, 1)))
        rng = np.random.default_rng([int(clip.key[:12], 16), timestep])
        noises.append(_normal(rng, latents[-1].shape))
        embeds.append(clip.embeds)
        if inputs.image_factor is not None:
            images.append(inputs.beside(cache.image(index, 0)[0].float(), latents[-1]))
    timesteps = torch.tensor([timestep for _, timestep in chosen])
    return Batch(torch.stack(latents), torch.stack(noises), torch.stack(embeds), timesteps, _stacked(images))


def _first_frame(cache: LatentCache, index: int, key: Sequence[int], dropout: float) -> torch.Tensor | None:
    """Latents ``[channels, 1, h, w]`` of one of the noised first frames of a clip, or ``None`` when it is dropped.

    From a generator of its own, so that what text-to-video models draw stays what it was.
    """
    rng = np.random.default_rng([*key, 0x1F4A])
    dropped, variant = rng.random() < dropout, int(rng.integers(0, cache.image_variants))
    if dropped:
        return None
    mean, logvar = cache.image(index, variant)
    return _sampled(mean.float(), logvar, _normal(rng, mean.shape))


def _sampled(mean: torch.Tensor, logvar: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """A sample of the VAE's posterior."""
    return mean + torch.exp(0.5 * logvar.float().clamp(-30.0, 20.0)) * normal


def _stacked(images: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(list(images)) if images else None


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
