"""The schedule probe: do the weights of a transformer know the noise schedule that its scheduler is configured with?

A transformer was trained with one SNR shift, and takes the timesteps of another shift for other noise levels. The probe
denoises the same noisy latents with the timestep that their noise level has under each shift. The error is least under
the shift of the training. The probe needs no reference; training runs it at step 0 (:func:`record_schedule_probe`), and
stage=diagnose on any pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler

from cogflow.data.latent_cache import LatentCache
from cogflow.ladder.ladder_record import read_ladder, write_rung
from cogflow.ladder.rung import Rung
from cogflow.models.transformer_inputs import TransformerSettings, pad_latent_frames, rotary_tables
from cogflow.records.ladder_records import BaseRung, ScheduleErrors
from cogflow.runtime import ranks
from cogflow.sampling.noise import noise_for
from cogflow.sampling.sampler import Sampler

SHIFTS = (1.0, 3.0)
"""SNR shifts of the model family, which are always tried."""
LEVELS = (0.25, 0.5, 0.75)
"""Signal levels, sqrt(alpha_bar), at which the shifts are tried: where the two shifts differ most in timestep."""
CLIPS = 2
"""Clips that training probes with: 12 forward passes of one clip."""
CLEAR_MARGIN = 0.05
"""Share by which the error of every other shift must be larger for a shift to be named. The tiny model, trained under
1.0, has an error of
0.135 there and of 0.332 under 3.0."""


@dataclass(frozen=True)
class ProbeClip:
    """A clip for the probe. ``latents``: not scaled, ``[channels, frames, h, w]``; ``embeds``: of its caption,
    ``[tokens, width]``; ``noise_id``: names its noise."""

    latents: torch.Tensor
    embeds: torch.Tensor
    noise_id: str

    def scaled_latents(self, transformer: Any, scaling_factor: float, device: torch.device) -> torch.Tensor:
        """Return fp32 ``[1, frames, channels, h, w]`` in whole patches over time, as training gives them to the
        transformer.
        """
        frames = self.latents.float().transpose(0, 1)
        return scaling_factor * pad_latent_frames(frames, transformer.config.patch_size_t or 1)[None].to(device)


def record_schedule_probe(folder: Path, sampler: Sampler, cache: LatentCache, scaling_factor: float) -> None:
    """Probe the sampler's transformer before the first step and add the errors to the base rung of
    ``folder/ladder.json``.

    ``scaling_factor`` is training's own. Image-to-video transformers are skipped. Collective: every rank calls it with
    the same module (ZeRO-3 needs that).
    """
    transformer, scheduler = sampler.transformer, sampler.pipeline.scheduler.config
    if TransformerSettings.of_config(transformer.config).takes_image:
        return
    clips = []
    for index in (cache.holdout or cache.train)[:CLIPS]:
        entry = cache.entry(index)
        clips.append(ProbeClip(entry.mean, entry.embeds, f"schedule:{entry.key}"))
    configured = float(scheduler.snr_shift_scale)
    was_training = transformer.training
    transformer.eval()
    try:
        errors = schedule_errors(
            transformer,
            clips,
            alpha_tables(scheduler, {*SHIFTS, configured}),
            scaling_factor=scaling_factor,
            device=sampler.device,
            dtype=sampler.dtype,
        )
    finally:
        transformer.train(was_training)
    if ranks.is_main():
        schedule = ScheduleErrors(configured, {f"{shift:g}": error for shift, error in errors.items()})
        base = read_ladder(folder).rungs.base or BaseRung(metrics={})
        write_rung(folder, Rung.BASE, replace(base, schedule=schedule))


@torch.no_grad()
def schedule_errors(
    transformer: Any,
    clips: Sequence[ProbeClip],
    tables: Mapping[float, torch.Tensor],
    *,
    scaling_factor: float,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[float, float]:
    """Return the mean squared velocity error by shift, over ``clips`` and :data:`LEVELS`. ``tables``: alpha_bar by
    timestep of each shift.
    """
    errors: dict[float, list[float]] = {shift: [] for shift in tables}
    for clip in clips:
        x0 = clip.scaled_latents(transformer, scaling_factor, device)
        noise = noise_for(0, clip.noise_id, x0.shape).to(device)
        for level in LEVELS:
            noisy, velocity = add_noise(x0, noise, level)
            for shift, table in tables.items():
                predicted = predict_velocity(transformer, noisy, clip.embeds, timestep_of(table, level), dtype)
                errors[shift].append(float((predicted - velocity).square().mean()))
    return {shift: sum(values) / len(values) for shift, values in errors.items() if values}


def best_shift(errors: Mapping[float, float]) -> float | None:
    """Return the shift of the least error; ``None`` where another shift's error is not larger by
    :data:`CLEAR_MARGIN`.
    """
    best = min(errors, key=lambda shift: errors[shift], default=None)
    others = [error for shift, error in errors.items() if shift != best]
    if best is None or not others or min(others) <= (1 + CLEAR_MARGIN) * errors[best]:
        return None
    return best


def alpha_tables(config: Mapping[str, Any], shifts: Iterable[float]) -> dict[float, torch.Tensor]:
    """Return alpha_bar by timestep under each of ``shifts``, as diffusers' CogVideoX schedulers with ``config`` compute
    it.
    """
    # ``from_config`` ignores fields in ``_use_default_values``: those that scheduler_config.json did not contain.
    fields = {name: value for name, value in config.items() if name != "_use_default_values"}
    return {
        shift: CogVideoXDDIMScheduler.from_config({**fields, "snr_shift_scale": shift}).alphas_cumprod
        for shift in sorted(shifts)
    }


def timestep_of(table: torch.Tensor, level: float) -> int:
    """Return the timestep whose sqrt(alpha_bar) is nearest to ``level``."""
    return int((table.sqrt() - level).abs().argmin())


def add_noise(x0: torch.Tensor, noise: torch.Tensor, level: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noisy latents at sqrt(alpha_bar) ``level`` and their velocity."""
    sigma = math.sqrt(1 - level**2)
    return level * x0 + sigma * noise, level * noise - sigma * x0


def predict_velocity(
    transformer: Any, noisy: torch.Tensor, embeds: torch.Tensor, timestep: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the transformer's velocity, fp32, for one clip ``[1, frames, channels, h, w]`` and its ``embeds``
    ``[tokens, width]``.
    """
    _, frames, _, height, width = noisy.shape
    predicted: torch.Tensor = transformer(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=embeds[None].to(noisy.device, dtype),
        timestep=torch.tensor([timestep], device=noisy.device),
        image_rotary_emb=rotary_tables(transformer, frames, height, width, noisy.device),
        return_dict=False,
    )[0]
    return predicted.float()
