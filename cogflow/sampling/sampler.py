"""Samples from fixed noise, made by diffusers' own pipeline, so that they are what users of the export will see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.utils import logging as diffusers_logging

from cogflow.config.schema import SamplingConfig
from cogflow.sampling.noise import noise_for
from cogflow.sampling.prompts import Prompt


@dataclass(frozen=True)
class Request:
    """One sample: a prompt, a seed, and the prompt's embeddings ``[tokens, width]``."""

    prompt: Prompt
    seed: int
    embeds: torch.Tensor

    @property
    def name(self) -> str:
        return f"{self.prompt.id}-seed{self.seed}"


class Sampler:
    """Denoises and decodes one request at a time.

    ``transformer`` may be a module that DeepSpeed holds. Text embeddings are given, so no text encoder is in memory; the VAE
    is moved to the device to decode and back to the CPU afterwards.
    """

    def __init__(
        self, transformer: Any, vae: AutoencoderKLCogVideoX, scheduler: Any, empty_embeds: torch.Tensor, settings: SamplingConfig,
        *, frames: int, height: int, width: int, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        diffusers_logging.disable_progress_bar()
        self.pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer, self.vae, self.empty_embeds, self.settings = transformer, vae, empty_embeds, settings
        self.frames, self.height, self.width, self.device, self.dtype = frames, height, width, device, dtype

    def noise(self, request: Request) -> torch.Tensor:
        """fp32 ``[1, latent frames, channels, height / 8, width / 8]``."""
        vae = self.vae.config
        channels = vae.latent_channels
        steps = (self.frames - 1) // int(vae.temporal_compression_ratio) + 1
        return noise_for(request.seed, request.prompt.id, (1, steps, channels, self.height // 8, self.width // 8))

    @torch.no_grad()
    def latents(self, request: Request) -> torch.Tensor:
        """Denoised, scaled latents ``[latent frames, channels, h, w]``, fp32 on the CPU."""
        was_training = self.transformer.training
        self.transformer.eval()
        self.vae.to(self.device)
        try:
            result = self.pipeline(
                prompt_embeds=request.embeds[None].to(self.device, self.dtype),
                negative_prompt_embeds=self.empty_embeds[None].to(self.device, self.dtype),
                latents=self.noise(request).to(self.device, self.dtype),
                num_frames=self.frames, height=self.height, width=self.width, num_inference_steps=self.settings.steps,
                guidance_scale=self.settings.guidance_scale, use_dynamic_cfg=self.settings.use_dynamic_cfg, output_type="latent",
            )  # fmt: skip
        finally:
            self.transformer.train(was_training)
        return result.frames[0].float().cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames of one sample's ``latents``, fp32 ``[frames, height, width, 3]`` in 0..1, on the CPU."""
        self.vae.to(self.device)
        scaled = latents.to(self.device, self.vae.dtype).transpose(0, 1)[None] / self.vae.config.scaling_factor
        video = self.vae.decode(scaled).sample[0]
        return (video.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu()

    def finish(self) -> None:
        """Give the VAE's memory on the device back."""
        self.vae.to("cpu")


def requests(prompts: Sequence[Prompt], embeds: torch.Tensor, seeds: Sequence[int]) -> list[Request]:
    """Every prompt with every seed; ``embeds``: ``[prompts, tokens, width]``."""
    return [Request(prompt, seed, embeds[index]) for index, prompt in enumerate(prompts) for seed in seeds]
