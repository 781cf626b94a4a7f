"""Training batches: clips from the cache, the random choices made for them, and a thread that prefetches them.

All randomness is a function of (seed, step, slot in the global batch). No random state is kept, so a validation, a
checkpoint or another number of ranks cannot change what the next step sees.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from cogflow.config.train_settings import TrainStage
from cogflow.data.batch_order import BatchOrder
from cogflow.data.latent_cache import LatentCache
from cogflow.models.transformer_inputs import TransformerInputs
from cogflow.training.sequence import RankPlacement

TRAIN_TIMESTEPS = 1000
HELDOUT_TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass
class Batch:
    """One micro batch.

    ``latents`` (scaled) and ``noise``: fp32 ``[batch, frames, channels, h, w]``; ``embeds``: ``[batch, tokens,
    width]``; ``timesteps``: int64 ``[batch]``. ``image``: latents of the first frame for an image-to-video model, in
    the shape of ``latents``.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    embeds: torch.Tensor
    timesteps: torch.Tensor
    image: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies without the CPU."""
        return self._map(torch.Tensor.pin_memory)

    def model_input(self, x_t: torch.Tensor) -> torch.Tensor:
        """Return the transformer's input: the noised latents ``x_t``, with ``image`` joined on the channel axis."""
        return x_t if self.image is None else torch.cat([x_t, self.image], dim=2)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            latents=change(self.latents),
            noise=change(self.noise),
            embeds=change(self.embeds),
            timesteps=change(self.timesteps),
            image=None if self.image is None else change(self.image),
        )


@dataclass(frozen=True)
class TrainingBatches:
    """The batches that this rank trains on, as pure functions of the step and the micro step."""

    cache: LatentCache
    stage: TrainStage
    inputs: TransformerInputs
    placement: RankPlacement

    def batch(self, step: int, micro: int) -> Batch:
        """Return the batch of micro step ``micro`` of step ``step`` (both from 0), on the CPU."""
        stage, placement = self.stage, self.placement
        # Slots are counted over accumulation and ranks, so that 2 ranks draw what 1 rank with 2 micro steps draws.
        first_slot = (micro * placement.data_ranks + placement.data_rank) * stage.batch_size
        return training_batch(
            self.cache,
            self.chosen(step, micro),
            (stage.seed, step),
            first_slot,
            inputs=self.inputs,
            text_dropout=stage.text_dropout,
            image_dropout=stage.image_dropout,
        )

    def chosen(self, step: int, micro: int) -> list[int]:
        """Return the indices of the batch's clips in the cache."""
        order = BatchOrder(
            train=self.cache.train,
            batch_size=self.stage.batch_size,
            accumulation=self.stage.gradient_accumulation,
            rank=self.placement.data_rank,
            world=self.placement.data_ranks,
            seed=self.stage.seed,
            groups=self.cache.groups,
        )
        return order.indices(step, micro)

    def clip_names(self, step: int, micro: int) -> list[str]:
        """Return the names of the batch's clips, for messages."""
        return [self.cache.name_of(index) for index in self.chosen(step, micro)]


def training_batch(
    cache: LatentCache,
    chosen: Sequence[int],
    key: Sequence[int],
    first_slot: int,
    *,
    inputs: TransformerInputs,
    text_dropout: float,
    image_dropout: float = 0.0,
) -> Batch:
    """Return clips ``chosen`` with noise, timesteps, posterior samples and dropout drawn from ``key`` and the slot of
    each clip.

    ``key``: (seed, step). ``first_slot``: place of the first clip in the batch of all ranks and micro steps.
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
    """Return pairs of (clip, timestep), with the posterior's mean, the first stored first frame, and a noise that only
    the pair decides.
    """
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


class Loader:
    """Prefetches batches in a thread, so that reading, drawing noise and pinning memory do not delay a step.

    ``make(step, micro)``: returns a batch on the CPU. It must be a pure function: a prefetched batch that is not wanted
    is discarded. ``prefetch``: number of prefetched micro batches; one of 49x480x720 with its noise takes 10 MB.
    """

    def __init__(
        self, make: Callable[[int, int], Batch], accumulation: int, device: torch.device, prefetch: int = 2
    ) -> None:
        self._make, self._accumulation, self._device, self._prefetch = make, accumulation, device, prefetch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._queue: deque[tuple[tuple[int, int], Future[Batch]]] = deque()
        self._last = (0, -1)
        self._waited = 0.0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int, micro: int) -> Batch:
        """Return the batch of micro step ``micro`` of ``step``, on the device. Raises what making it raised."""
        began = time.perf_counter()
        wanted = (step, micro)
        if not self._queue or self._queue[0][0] != wanted:
            self._queue.clear()
            self._request(wanted)
        self._last, future = self._queue.popleft()
        batch = future.result()
        self._waited += time.perf_counter() - began
        return batch.to(self._device)

    def start_prefetch(self) -> None:
        """Start to make the batches after the one that was taken last.

        Call it where training leaves Python for long, before a backward pass: two threads that run Python at once cost
        each other a millisecond.
        """
        key = self._queue[-1][0] if self._queue else self._last
        while len(self._queue) < self._prefetch:
            key = (key[0], key[1] + 1) if key[1] + 1 < self._accumulation else (key[0] + 1, 0)
            self._request(key)

    def take_waited(self) -> float:
        """Return the seconds that :meth:`take` waited since the last call of this method."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def _request(self, key: tuple[int, int]) -> None:
        self._queue.append((key, self._pool.submit(self._pinned, key)))

    def _pinned(self, key: tuple[int, int]) -> Batch:
        batch = self._make(*key)
        return batch.pinned() if self._device.type == "cuda" else batch


def _first_frame(cache: LatentCache, index: int, key: Sequence[int], dropout: float) -> torch.Tensor | None:
    """Return latents ``[channels, 1, h, w]`` of one noised first frame of a clip, or ``None`` when it is dropped.

    It has its own generator, so that text-to-video models draw what they drew before there were first frames.
    """
    rng = np.random.default_rng([*key, 0x1F4A])
    dropped, variant = rng.random() < dropout, int(rng.integers(0, cache.image_variants))
    if dropped:
        return None
    mean, logvar = cache.image(index, variant)
    return _sampled(mean.float(), logvar, _normal(rng, mean.shape))


def _sampled(mean: torch.Tensor, logvar: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """Return a sample of the VAE's posterior."""
    return mean + torch.exp(0.5 * logvar.float().clamp(-30.0, 20.0)) * normal


def _stacked(images: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(list(images)) if images else None


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
