"""What each component of a side is run on when its precision is tried: a caption, a noisy clip, a clip's latents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from cogflow.assemble.components import STEMS
from cogflow.diagnosis.config_differences import dtype_of
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.precision import Probe
from cogflow.ladder.schedule_probe import predict_velocity
from cogflow.models.loading import SAFETENSORS_ONLY, encode_prompts, use_onednn_convolutions
from cogflow.models.transformer_inputs import pad_latent_frames
from cogflow.sampling.noise import noise_for
from cogflow.weights.tensor_source import WeightsFolder

FP32: dict[str, Any] = {"torch_dtype": torch.float32, **SAFETENSORS_ONLY}
LEVEL, TIMESTEP = 0.5, 500  # about half signal, half noise


def parameters(name: str, folder: Path) -> int:
    return sum(math.prod(info.shape) for info in WeightsFolder(folder, STEMS[name]).tensors.values())


def probes_of(
    side: DiagnosisInput,
    latents: torch.Tensor,
    caption: str,
    embeds: torch.Tensor,
    device: torch.device,
    whole: set[str],
) -> list[Probe]:
    """``latents``: of a clip, not scaled, ``[channels, frames, h, w]``; ``embeds``: of its caption; ``whole``: what can be run."""
    folders = {name: side.parts[name].folder for name in STEMS if name in whole}
    sizes = {
        name: sum(math.prod(info.shape) for info in WeightsFolder(folder, STEMS[name]).tensors.values())
        for name, folder in folders.items()
    }
    length, factor = embeds.shape[0], float(side.parts["vae"].settings.get("scaling_factor") or 1.0)
    patch = side.parts["transformer"].settings.get("patch_size_t") or 1
    scaled = factor * pad_latent_frames(latents.float().transpose(0, 1), patch)[None].to(device)
    noisy = LEVEL * scaled + math.sqrt(1 - LEVEL**2) * noise_for(0, "precision", scaled.shape).to(device)

    def encode(model: Any, dtype: torch.dtype) -> torch.Tensor:
        tokenizer = AutoTokenizer.from_pretrained(
            side.parts["tokenizer"].folder, local_files_only=True, trust_remote_code=False
        )
        return encode_prompts(tokenizer, model, [caption], length)

    made = {
        "text_encoder": (
            lambda: T5EncoderModel.from_pretrained(folders["text_encoder"], dtype=torch.float32, **SAFETENSORS_ONLY),
            encode,
        ),
        "transformer": (
            lambda: CogVideoXTransformer3DModel.from_pretrained(folders["transformer"], **FP32),
            lambda model, dtype: predict_velocity(model, noisy, embeds, TIMESTEP, dtype),
        ),
        "vae": (
            lambda: use_onednn_convolutions(AutoencoderKLCogVideoX.from_pretrained(folders["vae"], **FP32)),
            lambda model, dtype: model.decode(latents[None].to(device, dtype)).sample,
        ),
    }
    from_image = side.parts["transformer"].settings.get("in_channels") != side.parts["transformer"].settings.get(
        "out_channels"
    )
    wanted = [name for name in made if name in folders and not (name == "transformer" and from_image)]

    def loader(name: str) -> Any:
        return lambda: made[name][0]().to(device).eval().requires_grad_(False)

    return [
        Probe(name, sizes[name], loader(name), made[name][1], dtype_of(side.parts[name], STEMS[name]))
        for name in wanted
    ]
