"""Train the tiny autoencoder from random weights on drawn clips.

The loss is the squared and the absolute error, plus the absolute error of the frames' finite differences (which
compares edges, so that the optimum is not blurred), plus a small Kullback-Leibler term that keeps the latents compact.
There is no adversarial loss and no learned feature distance. The decoder therefore cannot invent detail: the round trip
shows the content of the latents.

Afterwards :func:`normalise_latents` folds one scale per latent channel into the weights, which makes the latents'
standard deviation 1 / scaling_factor in every channel: the trait that makes 0.7 the right factor for CogVideoX-5B.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from cogflow.data.shapes import COLOURS, SHAPES, draw, scenes
from cogflow.sharpness.psnr import psnr_of_error


@dataclass(frozen=True)
class Phase:
    """Phase of the training, on crops of ``frames`` x ``crop`` x ``crop``, ``batch`` at a time."""

    steps: int
    batch: int
    frames: int
    crop: int


@dataclass(frozen=True)
class VAESettings:
    # Still images come first, because learning edges on them costs a ninth. Then come clips, then large crops of them.
    # (Frames must be 8k+1: the decoder maps an even number of latent frames to four frames each.)
    phases: tuple[Phase, ...] = (
        Phase(1200, 32, 1, 32),
        Phase(700, 6, 9, 32),
        Phase(350, 3, 9, 64),
        Phase(1150, 4, 9, 48),
        Phase(300, 3, 9, 64),
    )
    frames: int = 9
    height: int = 64
    width: int = 96
    pool: int = 1600
    learning_rate: float = 2e-3
    # (step, share of the rate): the start of each cosine to zero.
    cycles: tuple[tuple[int, float], ...] = ((0, 1.0), (2250, 0.7), (3400, 0.3))
    # Step at which the latents are centred and scaled. Later steps repair the effect of centring on the frames'
    # borders.
    normalise_at: int = 3400
    warmup: int = 50
    kl_weight: float = 2e-5
    save_every: int = 200

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def scaled(self, steps: int) -> VAESettings:
        """Return the recipe scaled to about ``steps`` steps. Every phase keeps its share and has at least one step."""
        share = steps / self.steps
        phases = tuple(replace(phase, steps=max(1, round(phase.steps * share))) for phase in self.phases)
        starts = [0, *accumulate(phase.steps for phase in phases)]
        cycles = tuple((starts[place], peak) for place, (_, peak) in zip((0, 3, 4), self.cycles, strict=True))
        pool = max(8, min(self.pool, round(self.pool * share)))
        return replace(self, phases=phases, cycles=cycles, normalise_at=starts[4], pool=pool)


def clip_pool(count: int, seed: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Return ``count`` drawn clips of all concepts as uint8 ``[count, 3, frames, height, width]``."""
    drawn = [draw(s, frames, height, width) for s in scenes(count, seed, tuple(COLOURS), tuple(SHAPES))]
    return torch.from_numpy(np.stack(drawn)).permute(0, 4, 1, 2, 3).contiguous()


def phase_at(step: int, settings: VAESettings) -> Phase:
    for phase in settings.phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return settings.phases[-1]


def rate_at(step: int, settings: VAESettings) -> float:
    """Return the learning rate of a step: cosines to zero, each with a linear warm-up."""
    ends = [start for start, _ in settings.cycles[1:]] + [settings.steps]
    start, peak, end = next(
        (start, peak, end) for (start, peak), end in zip(settings.cycles, ends, strict=True) if step < end
    )
    warm = min(1.0, (step - start + 1) / settings.warmup)
    return settings.learning_rate * max(
        0.005, peak * warm * (0.5 + 0.5 * math.cos(math.pi * (step - start) / (end - start)))
    )


def batch_at(pool: torch.Tensor, step: int, seed: int, settings: VAESettings) -> torch.Tensor:
    """Return the batch of one step, float ``[batch, 3, frames, crop, crop]`` in -1..1, with random windows, crops,
    flips and swapped colour channels."""
    rng = np.random.default_rng([seed, step])
    phase = phase_at(step, settings)
    clips = []
    for index in rng.integers(0, len(pool), phase.batch):
        top = rng.integers(0, settings.height - phase.crop + 1)
        left = rng.integers(0, settings.width - phase.crop + 1)
        start = rng.integers(0, settings.frames - phase.frames + 1)
        clip = pool[int(index), :, start : start + phase.frames, top : top + phase.crop, left : left + phase.crop]
        if rng.random() < 0.5:
            clip = clip.flip(-1)
        if rng.random() < 0.5:
            clip = clip.flip(1)
        if rng.random() < 0.2:
            clip = clip[torch.from_numpy(rng.permutation(3))]
        clips.append(clip)
    return torch.stack(clips).float() / 127.5 - 1.0


def initialise(vae: AutoencoderKLCogVideoX) -> None:
    """Set the weights so that the signal passes a deep decoder from the first step.

    With PyTorch's defaults, a spatial norm multiplies its input by a random factor around 0, and training yields grey
    frames for a thousand steps. With these weights every spatial norm starts near the identity, convolutions keep the
    variance, and the posterior starts narrow, so that its noise is small compared with the latents.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        assert module.bias is not None
        nn.init.zeros_(module.bias)
        if name.endswith("conv_y.conv"):
            nn.init.ones_(module.bias)
            module.weight.data.mul_(0.3)
        elif not name.endswith("conv_b.conv"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    channels = vae.config.latent_channels
    last = vae.encoder.conv_out.conv
    last.weight.data[channels:] *= 0.1
    last.bias.data[channels:] = -6.0


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    difference = output - target
    edges = sum((output.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    return 2.0 * difference.square().mean() + 0.5 * difference.abs().mean() + 0.5 * edges


def train_vae(
    vae: AutoencoderKLCogVideoX,
    settings: VAESettings,
    seed: int,
    state_file: Path,
    log: Callable[[dict[str, str | float]], None],
) -> None:
    """Train ``vae`` in place, resuming from ``state_file`` if it exists."""
    optimizer = _optimizer(vae, settings)
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    else:
        torch.manual_seed(seed)
        initialise(vae)
    if first >= settings.steps:
        vae.eval()
        return
    pool = clip_pool(settings.pool, seed, settings.frames, settings.height, settings.width)
    vae.train()
    started = time.monotonic()
    for step in range(first, settings.steps):
        if step == settings.normalise_at:
            normalise_latents(vae, pool[:64].float() / 127.5 - 1.0, centre=True)
            optimizer = _optimizer(vae, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        clips = batch_at(pool, step, seed, settings)
        torch.manual_seed(seed * 1_000_003 + step)
        posterior = vae.encode(clips).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output, clips)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        (loss + settings.kl_weight * kl).backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == settings.steps:
            psnr = psnr_of_error(float((output.detach() - clips).square().mean()) / 4.0)
            log(
                {
                    "part": "vae",
                    "step": step,
                    "loss": loss.item(),
                    "kl": kl.item(),
                    "grad_norm": norm.item(),
                    "psnr": psnr,
                    "seconds": time.monotonic() - started,
                }
            )
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            beside = state_file.with_suffix(".tmp")
            torch.save({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, beside)
            beside.replace(state_file)
    vae.eval()


def _optimizer(vae: AutoencoderKLCogVideoX, settings: VAESettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLCogVideoX, clips: torch.Tensor, centre: bool = False) -> list[float]:
    """Fold one factor per channel into the weights so that the latents of ``clips`` have deviation 1 / scaling_factor.

    The change is exact: the encoder's last convolution is multiplied, and everything that reads the latents (the
    decoder's first convolution and the 1x1x1 convolutions of its spatial norms) is divided by the same factors. With
    ``centre`` the mean of each channel also becomes 0. That is exact except at the frames' borders, where the decoder's
    first convolution pads with zeros. Returns the factors. ``clips``: float ``[n, 3, frames, height, width]`` in -1..1.
    """
    means = torch.cat([vae.encode(clip[None]).latent_dist.mean for clip in clips])
    factors = 1.0 / (vae.config.scaling_factor * means.std(dim=(0, 2, 3, 4)))
    offsets = means.mean(dim=(0, 2, 3, 4)) if centre else torch.zeros_like(factors)
    channels = len(factors)
    last = vae.encoder.conv_out.conv
    last.weight[:channels] *= factors.view(-1, 1, 1, 1, 1)
    last.bias[:channels] = (last.bias[:channels] - offsets) * factors
    last.bias[channels:] += 2 * factors.log()
    first = vae.decoder.conv_in.conv
    first.bias += (first.weight * offsets.view(1, -1, 1, 1, 1)).sum(dim=(1, 2, 3, 4))
    first.weight /= factors.view(1, -1, 1, 1, 1)
    for name, module in vae.decoder.named_modules():
        if name.endswith(("conv_y", "conv_b")):
            module.conv.bias += (module.conv.weight * offsets.view(1, -1, 1, 1, 1)).sum(dim=(1, 2, 3, 4))
            module.conv.weight /= factors.view(1, -1, 1, 1, 1)
    return [float(factor) for factor in factors.tolist()]
