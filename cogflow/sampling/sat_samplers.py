"""Run SAT's samplers on a diffusers transformer, to separate differences of weights from differences of samplers.

``sat_dpm`` is ``VPSDEDPMPP2MSampler`` (a stochastic, second-order DPM-Solver++) and ``sat_ddim`` is
``VideoDDIMSampler`` of zai-org/CogVideo. The module implements their formulas; tests/sampling/test_sat.py compares
every step with latents recorded from that code. The state stays fp32 between steps, whatever the network's dtype;
diffusers' pipeline rounds it to that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from cogflow.errors import DataError, PipelineError
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.sampling.sat_schedule import SatSchedule

Noises: TypeAlias = torch.Generator | Iterable[torch.Tensor]
SOLVERS = {"sat_dpm": "VPSDEDPMPP2MSampler", "sat_ddim": "VideoDDIMSampler"}
"""Value of ``sampling.sampler`` -> the name of the class in SAT."""
OFS = 2.0
"""The ``ofs`` of 1.5 I2V in SAT's sampling."""


def zeros_for_uncond(embeds: torch.Tensor) -> torch.Tensor:
    """Return SAT's unconditional text: zeros (``force_uc_zero_embeddings``).

    diffusers encodes an empty caption instead.
    """
    return torch.zeros_like(embeds)


def draws(solver: str, steps: int) -> int:
    """Return the number of noise tensors that a run takes.

    sat_dpm takes one tensor in its first step, two in the others (it uses the second) and none in the last.
    """
    return 2 * steps - 3 if solver == "sat_dpm" else 0


@dataclass(frozen=True)
class SolverStep:
    """The result of one step.

    ``latents`` and ``denoised``, the guided x0 prediction: fp32 ``[batch, frames, channels, h, w]``.
    """

    index: int
    timestep: int
    guidance: float
    latents: torch.Tensor
    denoised: torch.Tensor


class Velocity:
    """A ``CogVideoXTransformer3DModel`` with its conditions.

    ``embeds`` and ``uncond``: ``[batch, tokens, width]``; ``uncond=None`` means no guidance. ``image``: the latents
    that an image-to-video model takes on the channel axis, ``[batch, frames, channels, h, w]``. ``ofs``: fp32 ``[1]``,
    for models that take it. ``dtype``: dtype of the network's computation.
    """

    def __init__(
        self,
        transformer: Any,
        embeds: torch.Tensor,
        uncond: torch.Tensor | None,
        *,
        image: torch.Tensor | None = None,
        ofs: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.transformer = transformer
        self.dtype = dtype
        self.image = image
        self.guided = uncond is not None
        # The unconditional half comes first, as in SAT and diffusers.
        self.embeds = (embeds if uncond is None else torch.cat([uncond, embeds])).to(dtype)
        if ofs is None and transformer.config.ofs_embed_dim is not None:
            ofs = torch.full((1,), OFS)
        self.ofs = None if ofs is None else ofs.to(embeds.device, dtype)

    def __call__(self, latents: torch.Tensor, timestep: int) -> torch.Tensor:
        """Return the velocity, fp32 ``[2 * batch or batch, ...]``; with guidance the unconditional half comes first."""
        _, frames, _, height, width = latents.shape
        config = self.transformer.config
        inputs = latents if self.image is None else torch.cat([latents, self.image.to(latents)], dim=2)
        if inputs.shape[2] != config.in_channels:
            raise PipelineError(
                f"The transformer takes {config.in_channels} channels, not {inputs.shape[2]}.",
                "An image-to-video model needs the latents of its image.",
            )
        if config.patch_size_t is not None and frames % config.patch_size_t:
            raise PipelineError(
                f"{frames} latent frames: the transformer takes multiples of {config.patch_size_t}.", "Pad them first."
            )
        inputs = torch.cat([inputs, inputs]) if self.guided else inputs
        result: torch.Tensor = self.transformer(
            hidden_states=inputs.to(self.dtype),
            encoder_hidden_states=self.embeds,
            timestep=torch.full((inputs.shape[0],), timestep, device=inputs.device),
            ofs=self.ofs,
            image_rotary_emb=rotary_tables(self.transformer, frames, height, width, inputs.device),
            return_dict=False,
        )[0]
        return result.float()


def steps(
    velocity: Callable[[torch.Tensor, int], torch.Tensor],
    noise: torch.Tensor,
    schedule: SatSchedule,
    solver: str,
    *,
    scale: float,
    dynamic: bool,
    noises: Noises,
) -> Iterator[SolverStep]:
    """Denoise ``noise`` (``[batch, frames, channels, h, w]``) and yield each step; the last has the result.

    ``noises``: a generator, or the noise tensors in order (see :func:`draws`); sat_ddim takes none. Raise
    :class:`DataError` when too few noise tensors are given or one has another shape.
    """
    draw = _noise_source(noises, noise, draws(solver, schedule.steps))
    x, before = noise.float(), None
    alphas, read_with = schedule.alphas.to(x.device), schedule.quantized.to(x.device)
    for index, timestep in enumerate(schedule.timesteps):
        weight = schedule.guidance(index, scale, dynamic)
        denoised = _denoised(velocity(x, timestep), x, read_with[index], weight)
        if solver == "sat_ddim":
            x = _ddim(x, denoised, alphas[index], alphas[index + 1])
        elif index == schedule.steps - 1:
            x = denoised
        else:
            fresh = draw()
            if before is not None:
                # SAT also draws for the first-order result, which it does not use.
                fresh = draw()
            x = _dpm(x, denoised, before, alphas[max(index - 1, 0)], alphas[index], alphas[index + 1], fresh)
            before = denoised
        yield SolverStep(index, timestep, weight, x, denoised)


def final(trajectory: Iterable[SolverStep]) -> torch.Tensor:
    """Return the latents after the last step."""
    for step in trajectory:
        last = step.latents
    return last


def _denoised(v: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, weight: float) -> torch.Tensor:
    """Return x0 from the velocity ``v``, guided when ``v`` has both halves."""
    sigma = (1 - alpha**2) ** 0.5
    if v.shape[0] == x.shape[0]:
        return alpha * x - sigma * v
    uncond, cond = (alpha * x - sigma * half for half in v.chunk(2))
    return uncond + weight * (cond - uncond)


def _ddim(x: torch.Tensor, denoised: torch.Tensor, alpha: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return ``x`` after one step of DDIM, from sqrt(alpha_bar) ``alpha`` to ``after``."""
    sigma_ratio = ((1 - after**2) / (1 - alpha**2)) ** 0.5
    return sigma_ratio * x + (after - alpha * sigma_ratio) * denoised


def _dpm(
    x: torch.Tensor,
    denoised: torch.Tensor,
    before: torch.Tensor | None,
    previous: torch.Tensor,
    alpha: torch.Tensor,
    after: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Return ``x`` after one step of SDE-DPM-Solver++(2M).

    ``before``: ``denoised`` of the step before; ``previous``, ``alpha``, ``after``: sqrt(alpha_bar) before the last
    step, now and after this step. ``h``, the step in log SNR / 2, is infinite in the first step, where ``alpha`` is 0;
    exp(-h) is then 0.
    """
    h = _log_snr(after) - _log_snr(alpha)
    if before is not None:
        half_inverse_ratio = h / (2 * (_log_snr(alpha) - _log_snr(previous)))
        denoised = (1 + half_inverse_ratio) * denoised - half_inverse_ratio * before
    keep = ((1 - after**2) / (1 - alpha**2)) ** 0.5 * (-h).exp()
    spread = (1 - after**2) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5
    return keep * x - torch.expm1(-2 * h) * after * denoised + spread * noise


def _log_snr(alpha: torch.Tensor) -> torch.Tensor:
    """Return log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), which is minus infinity at pure noise."""
    return ((alpha**2 / (1 - alpha**2)) ** 0.5).log()


def _noise_source(noises: Noises, like: torch.Tensor, needed: int) -> Callable[[], torch.Tensor]:
    """Return a function that returns the next noise tensor, of the shape and on the device of ``like``."""
    if isinstance(noises, torch.Generator):
        generator = noises
        return lambda: torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)
    given = iter(noises)

    def draw() -> torch.Tensor:
        found = next(given, None)
        if found is None or found.shape != like.shape:
            problem = "there are fewer" if found is None else f"one has the shape {tuple(found.shape)}"
            raise DataError(
                f"{needed} noise tensors of the shape {tuple(like.shape)} are needed; {problem}.",
                "Give all of them, or a generator.",
            )
        return found.to(like.device, torch.float32)

    return draw
