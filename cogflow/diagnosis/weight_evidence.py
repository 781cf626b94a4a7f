"""Evidence from the weights themselves: the latent scale and the noise schedule under which they denoise best.

For checkpoints of unknown training. A transformer was trained on latents of one scale and with the timesteps of one
schedule. *Schedule*: :mod:`cogflow.ladder.schedule_probe`. *Scale*: how many times larger than in training the model
takes the latents to be (as :func:`cogflow.sharpness.spectrum.scale_seen` does it), with the latents at each candidate's
scale; it is 1 at the scale of the training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.files.record_io import JsonValue
from cogflow.ladder.schedule_probe import (
    SHIFTS,
    ProbeClip,
    add_noise,
    alpha_tables,
    best_shift,
    predict_velocity,
    schedule_errors,
    timestep_of,
)
from cogflow.models.family import MODEL_SPECS
from cogflow.sampling.noise import noise_for

FACTORS = (0.7, 1.15258426, 1 / 0.7)
"""Scaling factors of the model family, and the inverse that ``invert_scale_latents`` may leave."""
SCALE_LEVELS = (0.25, 0.35, 0.45)
"""Signal levels, sqrt(alpha_bar), for the scale: with less noise the latents show through, with more the model returns
its prior.
"""
CLEAR_SCALE = math.log(1.12)
"""Log distance by which the best scaling factor must be nearer to 1 than every other. The tiny model sees its own at
1.0, where the next is seen at 1.4 or 0.7."""
SAME_VALUE = 0.02  # relative difference of equal settings
FINDING_CONFIDENCE = 0.85


@dataclass(frozen=True)
class EvidenceProbe:
    """A transformer and the clips to ask it about."""

    transformer: Any
    clips: Sequence[ProbeClip]
    device: torch.device
    dtype: torch.dtype

    def shift_errors(self, factor: float, tables: Mapping[float, torch.Tensor]) -> dict[float, float]:
        """Return the velocity error by SNR shift, with latents scaled by ``factor``."""
        errors = schedule_errors(
            self.transformer, self.clips, tables, scaling_factor=factor, device=self.device, dtype=self.dtype
        )
        return {shift: round(error, 6) for shift, error in errors.items()}

    @torch.no_grad()
    def seen_scale(self, factor: float, table: torch.Tensor) -> float | None:
        """Return how many times larger than in training the model takes latents times ``factor`` to be; ``None`` if it
        has no such size.

        ``table``: alpha_bar by timestep.
        """
        product = own = 0.0
        for clip in self.clips:
            x0 = clip.scaled_latents(self.transformer, factor, self.device)
            noise = noise_for(0, clip.noise_id, x0.shape).to(self.device)
            for level in SCALE_LEVELS:
                noisy, _ = add_noise(x0, noise, level)
                velocity = predict_velocity(self.transformer, noisy, clip.embeds, timestep_of(table, level), self.dtype)
                guess = _coarse(level * noisy - math.sqrt(1 - level**2) * velocity)
                truth = _coarse(x0)
                product += float((guess * truth).sum())
                own += float(guess.square().sum())
        return round(product / own, 4) if product > 0 and own > 0 else None


def weigh_evidence(
    candidate: DiagnosisInput, probe: EvidenceProbe, factors: Collection[float], shifts: Collection[float]
) -> StepResult:
    """Return a finding for each field of the candidate's config that the weights clearly contradict.

    ``factors`` and ``shifts`` are tried beside those of the model family.
    """
    own_factor = float(candidate.parts["vae"].settings.get("scaling_factor") or 1.0)
    own_shift = float(candidate.parts["scheduler"].settings.get("snr_shift_scale") or 1.0)
    tables = alpha_tables(MODEL_SPECS["cogvideox-5b"].scheduler_config(), {*SHIFTS, *shifts, own_shift})
    errors = probe.shift_errors(own_factor, tables)
    table = tables[best_shift(errors) or own_shift]
    seen = {factor: probe.seen_scale(factor, table) for factor in sorted({*FACTORS, *factors, own_factor})}
    factor = best_factor(seen)
    wrong_factor = factor is not None and not math.isclose(factor, own_factor, rel_tol=SAME_VALUE)
    if factor is not None and wrong_factor:
        errors = probe.shift_errors(factor, tables)
    shift = best_shift(errors)
    findings = []
    if factor is not None and wrong_factor:
        why = (
            f"The weights take latents at {own_factor:.6g} for x{seen[own_factor] or 0:.2f} of those in training, "
            f"and at {factor:.6g} for x{seen[factor] or 0:.2f}."
        )
        findings.append(_config_finding(candidate, "vae", "scaling_factor", own_factor, factor, why))
    if shift is not None and not math.isclose(shift, own_shift, rel_tol=SAME_VALUE):
        why = (
            f"The weights denoise with an error of {errors[shift]:.4f} under {shift:g} "
            f"and of {errors[own_shift]:.4f} under {own_shift:g}."
        )
        findings.append(_config_finding(candidate, "scheduler", "snr_shift_scale", own_shift, shift, why))
    facts: dict[str, JsonValue] = {
        "scaling_factor": {"seen_as": {f"{one:g}": value for one, value in seen.items()}, "best": factor},
        "snr_shift_scale": {"errors": {f"{one:g}": value for one, value in errors.items()}, "best": shift},
    }
    return StepResult("evidence", findings, [_factor_line(seen, factor), _shift_line(errors, shift)], facts)


def best_factor(seen: Mapping[float, float | None]) -> float | None:
    """Return the scaling factor that is seen nearest to 1; ``None`` unless it is near 1 and all other factors are
    clearly farther.
    """
    distance = {factor: abs(math.log(scale)) for factor, scale in seen.items() if scale is not None and scale > 0}
    best = min(distance, key=lambda factor: distance[factor], default=None)
    if best is None:
        return None
    others = [
        value
        for factor, value in distance.items()
        if factor != best and not math.isclose(factor, best, rel_tol=SAME_VALUE)
    ]
    clear = others and distance[best] < CLEAR_SCALE and min(others) > distance[best] + CLEAR_SCALE
    return best if clear else None


def _coarse(latents: torch.Tensor) -> torch.Tensor:
    """Return the coarse structure ``[..., h / 4, w / 4]``, which the model knows best at these noise levels."""
    return torch.nn.functional.avg_pool2d(latents.flatten(0, 1), 4)


def _config_finding(
    candidate: DiagnosisInput, component: str, name: str, own: float, known: float, why: str
) -> DiagnosisFinding:
    return DiagnosisFinding(
        step="evidence",
        component=component,
        kind="config",
        name=name,
        candidate=own,
        reference=known,
        rung=candidate.rung,
        confidence=FINDING_CONFIDENCE,
        why=why,
        fix=f"stage.set.{component}.{name}={known:g}",
    )


def _factor_line(seen: Mapping[float, float | None], factor: float | None) -> str:
    tried = ", ".join(f"{one:.4g} is seen as x{scale:.2f}" for one, scale in seen.items() if scale is not None)
    return f"scaling_factor: {tried}; {_conclusion(factor)}"


def _shift_line(errors: Mapping[float, float], shift: float | None) -> str:
    tried = ", ".join(f"error {error:.4f} under {one:g}" for one, error in errors.items())
    return f"snr_shift_scale: {tried}; {_conclusion(shift)}"


def _conclusion(known: float | None) -> str:
    return "the weights do not show it clearly" if known is None else f"the weights were trained with {known:.6g}"
