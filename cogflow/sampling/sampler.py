"""Samples from fixed noise, made by diffusers' own pipeline, so that they are what users of the export will see; or, when asked
for, by SAT's samplers, so that they can be compared with CogVideo's own code (docs/samplers.md)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from cogflow.config.sampling_section import SamplingConfig
from cogflow.errors import PipelineError
from cogflow.models.loading import DTYPES, dtype_name
from cogflow.records.sample_records import SamplingRecord
from cogflow.sampling import sat_samplers
from cogflow.sampling.noise import latent_frames, noise_for, step_generator
from cogflow.sampling.prompts import Prompt
from cogflow.sampling.sat_schedule import schedule_of

SCHEDULERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}
"""What ``sampling.sampler`` puts in the place of the pipeline's own scheduler, with its settings."""


@dataclass(frozen=True)
class Request:
    """One sample: a prompt, a seed, the prompt's embeddings ``[tokens, width]``; ``image``: a first frame, uint8 ``[H, W, 3]``."""

    prompt: Prompt
    seed: int
    embeds: torch.Tensor
    image: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.prompt.id}-seed{self.seed}"


class Interrupted(Exception):
    """Sampling was given up because :attr:`Sampler.stop` said so; on every rank after the same step."""


class Sampler:
    """Denoises and decodes one request at a time.

    ``transformer`` may be a module that DeepSpeed holds; ``scheduler`` is the pipeline's own. Text embeddings are given, so no text
    encoder is in memory; the VAE is moved to the device to decode and back to the CPU afterwards. ``images``: requests bring their
    first frames. Raises :class:`PipelineError` for an image-to-video transformer without them, and for what SAT's samplers cannot follow.
    """

    def __init__(
        self, transformer: Any, vae: AutoencoderKLCogVideoX, scheduler: Any, empty_embeds: torch.Tensor, settings: SamplingConfig,
        *, frames: int, height: int, width: int, device: torch.device, dtype: torch.dtype, images: bool = False,
    ) -> None:  # fmt: skip
        diffusers_logging.disable_progress_bar()
        from_image = transformer.config.in_channels != vae.config.latent_channels
        if from_image and (not images or settings.sampler in sat_samplers.SOLVERS):
            raise PipelineError(
                f"The transformer takes {transformer.config.in_channels} channels: it makes videos from an image, "
                + (
                    "and there is none here."
                    if not images
                    else f"which sampling.sampler={settings.sampler} is not given."
                ),
                "stage=train samples it from the first frames of clips with sampling.sampler=default; sample anything else with diffusers' "
                "CogVideoXImageToVideoPipeline.",
            )
        if settings.sampler in SCHEDULERS:
            scheduler = SCHEDULERS[settings.sampler].from_config(scheduler.config)
        self.schedule = (
            schedule_of(scheduler.config, settings.steps) if settings.sampler in sat_samplers.SOLVERS else None
        )
        self.loaded_vae = vae
        vae = decoder(vae, settings.vae_dtype, settings.vae_tiling)
        kind = ImageToVideo if from_image else CogVideoXPipeline
        self.pipeline = kind(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer, self.vae, self.empty_embeds, self.settings = transformer, vae, empty_embeds, settings
        self.frames, self.height, self.width, self.device, self.dtype = frames, height, width, device, dtype
        self.stop: Callable[[], bool] | None = None
        """Asked after every step, the same answer on every rank: whether to give up with :class:`Interrupted`."""

    def describe(self) -> SamplingRecord:
        """Return how samples are made, for records."""
        settings = self.settings
        by_sat = settings.sampler in sat_samplers.SOLVERS
        scheduler = (
            f"SAT {sat_samplers.SOLVERS[settings.sampler]}" if by_sat else type(self.pipeline.scheduler).__name__
        )
        return SamplingRecord(
            sampler=settings.sampler,
            scheduler=scheduler,
            unconditional="zeros" if by_sat else "empty caption",
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            use_dynamic_cfg=settings.use_dynamic_cfg,
            vae_dtype=dtype_name(self.vae.dtype),
            vae_tiling=bool(self.vae.use_tiling),
        )

    def noise(self, request: Request) -> torch.Tensor:
        """fp32 ``[1, latent frames, channels, height / 8, width / 8]``, with the padded frames that a 1.5 transformer needs."""
        vae = self.vae.config
        frames, _ = latent_frames(
            self.frames, int(vae.temporal_compression_ratio), self.transformer.config.patch_size_t
        )
        return noise_for(
            request.seed, request.prompt.id, (1, frames, vae.latent_channels, self.height // 8, self.width // 8)
        )

    @torch.no_grad()
    def latents(self, request: Request) -> torch.Tensor:
        """Denoised, scaled latents ``[latent frames, channels, h, w]``, fp32 on the CPU."""
        was_training = self.transformer.training
        self.transformer.eval()
        self.vae.to(self.device)
        try:
            result = self._by_pipeline(request) if self.schedule is None else self._by_sat(request)
        finally:
            self.transformer.train(was_training)
        _, padded = latent_frames(
            self.frames, int(self.vae.config.temporal_compression_ratio), self.transformer.config.patch_size_t
        )
        return result[0, padded:].float().cpu()

    def _by_pipeline(self, request: Request) -> torch.Tensor:
        """``[1, latent frames, channels, h, w]``, the padded ones included: as latents, the pipeline does not drop them."""
        image = {} if request.image is None else {"image": Image.fromarray(request.image.numpy())}
        result: torch.Tensor = self.pipeline(
            prompt_embeds=request.embeds[None].to(self.device, self.dtype),
            negative_prompt_embeds=self.empty_embeds[None].to(self.device, self.dtype),
            latents=self.noise(request).to(self.device, self.dtype), generator=step_generator(request.seed, request.prompt.id),
            num_frames=self.frames, height=self.height, width=self.width, num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale, use_dynamic_cfg=self.settings.use_dynamic_cfg, output_type="latent",
            callback_on_step_end=self._give_up_if_asked, **image,
        ).frames  # fmt: skip
        return result

    def _by_sat(self, request: Request) -> torch.Tensor:
        """As :meth:`_by_pipeline`, with SAT's sampler and its zeros for the unconditional text."""
        assert self.schedule is not None
        settings = self.settings
        embeds = request.embeds[None].to(self.device)
        # As in diffusers' pipeline, a scale of 1 or less means no guidance at all.
        uncond = sat_samplers.zeros_for_uncond(embeds) if settings.guidance_scale > 1 else None
        trajectory = sat_samplers.steps(
            sat_samplers.Velocity(self.transformer, embeds, uncond, dtype=self.dtype), self.noise(request).to(self.device), self.schedule,
            settings.sampler, scale=settings.guidance_scale, dynamic=settings.use_dynamic_cfg,
            noises=step_generator(request.seed, request.prompt.id),
        )  # fmt: skip
        return sat_samplers.final(self._stoppable(trajectory))

    def _stoppable(self, trajectory: Iterable[sat_samplers.SolverStep]) -> Iterator[sat_samplers.SolverStep]:
        for step in trajectory:
            self._give_up_if_asked()
            yield step

    def _give_up_if_asked(self, *_: Any) -> dict[str, Any]:
        """A callback of diffusers' pipeline, which changes nothing."""
        if self.stop is not None and self.stop():
            raise Interrupted
        return {}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames of one sample's ``latents``, fp32 ``[frames, height, width, 3]`` in 0..1, on the CPU.

        What the VAE gives as infinite or as no number is NaN: cut to 0..1, an overflow would look like white.
        """
        self.vae.to(self.device)
        scaled = latents.to(self.device, self.vae.dtype).transpose(0, 1)[None] / self.vae.config.scaling_factor
        video = self.vae.decode(scaled).sample[0]
        video = torch.where(video.isfinite(), video, torch.nan)
        return (video.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu()

    @contextlib.contextmanager
    def decoding_in(self, dtype: str, tiling: bool) -> Iterator[None]:
        """Decode with the VAE in another ``dtype`` (fp32, bf16 or fp16) and ``tiling`` inside the block."""
        chosen = self.vae
        self.vae = decoder(self.loaded_vae, dtype, tiling)
        try:
            yield
        finally:
            if self.vae is not chosen:
                self.vae.to("cpu")
            self.vae = chosen

    def finish(self) -> None:
        """Give the VAE's memory on the device back."""
        self.vae.to("cpu")


class ImageToVideo(CogVideoXImageToVideoPipeline):
    """diffusers' own, with a VAE in a finer dtype than the transformer's."""

    def prepare_latents(self, image: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        return super().prepare_latents(image.to(self.vae.dtype), *arguments, **named)


def decoder(vae: AutoencoderKLCogVideoX, dtype: str, tiling: bool) -> AutoencoderKLCogVideoX:
    """``vae`` itself where ``dtype`` (auto | fp32 | bf16 | fp16) and ``tiling`` change nothing, else a copy with them: a VAE that was
    cast down could not be cast back."""
    wanted = vae.dtype if dtype == "auto" else DTYPES[dtype]
    if wanted == vae.dtype and tiling == bool(vae.use_tiling):
        return vae
    # diffusers' own .to warns that casting may be inconsistent, naming no module.
    copied: AutoencoderKLCogVideoX = torch.nn.Module.to(copy.deepcopy(vae), wanted)
    if not tiling:
        copied.disable_tiling()
        return copied
    # Overlaps of whole latents, about diffusers' own sixth and fifth: with other shares small tiles do not add up to the frame's size.
    rows, columns = copied.tile_latent_min_height, copied.tile_latent_min_width
    copied.enable_tiling(
        tile_overlap_factor_height=max(1, round(rows / 6)) / rows,
        tile_overlap_factor_width=max(1, round(columns / 5)) / columns,
    )
    return copied


def requests(
    prompts: Sequence[Prompt], embeds: torch.Tensor, seeds: Sequence[int], images: Sequence[torch.Tensor] = ()
) -> list[Request]:
    """Every prompt with every seed; ``embeds``: ``[prompts, tokens, width]``; ``images``: first frames, which prompts take in turn."""
    taken = [images[index % len(images)] if images else None for index in range(len(prompts))]
    return [
        Request(prompt, seed, embeds[index], taken[index]) for index, prompt in enumerate(prompts) for seed in seeds
    ]
