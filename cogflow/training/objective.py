"""The training objective of CogVideoX, its forward pass, and the learning rate of a step.

Timesteps are uniform, the model predicts v, and the error of x0 is weighted by 1 / (1 - alpha_bar). With
x0 = sqrt(a) x_t - sqrt(1 - a) v, that weighted error equals the plain error of v. It is computed as SAT computes it
(``VideoDiffusionLoss`` in zai-org/CogVideo, sat/diffusion_video.py), so that losses can be compared number by number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogflow.config.train_settings import TrainStage
from cogflow.models.transformer_inputs import TransformerInputs, rotary_tables
from cogflow.sharpness.spectrum import Spectrum
from cogflow.training import metric_table
from cogflow.training.batch import Batch
from cogflow.training.engine import Engine
from cogflow.training.sequence import RankPlacement


@dataclass
class Losses:
    """``per_sample``: fp32 ``[batch]``. ``mean``: a differentiable scalar. ``x0``: the denoised prediction, fp32."""

    mean: torch.Tensor
    per_sample: torch.Tensor
    x0: torch.Tensor


def noised(
    x0: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return sqrt(a) x0 + sqrt(1 - a) noise, for latents ``[batch, frames, channels, h, w]`` and int64 ``timesteps``
    ``[batch]``.
    """
    a = alphas_cumprod[timesteps].float().view(-1, *([1] * (x0.dim() - 1)))
    return a.sqrt() * x0 + (1.0 - a).sqrt() * noise


def velocity_loss(
    v: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> Losses:
    """Return the loss of a velocity prediction ``v`` for noised latents ``x_t``, in fp32 for every dtype of ``v``."""
    a = alphas_cumprod[timesteps].float().view(-1, *([1] * (x0.dim() - 1)))
    predicted = a.sqrt() * x_t.float() - (1.0 - a).sqrt() * v.float()
    weight = 1.0 / (1.0 - a)
    per_sample = (weight * (predicted - x0.float()).square()).flatten(1).mean(dim=1)
    return Losses(mean=per_sample.mean(), per_sample=per_sample, x0=predicted)


class Objective:
    """Forward pass and loss of one model.

    ``alphas_cumprod``: fp32 ``[1000]`` of the scheduler that the model is trained for.
    """

    def __init__(
        self,
        engine: Engine,
        alphas_cumprod: torch.Tensor,
        inputs: TransformerInputs,
        placement: RankPlacement,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.engine, self.inputs, self.placement = engine, inputs, placement
        self.device, self.dtype = device, dtype
        self.alphas_cumprod = alphas_cumprod.to(device)
        self._spectrum = Spectrum()
        self._rotary: dict[tuple[int, ...], Any] = {}

    def losses(self, batch: Batch) -> Losses:
        """Return the losses of ``batch``, which is on the device."""
        x_t = noised(batch.latents, batch.noise, self.alphas_cumprod, batch.timesteps)
        v = self.engine.forward(
            hidden_states=batch.model_input(x_t).to(self.dtype),
            encoder_hidden_states=batch.embeds.to(self.dtype),
            timestep=batch.timesteps,
            image_rotary_emb=self._rotary_tables(batch.latents.shape),
            return_dict=False,
            **self.inputs.extra(self.device, self.dtype),
            **self.placement.forward_arguments(),
        )[0]
        return velocity_loss(v, batch.latents, x_t, self.alphas_cumprod, batch.timesteps)

    def metric_table(self, losses: Losses, batch: Batch) -> torch.Tensor:
        """Return this rank's table of :mod:`cogflow.training.metric_table`: losses, and bands of the prediction and the
        true latents.
        """
        bands = self._spectrum.sums(losses.x0, batch.latents, self.alphas_cumprod[batch.timesteps])
        return metric_table.by_quarter(losses.per_sample, bands, batch.timesteps)

    def _rotary_tables(self, shape: Sequence[int]) -> Any:
        key = (shape[1], shape[3], shape[4])
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.engine.module, *key, device=self.device)
        return self._rotary[key]


def learning_rate(step: int, stage: TrainStage) -> float:
    """Return the rate of step ``step`` (from 0): linear warm-up, then ``stage.schedule`` down to ``min_lr_ratio`` at
    the last step.

    It is a pure function of the step: there is no scheduler state to save.
    """
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.learning_rate
    done = (step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    left = 1.0 - min(1.0, done)
    shape = left if stage.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return stage.learning_rate * (stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * shape)
