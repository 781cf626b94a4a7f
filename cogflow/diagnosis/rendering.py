"""Sample pipelines whose components come from the candidate or the reference, also with single config fields exchanged.

Prompts and noise are the same for all of them. One component at a time is on the device. Embeddings, latents and frames
are cached by what they depend on, so that an exchange recomputes only what it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
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
"""Pairs of a name and a value, sorted by name."""

SAMPLING = "sampling"
"""Name that stands for the arguments of the call, beside the names of the components."""

DEFAULT_TEXT_TOKENS = 226
"""Length of captions when no config names it: the default of diffusers' pipeline."""


@dataclass(frozen=True)
class Choice:
    """A component's files, and the fields of its config that are set to other values."""

    component: PipelineComponent
    fields: Fields = ()

    @property
    def key(self) -> tuple[str, Fields]:
        return str(self.component.folder), self.fields


@dataclass(frozen=True)
class Mix:
    """A pipeline to sample: a choice for each component, and the arguments of the call."""

    choices: Mapping[str, Choice]
    sampling: Fields

    def key(self, *names: str) -> tuple[Any, ...]:
        """Return what the named components depend on."""
        return tuple(self.choices[name].key for name in names)


@dataclass(frozen=True)
class Rendered:
    """Samples by name: ``frames`` ``[T, H, W, 3]`` in 0..1 on the CPU, and their sharpness ``metrics``."""

    frames: dict[str, torch.Tensor]
    metrics: dict[str, Metrics]


@dataclass(frozen=True)
class SampleShape:
    """Size of the samples in frames and pixels."""

    frames: int
    height: int
    width: int


def mix_of(subject: DiagnosisInput, sampling: SamplingConfig) -> Mix:
    """Return the pipeline of one input, called as recorded; what is not recorded comes from ``sampling``."""
    recorded = subject.sampling
    length = recorded.max_sequence_length if recorded is not None else None
    length = length or subject.parts["transformer"].settings.get("max_text_seq_length") or DEFAULT_TEXT_TOKENS
    arguments = {
        "guidance_scale": recorded.guidance_scale if recorded is not None else sampling.guidance_scale,
        "use_dynamic_cfg": recorded.use_dynamic_cfg if recorded is not None else sampling.use_dynamic_cfg,
        "max_sequence_length": length,
    }
    return Mix({name: Choice(subject.parts[name]) for name in CONFIGS}, tuple(sorted(arguments.items())))


def swapped(mix: Mix, component: str, field: str, other: Mix) -> Mix:
    """Return ``mix`` with a component of ``other``, or with a ``field``, with the value of that field only."""
    if component == SAMPLING:
        theirs = dict(other.sampling)
        arguments = dict(mix.sampling) | ({field: theirs[field]} if field else theirs)
        return replace(mix, sampling=tuple(sorted(arguments.items())))
    choices = dict(mix.choices)
    if not field:
        choices[component] = other.choices[component]
    else:
        choice = other.choices[component]
        value = dict(choice.fields).get(field, choice.component.settings.get(field))
        fields = dict(choices[component].fields) | {field: tuple(value) if isinstance(value, list) else value}
        choices[component] = replace(choices[component], fields=tuple(sorted(fields.items())))
    return replace(mix, choices=choices)


class Renderer:
    """Samples pipelines at one size with one set of prompts."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        shape: SampleShape,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.prompts, self.sampling, self.shape = list(prompts), sampling, shape
        self.device, self.dtype = device, dtype
        self._embeds: dict[Any, torch.Tensor] = {}
        self._latents: dict[Any, dict[str, torch.Tensor]] = {}
        self._rendered: dict[Any, Rendered] = {}

    def __call__(self, mix: Mix) -> Rendered:
        """Return the samples of ``mix``. Raises what diffusers or transformers raise at loading."""
        key = (*mix.key(*CONFIGS), mix.sampling)
        if key not in self._rendered:
            latents = self.latents(mix)
            vae = self._vae(mix)
            sampler = self._sampler(_placeholder_transformer(vae), vae, None, torch.zeros(1, 1), mix)
            frames = {name: sampler.decode(value) for name, value in latents.items()}
            self._rendered[key] = Rendered(frames, {name: measure(video) for name, video in frames.items()})
        return self._rendered[key]

    def latents(self, mix: Mix) -> dict[str, torch.Tensor]:
        """Return denoised latents by sample name, at the scale that the transformer was trained with."""
        key = (*mix.key("tokenizer", "text_encoder", "transformer", "scheduler"), mix.sampling)
        if key not in self._latents:
            embeds = self.embed(mix, [prompt.text for prompt in self.prompts])
            transformer = self._transformer(mix)
            vae = self._vae(mix)  # only its config is used: channels and frames per latent frame
            sampler = self._sampler(transformer, vae, self._scheduler(mix), embeds[-1], mix)
            wanted = requests(self.prompts, embeds, self.sampling.seeds[:1])
            self._latents[key] = {request.name: sampler.latents(request) for request in wanted}
        return self._latents[key]

    def embed(self, mix: Mix, texts: Sequence[str]) -> torch.Tensor:
        """Return embeddings ``[len(texts) + 1, tokens, width]`` of ``texts`` and of the empty caption."""
        length = int(dict(mix.sampling)["max_sequence_length"])
        key = (*mix.key("tokenizer", "text_encoder"), length, tuple(texts))
        if key not in self._embeds:
            folder = mix.choices["tokenizer"].component.folder
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            choice = mix.choices["text_encoder"]
            encoder = T5EncoderModel.from_pretrained(
                choice.component.folder, dtype=self.dtype, **SAFETENSORS_ONLY, **dict(choice.fields)
            )
            encoder = encoder.to(self.device).eval()
            self._embeds[key] = encode_prompts(tokenizer, encoder, [*texts, ""], length).cpu()
        return self._embeds[key]

    def _transformer(self, mix: Mix) -> CogVideoXTransformer3DModel:
        choice = mix.choices["transformer"]
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            choice.component.folder, torch_dtype=self.dtype, **SAFETENSORS_ONLY, **dict(choice.fields)
        )
        return transformer.to(self.device).eval().requires_grad_(False)

    def _vae(self, mix: Mix) -> AutoencoderKLCogVideoX:
        """Load the VAE in fp32, so that its own rounding does not hide other differences."""
        choice = mix.choices["vae"]
        vae = AutoencoderKLCogVideoX.from_pretrained(
            choice.component.folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY, **dict(choice.fields)
        )
        vae.enable_slicing()
        return use_onednn_convolutions(vae.eval().requires_grad_(False))

    def _scheduler(self, mix: Mix) -> Any:
        choice = mix.choices["scheduler"]
        is_dpm = choice.component.class_name == "CogVideoXDPMScheduler"
        cls = CogVideoXDPMScheduler if is_dpm else CogVideoXDDIMScheduler
        return cls.from_pretrained(choice.component.folder, local_files_only=True, **dict(choice.fields))

    def _sampler(self, transformer: Any, vae: Any, scheduler: Any, empty: torch.Tensor, mix: Mix) -> Sampler:
        arguments = dict(mix.sampling)
        settings = replace(
            self.sampling,
            guidance_scale=arguments["guidance_scale"],
            use_dynamic_cfg=arguments["use_dynamic_cfg"],
            vae_dtype="auto",
            vae_tiling=False,
        )
        return Sampler(
            transformer,
            vae,
            scheduler,
            empty,
            settings,
            frames=self.shape.frames,
            height=self.shape.height,
            width=self.shape.width,
            device=self.device,
            dtype=self.dtype,
        )


def _placeholder_transformer(vae: Any) -> torch.nn.Module:
    """Return a module that replaces the transformer in a sampler that only decodes."""
    module = torch.nn.Identity()
    module.config = SimpleNamespace(in_channels=vae.config.latent_channels, patch_size_t=None)  # type: ignore[assignment]
    return module
