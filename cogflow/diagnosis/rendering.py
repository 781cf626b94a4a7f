"""Samples of a pipeline whose every component comes from one side or the other, with or without a field of the other's config.

Prompts and noise are the same for all mixes. One component is on the device at a time, and what a swap does not touch is not computed
again: embeddings, latents and frames are kept by what they depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from cogflow.assemble.components import PipelineComponent
from cogflow.config.sampling_section import SamplingConfig
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.models.code_check import CONFIGS
from cogflow.models.loading import SAFETENSORS_ONLY, encode_prompts, use_onednn_convolutions
from cogflow.sampling.prompts import Prompt
from cogflow.sampling.sampler import Sampler, requests
from cogflow.sharpness.metrics import Metrics, measure

Fields = tuple[tuple[str, Any], ...]
SAMPLING = "sampling"


@dataclass(frozen=True)
class Choice:
    """A component's files, and fields of its config that are set to other values."""

    part: PipelineComponent
    fields: Fields = ()

    @property
    def key(self) -> tuple[str, Fields]:
        return str(self.part.folder), self.fields


@dataclass(frozen=True)
class Mix:
    """A pipeline to sample: a choice for each component, and how it is called."""

    choices: Mapping[str, Choice]
    sampling: Fields

    def key(self, *names: str) -> tuple[Any, ...]:
        return tuple(self.choices[name].key for name in names)


@dataclass(frozen=True)
class Rendered:
    """``frames`` by name, ``[T, H, W, 3]`` in 0..1 on the CPU, and their panels."""

    frames: dict[str, torch.Tensor]
    panels: dict[str, Metrics]


def mix_of(side: DiagnosisInput, sampling: SamplingConfig) -> Mix:
    """Everything from one side, called as it is on record; what is not comes from ``sampling``."""
    recorded = side.sampling
    called = {name: getattr(recorded or sampling, name) for name in ("guidance_scale", "use_dynamic_cfg")}
    length = side.parts["transformer"].settings.get("max_text_seq_length") or 226
    called["max_sequence_length"] = (recorded.max_sequence_length if recorded else None) or length
    return Mix({name: Choice(side.parts[name]) for name in CONFIGS}, tuple(sorted(called.items())))


def swapped(mix: Mix, component: str, field: str, other: Mix) -> Mix:
    """``mix`` with a component of ``other``; with ``field``, with the value of that field alone."""
    if component == SAMPLING:
        called = dict(mix.sampling) | ({field: dict(other.sampling)[field]} if field else dict(other.sampling))
        return replace(mix, sampling=tuple(sorted(called.items())))
    choices = dict(mix.choices)
    if not field:
        choices[component] = other.choices[component]
    else:
        theirs = other.choices[component]
        value = dict(theirs.fields).get(field, theirs.part.settings.get(field))
        fields = dict(choices[component].fields) | {field: tuple(value) if isinstance(value, list) else value}
        choices[component] = replace(choices[component], fields=tuple(sorted(fields.items())))
    return replace(mix, choices=choices)


class Renderer:
    """Renders mixes of two sides at one size with one set of prompts."""

    def __init__(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, frames: int, height: int, width: int, device: torch.device,
        dtype: torch.dtype, told: Callable[[str], None] = lambda note: None,
    ) -> None:  # fmt: skip
        self.prompts, self.sampling, self.told = list(prompts), sampling, told
        self.frames, self.height, self.width, self.device, self.dtype = frames, height, width, device, dtype
        self._embeds: dict[Any, torch.Tensor] = {}
        self._latents: dict[Any, dict[str, torch.Tensor]] = {}
        self._rendered: dict[Any, Rendered] = {}

    def __call__(self, mix: Mix) -> Rendered:
        """Sample ``mix``. What diffusers or transformers raise at loading comes through."""
        key = (*mix.key(*CONFIGS), mix.sampling)
        if key not in self._rendered:
            latents = self.latents(mix)
            vae = self._vae(mix)
            sampler = self._sampler(None, vae, None, torch.zeros(1, 1), mix)
            frames = {name: sampler.decode(value) for name, value in latents.items()}
            self._rendered[key] = Rendered(frames, {name: measure(video) for name, video in frames.items()})
        return self._rendered[key]

    def latents(self, mix: Mix) -> dict[str, torch.Tensor]:
        """Denoised latents by name, scaled as the transformer knows them."""
        key = (*mix.key("tokenizer", "text_encoder", "transformer", "scheduler"), mix.sampling)
        if key not in self._latents:
            embeds = self.embed(mix, [prompt.text for prompt in self.prompts])
            transformer = self._transformer(mix)
            vae = self._vae(mix)  # its config only: how many channels, how many frames to a latent
            sampler = self._sampler(transformer, vae, self._scheduler(mix), embeds[-1], mix)
            wanted = requests(self.prompts, embeds, self.sampling.seeds[:1])
            found = {}
            for request in wanted:
                self.told(request.name)
                found[request.name] = sampler.latents(request)
            self._latents[key] = found
            del transformer, sampler
        return self._latents[key]

    def embed(self, mix: Mix, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings ``[len(texts) + 1, tokens, width]`` of ``texts`` and of the empty caption."""
        length = int(dict(mix.sampling)["max_sequence_length"])
        key = (*mix.key("tokenizer", "text_encoder"), length, tuple(texts))
        if key not in self._embeds:
            tokenizer = AutoTokenizer.from_pretrained(
                mix.choices["tokenizer"].part.folder, local_files_only=True, trust_remote_code=False
            )
            choice = mix.choices["text_encoder"]
            encoder = T5EncoderModel.from_pretrained(
                choice.part.folder, dtype=self.dtype, **SAFETENSORS_ONLY, **dict(choice.fields)
            )
            encoder = encoder.to(self.device).eval()
            self._embeds[key] = encode_prompts(tokenizer, encoder, [*texts, ""], length).cpu()
        return self._embeds[key]

    def _transformer(self, mix: Mix) -> CogVideoXTransformer3DModel:
        choice = mix.choices["transformer"]
        loaded = CogVideoXTransformer3DModel.from_pretrained(
            choice.part.folder, torch_dtype=self.dtype, **SAFETENSORS_ONLY, **dict(choice.fields)
        )
        return loaded.to(self.device).eval().requires_grad_(False)

    def _vae(self, mix: Mix) -> AutoencoderKLCogVideoX:
        """In the precision it is stored in, as plain diffusers would load it, but no coarser than it must be: fp32 here."""
        choice = mix.choices["vae"]
        vae = AutoencoderKLCogVideoX.from_pretrained(
            choice.part.folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY, **dict(choice.fields)
        )
        vae.enable_slicing()
        return use_onednn_convolutions(vae.eval().requires_grad_(False))

    def _scheduler(self, mix: Mix) -> Any:
        choice = mix.choices["scheduler"]
        cls = CogVideoXDPMScheduler if choice.part.class_name == "CogVideoXDPMScheduler" else CogVideoXDDIMScheduler
        return cls.from_pretrained(choice.part.folder, local_files_only=True, **dict(choice.fields))

    def _sampler(self, transformer: Any, vae: Any, scheduler: Any, empty: torch.Tensor, mix: Mix) -> Sampler:
        called = {name: value for name, value in mix.sampling if name in ("guidance_scale", "use_dynamic_cfg")}
        settings = replace(self.sampling, **called, vae_dtype="auto", vae_tiling=False)
        return Sampler(
            transformer if transformer is not None else _NoTransformer(vae), vae, scheduler, empty, settings, frames=self.frames,
            height=self.height, width=self.width, device=self.device, dtype=self.dtype,
        )  # fmt: skip


class _NoTransformer(torch.nn.Module):
    """Stands where only the VAE is wanted."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config = type("config", (), {"in_channels": vae.config.latent_channels, "patch_size_t": None})
