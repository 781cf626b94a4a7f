"""Rungs 3 to 5: samples before the first step, while training goes on, and of the exported folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cogflow.artifacts.run_layout import RunLayout, step_name
from cogflow.data.cache import LatentCache
from cogflow.ladder import crops, store
from cogflow.models.family import FAMILY
from cogflow.models.rotary import rotary_tables
from cogflow.runtime import ranks
from cogflow.sampling.gallery import FRAMES
from cogflow.sampling.noise import noise_for
from cogflow.sharpness.verdict import Finding

SHIFTS = (1.0, 3.0)
LEVELS = (0.25, 0.5, 0.75)
"""Noise levels, as sqrt(alpha_bar), at which the schedule is tried: where the two shifts differ most in timestep."""
TRIED = 2  # clips


def base(folder: Path, record: Mapping[str, Any], *, family: str, scheduler: Any, vae: Any) -> None:
    """Rung 3 from ``record`` (``samples.json`` of step 0): its panels, and the scheduler's and the VAE's facts against ``family``'s.

    ``folder`` is the run's; ``family`` is ``config.model.name``. Rank 0 only.
    """
    before = store.read(folder)["rungs"].get("3", {}).get("facts", {})
    facts = {"step": record.get("step"), "contradictions": contradictions(family, scheduler.config, vae.config)}
    store.put(folder, 3, panels_of(record), before | facts)


def tuned(folder: Path, record: Mapping[str, Any], found: Sequence[Finding] | None) -> None:
    """Rung 4 from ``record`` (``samples.json`` of a later step) and what the watch ``found`` in it; ``None`` where it could not see.

    The newest stands. Rank 0 only.
    """
    facts: dict[str, Any] = {"step": record.get("step"), "weights": record.get("weights")}
    if found is not None:
        facts["watch"] = [
            {"kind": one.kind, "level": one.level, "channel": one.channel, "size": one.size, "line": one.line()}
            for one in found
        ]
    store.put(folder, 4, panels_of(record), facts)


def exported(
    folder: Path, frames: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor], panels: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Rung 5: ``panels`` of the exported folder's samples, with their PSNR against the run's own in ``facts``, and a sheet of the worst."""
    store.put(folder, 5, panels, facts)
    psnr = facts.get("psnr") or {}
    worst = min(
        (name for name in psnr if name in frames and name in references), key=lambda name: psnr[name], default=None
    )
    if worst is not None:
        rows = {worst: sample_rungs(folder, worst) | {"tuned": references[worst], "exported": frames[worst]}}
        crops.save(folder / "ladder" / "samples.png", rows)


def sample_rungs(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The frames of sample ``name`` before the first step, as they were encoded for watching: raw ones are kept of the newest step only."""
    from cogflow.data.video import read_video

    path = RunLayout(folder).samples / step_name(0) / f"{name}.mp4"
    return {"base": read_video(path)[0]} if path.is_file() and not (path.parent / FRAMES).is_file() else {}


def panels_of(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {sample["name"]: sample["sharpness"] for sample in record["samples"]}


def contradictions(family: str, scheduler: Mapping[str, Any], vae: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that decide how samples look and are not what ``family`` has; empty for a family that is not known."""
    member = FAMILY.get(family)
    if member is None:
        return []
    wanted = {f"scheduler.{key}": value for key, value in member.scheduler_config().items() if key in SCHEDULER_FIELDS}
    wanted["vae.scaling_factor"] = member.scaling_factor
    found = {f"scheduler.{key}": scheduler.get(key) for key in SCHEDULER_FIELDS} | {
        "vae.scaling_factor": vae.get("scaling_factor")
    }
    return [
        {"field": field, "value": found[field], "expected": value, "family": family}
        for field, value in wanted.items()
        if not _same(found[field], value)
    ]


SCHEDULER_FIELDS = (
    "snr_shift_scale",
    "prediction_type",
    "timestep_spacing",
    "rescale_betas_zero_snr",
    "beta_start",
    "beta_end",
)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int) and not isinstance(other, bool):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def schedule_evidence(
    folder: Path,
    transformer: Any,
    scheduler: Any,
    cache: LatentCache,
    scaling_factor: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """What the weights themselves say about the noise schedule, into rung 3: call once at step 0, before the first step.

    The same noisy latents are denoised twice: told the timestep that their noise level has under the shift 1.0, and the one it has under
    3.0. The weights know which timestep goes with which noise. 12 forward passes of one clip. Collective: every rank calls it with the
    same module (ZeRO-3 needs that). Models that take an image besides are left out.
    """
    config = transformer.config
    if config.in_channels != config.out_channels or (config.patch_size_t or 1) > 1:
        return
    errors = schedule_errors(transformer, scheduler, cache, scaling_factor, device=device, dtype=dtype)
    if ranks.is_main():
        store.note(
            folder,
            3,
            schedule={
                "configured": float(scheduler.config.snr_shift_scale),
                "errors": {f"{s:g}": e for s, e in errors.items()},
            },
        )


@torch.no_grad()
def schedule_errors(
    transformer: Any,
    scheduler: Any,
    cache: LatentCache,
    scaling_factor: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[float, float]:
    """Mean squared velocity error by shift, over :data:`TRIED` clips and :data:`LEVELS`."""
    was_training = transformer.training
    transformer.eval()
    shifts = sorted({*SHIFTS, float(scheduler.config.snr_shift_scale)})
    tables = {shift: _alphas(scheduler.config, shift) for shift in shifts}
    errors: dict[float, list[float]] = {shift: [] for shift in shifts}
    try:
        for index in (cache.holdout or cache.train)[:TRIED]:
            clip = cache.entry(index)
            x0 = scaling_factor * clip.mean.float().transpose(0, 1)[None].to(device)
            noise = noise_for(0, f"schedule:{clip.key}", x0.shape).to(device)
            for level in LEVELS:
                noisy = level * x0 + math.sqrt(1 - level**2) * noise
                velocity = level * noise - math.sqrt(1 - level**2) * x0
                for shift in shifts:
                    timestep = int((tables[shift].sqrt() - level).abs().argmin())
                    given = transformer(
                        hidden_states=noisy.to(dtype), encoder_hidden_states=clip.embeds[None].to(device, dtype),
                        timestep=torch.tensor([timestep], device=device), image_rotary_emb=rotary_tables(
                            transformer, x0.shape[1], x0.shape[3], x0.shape[4], device
                        ), return_dict=False,
                    )[0]  # fmt: skip
                    errors[shift].append(float((given.float() - velocity).square().mean()))
    finally:
        transformer.train(was_training)
    return {shift: sum(values) / len(values) for shift, values in errors.items() if values}


def _alphas(config: Mapping[str, Any], shift: float) -> torch.Tensor:
    """alpha_bar by timestep, as diffusers' CogVideoX schedulers make it, under ``shift``."""
    from diffusers import CogVideoXDDIMScheduler

    made: torch.Tensor = CogVideoXDDIMScheduler.from_config({**config, "snr_shift_scale": shift}).alphas_cumprod
    return made
