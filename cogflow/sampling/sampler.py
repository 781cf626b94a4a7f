"""Sample videos from fixed noise with diffusers' pipeline or with SAT's samplers.

diffusers' pipeline gives the videos that users of the export will get. SAT's samplers give videos that can be compared
with those of CogVideo's own code (docs/samplers.md).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
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
"""Value of ``sampling.sampler`` -> the scheduler that replaces the pipeline's own and takes over its settings."""


@dataclass(frozen=True)
class Request:
    """One sample to make.

    ``embeds``: the prompt's embeddings ``[tokens, width]``; ``image``: first frame, uint8 ``[H, W, 3]``.
    """

    prompt: Prompt
    seed: int
    embeds: torch.Tensor
    image: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """The name of the sample and its files."""
        return f"{self.prompt.id}-seed{self.seed}"


class Interrupted(Exception):
    """Sampling ended because :attr:`Sampler.stop` returned true; on every rank after the same step."""


@dataclass(eq=False, repr=False)
class Sampler:
    """Denoise and decode one request at a time.

    ``transformer``: may be wrapped by DeepSpeed. ``scheduler``: the pipeline's own. ``empty_embeds``: embeddings of
    the empty caption, ``[tokens, width]``. ``images``: requests have first frames. ``stop``: is called after every
    step and returns the same on every rank; true raises :class:`Interrupted`.

    Requests have text embeddings, so no text encoder is in memory. The VAE is moved to the device to decode;
    :meth:`finish` moves it back to the CPU. Raise :class:`PipelineError` for an image-to-video transformer without
    images or with SAT's samplers, and for a scheduler that SAT does not have.
    """

    transformer: Any
    vae: AutoencoderKLCogVideoX
    scheduler: InitVar[Any]
    empty_embeds: torch.Tensor
    settings: SamplingConfig
    _: KW_ONLY
    frames: int
    height: int
    width: int
    device: torch.device
    dtype: torch.dtype
    images: InitVar[bool] = False
    stop: Callable[[], bool] | None = field(default=None, init=False)

    def __post_init__(self, scheduler: Any, images: bool) -> None:
        transformer, settings = self.transformer, self.settings
        diffusers_logging.disable_progress_bar()
        from_image = transformer.config.in_channels != self.vae.config.latent_channels
        if from_image and (not images or settings.sampler in sat_samplers.SOLVERS):
            problem = f"sampling.sampler={settings.sampler} takes none" if images else "there is none"
            raise PipelineError(
                f"The transformer takes {transformer.config.in_channels} channels: it makes videos from an image, "
                f"but {problem}.",
                "stage=train samples it from the first frames of clips with sampling.sampler=default. "
                "For other images use diffusers' CogVideoXImageToVideoPipeline.",
            )
        if settings.sampler in SCHEDULERS:
            scheduler = SCHEDULERS[settings.sampler].from_config(scheduler.config)
        self.schedule = (
            schedule_of(scheduler.config, settings.steps) if settings.sampler in sat_samplers.SOLVERS else None
        )
        self.loaded_vae = self.vae
        self.vae = decoder(self.loaded_vae, settings.vae_dtype, settings.vae_tiling)
        pipeline_class = ImageToVideo if from_image else CogVideoXPipeline
        self.pipeline = pipeline_class(
            tokenizer=None, text_encoder=None, vae=self.vae, transformer=transformer, scheduler=scheduler
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def describe(self) -> SamplingRecord:
        """Return the settings of sampling, for records."""
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
        """Return the initial noise, fp32 ``[1, latent frames, channels, height / 8, width / 8]``.

        It includes the padding frames that a 1.5 transformer needs.
        """
        vae = self.vae.config
        frames, _ = latent_frames(
            self.frames, int(vae.temporal_compression_ratio), self.transformer.config.patch_size_t
        )
        return noise_for(
            request.seed, request.prompt.id, (1, frames, vae.latent_channels, self.height // 8, self.width // 8)
        )

    @torch.no_grad()
    def latents(self, request: Request) -> torch.Tensor:
        """Return denoised, scaled latents ``[latent frames, channels, h, w]``, fp32 on the CPU."""
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
        """Return latents ``[1, latent frames, channels, h, w]`` with the padding frames.

        The pipeline drops the padding only when it decodes.
        """
        image = {} if request.image is None else {"image": Image.fromarray(request.image.numpy())}
        result: torch.Tensor = self.pipeline(
            prompt_embeds=request.embeds[None].to(self.device, self.dtype),
            negative_prompt_embeds=self.empty_embeds[None].to(self.device, self.dtype),
            latents=self.noise(request).to(self.device, self.dtype),
            generator=step_generator(request.seed, request.prompt.id),
            num_frames=self.frames,
            height=self.height,
            width=self.width,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale,
            use_dynamic_cfg=self.settings.use_dynamic_cfg,
            output_type="latent",
            callback_on_step_end=self._stop_on_request,
            **image,
        ).frames
        return result

    def _by_sat(self, request: Request) -> torch.Tensor:
        """Return the same as :meth:`_by_pipeline`, with SAT's sampler and its zeros for the unconditional text."""
        assert self.schedule is not None
        settings = self.settings
        embeds = request.embeds[None].to(self.device)
        # As in diffusers' pipeline, a scale of 1 or less means no guidance at all.
        uncond = sat_samplers.zeros_for_uncond(embeds) if settings.guidance_scale > 1 else None
        trajectory = sat_samplers.steps(
            sat_samplers.Velocity(self.transformer, embeds, uncond, dtype=self.dtype),
            self.noise(request).to(self.device),
            self.schedule,
            settings.sampler,
            scale=settings.guidance_scale,
            dynamic=settings.use_dynamic_cfg,
            noises=step_generator(request.seed, request.prompt.id),
        )
        return sat_samplers.final(self._stoppable(trajectory))

    def _stoppable(self, trajectory: Iterable[sat_samplers.SolverStep]) -> Iterator[sat_samplers.SolverStep]:
        for step in trajectory:
            self._stop_on_request()
            yield step

    def _stop_on_request(self, *_: Any) -> dict[str, Any]:
        """Raise :class:`Interrupted` when :attr:`stop` returns true.

        As a callback of diffusers' pipeline it returns no changed tensors.
        """
        if self.stop is not None and self.stop():
            raise Interrupted
        return {}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the frames of one sample's ``latents``, fp32 ``[frames, height, width, 3]`` in 0..1, on the CPU.

        Values that are not finite become NaN: clamped to 0..1, an overflow would look like white.
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
        """Move the VAE to the CPU, which frees its memory on the device."""
        self.vae.to("cpu")


class ImageToVideo(CogVideoXImageToVideoPipeline):
    """diffusers' pipeline, for a VAE whose dtype differs from the transformer's."""

    def prepare_latents(self, image: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        """Return the result of diffusers' method, with ``image`` in the VAE's dtype."""
        return super().prepare_latents(image.to(self.vae.dtype), *arguments, **named)


def decoder(vae: AutoencoderKLCogVideoX, dtype: str, tiling: bool) -> AutoencoderKLCogVideoX:
    """Return ``vae`` with ``dtype`` (auto, fp32, bf16 or fp16) and ``tiling``.

    Return ``vae`` itself when neither changes, else a copy: casting down loses precision that casting back does not
    restore.
    """
    wanted = vae.dtype if dtype == "auto" else DTYPES[dtype]
    if wanted == vae.dtype and tiling == bool(vae.use_tiling):
        return vae
    # diffusers' own .to warns that casting may be inconsistent, naming no module.
    copied: AutoencoderKLCogVideoX = torch.nn.Module.to(copy.deepcopy(vae), wanted)
    if not tiling:
        copied.disable_tiling()
        return copied
    # The overlaps are whole latents, close to diffusers' 1/6 and 1/5. With fractions of a latent, small tiles do not
    # add up to the size of the frame.
    rows, columns = copied.tile_latent_min_height, copied.tile_latent_min_width
    copied.enable_tiling(
        tile_overlap_factor_height=max(1, round(rows / 6)) / rows,
        tile_overlap_factor_width=max(1, round(columns / 5)) / columns,
    )
    return copied


def requests(
    prompts: Sequence[Prompt], embeds: torch.Tensor, seeds: Sequence[int], images: Sequence[torch.Tensor] = ()
) -> list[Request]:
    """Return a request for every prompt with every seed.

    ``embeds``: ``[prompts, tokens, width]``; ``images``: first frames, assigned to the prompts in turn.
    """
    first_frames = [images[index % len(images)] if images else None for index in range(len(prompts))]
    return [
        Request(prompt, seed, embeds[index], first_frames[index])
        for index, prompt in enumerate(prompts)
        for seed in seeds
    ]
