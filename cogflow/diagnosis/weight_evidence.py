"""Step 6, evidence from the weights themselves: at which scale of the latents, and under which schedule, do they denoise best?

For when nobody knows what a checkpoint was trained with. A transformer was trained on latents of one scale and on timesteps of one
schedule, and takes others for something else. *Schedule*: the same noisy latents are denoised, told the timestep of each shift; the
error is least at the weights' own. *Scale*: how many times larger than known the model takes the latents to be (as
:func:`cogflow.sharpness.spectrum.scale_seen` does it), with the latents at each candidate's scale: 1 at the weights' own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.models.rotary import rotary_tables
from cogflow.sampling.noise import noise_for

FACTORS = (0.7, 1.15258426, 1 / 0.7)
SHIFTS = (1.0, 3.0)
LEVELS = (0.25, 0.5, 0.75)  # sqrt(alpha_bar) at which the schedules are tried
SCALE_LEVELS = (0.25, 0.35, 0.45)  # with less noise the truth shows through, with more the model guesses what it knows
CLEAR = 0.05
"""Share by which the second best must be worse for the best to be named. The tiny model's own shift is 60 % better than the other; its own
scaling factor is seen at 1.0 where the next is at 1.4 or 0.7."""
CLEAR_SCALE = math.log(1.12)


def weigh_evidence(
    candidate: DiagnosisInput, transformer: Any, latents: Sequence[torch.Tensor], embeds: Sequence[torch.Tensor], *,
    factors: Sequence[float], shifts: Sequence[float], device: torch.device, dtype: torch.dtype,
) -> StepResult:  # fmt: skip
    """``latents``: of real clips, not scaled, ``[channels, frames, h, w]``; ``embeds``: of their captions ``[tokens, width]``.

    A finding where the weights clearly speak against the candidate's own config.
    """
    own_factor = float(candidate.parts["vae"].settings.get("scaling_factor") or 1.0)
    own_shift = float(candidate.parts["scheduler"].settings.get("snr_shift_scale") or 1.0)
    factors = sorted({*FACTORS, *factors, own_factor})
    shifts = sorted({*SHIFTS, *shifts, own_shift})
    how = {"device": device, "dtype": dtype}
    errors = shift_errors(transformer, latents, embeds, own_factor, shifts, **how)
    known = best_shift(errors)
    seen = {factor: scale_at(transformer, latents, embeds, factor, known or own_shift, **how) for factor in factors}
    distance = {factor: abs(math.log(value)) for factor, value in seen.items() if value is not None and value > 0}
    factor = min(distance, key=lambda one: distance[one], default=own_factor)
    sure_factor = clear(distance, factor, CLEAR_SCALE)
    if sure_factor and not math.isclose(factor, own_factor, rel_tol=0.02):
        errors = shift_errors(transformer, latents, embeds, factor, shifts, **how)
        known = best_shift(errors)
    shift, sure_shift = known or own_shift, known is not None
    findings, lines = [], []
    lines.append(
        "scaling_factor: " + ", ".join(f"{one:.4g} is seen as x{value:.2f}" for one, value in seen.items() if value is not None)
        + (f"; the weights know {factor:.6g}" if sure_factor else "; the weights do not say clearly")
    )  # fmt: skip
    lines.append(
        "snr_shift_scale: " + ", ".join(f"error {value:.4f} under {one:g}" for one, value in errors.items())
        + (f"; the weights know {shift:g}" if sure_shift else "; the weights do not say clearly")
    )  # fmt: skip
    if sure_factor and not math.isclose(factor, own_factor, rel_tol=0.02):
        why = f"The weights take latents at {own_factor:.6g} for x{seen[own_factor] or 0:.2f} of what they know, "
        why += f"and at {factor:.6g} for x{seen[factor] or 0:.2f}."
        findings.append(_config("vae", "scaling_factor", own_factor, factor, candidate, why))
    if sure_shift and not math.isclose(shift, own_shift, rel_tol=0.02):
        why = f"The weights denoise with an error of {errors[shift]:.4f} under {shift:g} and of {errors[own_shift]:.4f} under {own_shift:g}."
        findings.append(_config("scheduler", "snr_shift_scale", own_shift, shift, candidate, why))
    facts = {
        "scaling_factor": {
            "seen_as": {f"{one:g}": value for one, value in seen.items()},
            "best": factor if sure_factor else None,
        },
        "snr_shift_scale": {
            "errors": {f"{one:g}": value for one, value in errors.items()},
            "best": shift if sure_shift else None,
        },
    }
    return StepResult("evidence", findings, lines, facts)


def _config(component: str, field: str, mine: float, theirs: float, side: DiagnosisInput, why: str) -> DiagnosisFinding:
    fix = f"stage.set.{component}.{field}={theirs:g}"
    return DiagnosisFinding("evidence", component, "config", field, False, mine, theirs, side.rung, 0.85, why, fix)


def best_shift(errors: dict[float, float]) -> float | None:
    """The shift of the least error, where the others' are clearly larger."""
    best = min(errors, key=lambda one: errors[one])
    rest = [value for one, value in errors.items() if one != best]
    return best if rest and min(rest) > (1 + CLEAR) * errors[best] else None


def clear(distance: dict[float, float], best: float, least: float) -> bool:
    """Whether the best is near its goal and all others clearly farther from theirs."""
    rest = [value for one, value in distance.items() if one != best and not math.isclose(one, best, rel_tol=0.02)]
    return bool(rest) and distance[best] < least and min(rest) > distance[best] + least


@torch.no_grad()
def scale_at(
    transformer: Any, latents: Sequence[torch.Tensor], embeds: Sequence[torch.Tensor], factor: float, shift: float, *,
    device: torch.device, dtype: torch.dtype,
) -> float | None:  # fmt: skip
    """How many times larger than known the model takes ``latents * factor`` to be; ``None`` where its answer has no such size."""
    alphas = _alphas(shift)
    product = own = 0.0
    for index, (clip, text) in enumerate(zip(latents, embeds, strict=True)):
        x0 = (
            (factor * whole_patches(clip, transformer.config.patch_size_t or 1).float())
            .transpose(0, 1)[None]
            .to(device)
        )
        noise = noise_for(0, f"evidence:{index}", x0.shape).to(device)
        for level in SCALE_LEVELS:
            timestep = int((alphas.sqrt() - level).abs().argmin())
            given = velocity(transformer, level * x0 + math.sqrt(1 - level**2) * noise, text, timestep, device, dtype)
            guess = level * (level * x0 + math.sqrt(1 - level**2) * noise) - math.sqrt(1 - level**2) * given
            low_guess, low_true = low(guess), low(x0)
            product, own = product + float((low_guess * low_true).sum()), own + float(low_guess.square().sum())
    return round(product / own, 4) if product > 0 and own > 0 else None


def whole_patches(clip: torch.Tensor, patch: int) -> torch.Tensor:
    """As many latent frames ``[channels, frames, h, w]`` as a transformer that patches ``patch`` of them together (1.5) takes."""
    return clip[:, : max(patch, clip.shape[1] // patch * patch)]


def low(latents: torch.Tensor) -> torch.Tensor:
    """Coarse structure ``[..., h / 4, w / 4]``: what is known best at these noise levels."""
    return torch.nn.functional.avg_pool2d(latents.flatten(0, 1), 4)


@torch.no_grad()
def shift_errors(
    transformer: Any, latents: Sequence[torch.Tensor], embeds: Sequence[torch.Tensor], factor: float,
    shifts: Sequence[float], *, device: torch.device, dtype: torch.dtype,
) -> dict[float, float]:  # fmt: skip
    """Mean squared velocity error by shift."""
    tables = {shift: _alphas(shift) for shift in shifts}
    errors: dict[float, list[float]] = {shift: [] for shift in shifts}
    for index, (clip, text) in enumerate(zip(latents, embeds, strict=True)):
        x0 = (
            (factor * whole_patches(clip, transformer.config.patch_size_t or 1).float())
            .transpose(0, 1)[None]
            .to(device)
        )
        noise = noise_for(0, f"evidence:{index}", x0.shape).to(device)
        for level in LEVELS:
            noisy = level * x0 + math.sqrt(1 - level**2) * noise
            wanted = level * noise - math.sqrt(1 - level**2) * x0
            for shift in shifts:
                timestep = int((tables[shift].sqrt() - level).abs().argmin())
                errors[shift].append(
                    float((velocity(transformer, noisy, text, timestep, device, dtype) - wanted).square().mean())
                )
    return {shift: round(sum(values) / len(values), 6) for shift, values in errors.items()}


def velocity(
    transformer: Any, noisy: torch.Tensor, text: torch.Tensor, timestep: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    given = transformer(
        hidden_states=noisy.to(dtype), encoder_hidden_states=text[None].to(device, dtype), timestep=torch.tensor([timestep], device=device),
        image_rotary_emb=rotary_tables(transformer, noisy.shape[1], noisy.shape[3], noisy.shape[4], device), return_dict=False,
    )[0]  # fmt: skip
    result: torch.Tensor = given.float()
    return result


def _alphas(shift: float) -> torch.Tensor:
    """alpha_bar by timestep as CogVideoX's schedulers make it under ``shift``."""
    from diffusers import CogVideoXDDIMScheduler

    from cogflow.models.family import FAMILY

    config: dict[str, Any] = FAMILY["cogvideox-5b"].scheduler_config()
    made: torch.Tensor = CogVideoXDDIMScheduler(**{**config, "snr_shift_scale": shift}).alphas_cumprod
    return made
