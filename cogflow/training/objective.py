"""The training objective of CogVideoX: uniform timesteps, v-prediction, the error of x0 weighted by 1 / (1 - alpha_bar).

With x0 = sqrt(a) x_t - sqrt(1 - a) v, that weighted error equals the plain error of v. We compute it as SAT does
(``VideoDiffusionLoss`` in zai-org/CogVideo, sat/diffusion_video.py), so that losses can be compared number by number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Losses:
    """``per_sample``: fp32 ``[batch]``; ``mean`` is differentiable. ``x0``: the denoised prediction in fp32."""

    mean: torch.Tensor
    per_sample: torch.Tensor
    x0: torch.Tensor


def noised(
    x0: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """sqrt(a) x0 + sqrt(1 - a) noise, for latents ``[batch, frames, channels, h, w]`` and int64 ``timesteps`` ``[batch]``."""
    a = alphas_cumprod[timesteps].float().view(-1, *([1] * (x0.dim() - 1)))
    return a.sqrt() * x0 + (1.0 - a).sqrt() * noise


def velocity_loss(
    v: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> Losses:
    """The loss of a velocity prediction ``v`` for noised latents ``x_t``, in fp32 whatever the dtype of ``v``."""
    a = alphas_cumprod[timesteps].float().view(-1, *([1] * (x0.dim() - 1)))
    predicted = a.sqrt() * x_t.float() - (1.0 - a).sqrt() * v.float()
    weight = 1.0 / (1.0 - a)
    per_sample = (weight * (predicted - x0.float()).square()).flatten(1).mean(dim=1)
    return Losses(mean=per_sample.mean(), per_sample=per_sample, x0=predicted)
