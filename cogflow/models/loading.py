"""Load the parts of a pipeline folder, one at a time, and encode prompts as CogVideoX does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel
from transformers.utils import logging as transformers_logging

from cogflow.config.schema import ModelConfig
from cogflow.errors import ConfigError
from cogflow.models import tiny
from cogflow.models.code_check import refuse_code
from cogflow.models.family import FAMILY
from cogflow.models.onednn import by_onednn

transformers_logging.disable_progress_bar()  # a bar for each file read tells nothing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_ONLY = {"use_safetensors": True, "local_files_only": True}


def model_folder(model: ModelConfig) -> Path:
    """The pipeline folder training starts from.

    Raises :class:`ConfigError` when it is not named or has no transformer in it, :class:`PipelineError` for code in it.
    """
    if model.path is None:
        if model.name != "tiny":
            raise ConfigError(
                f"model={model.name} has no weights here.", "Give model.path=FOLDER, a diffusers pipeline folder."
            )
        folder = tiny.folder()
    else:
        folder = Path(model.path).expanduser()
    if not (folder / "transformer" / "config.json").is_file():
        raise ConfigError(
            f"model.path={folder} is not a diffusers pipeline folder: transformer/config.json is missing.",
            "It should hold transformer/, vae/, text_encoder/, tokenizer/ and scheduler/.",
        )
    refuse_code(folder)
    return folder


def resolve_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype that trains and samples: as asked, or the family's on a GPU and fp32 on a CPU."""
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    if device.type == "cpu" or model.name not in FAMILY:
        return torch.float32
    return DTYPES[FAMILY[model.name].dtype]


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def load_transformer(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype, **SAFETENSORS_ONLY
    ).to(device)


def load_vae(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKLCogVideoX:
    """The autoencoder in evaluation mode, decoding one clip at a time to bound memory."""
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **SAFETENSORS_ONLY)
    vae.enable_slicing()
    return by_onednn(vae.to(device).eval().requires_grad_(False))


def load_text_encoder(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> T5EncoderModel:
    encoder = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **SAFETENSORS_ONLY)
    return encoder.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)


def load_scheduler(folder: Path) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """The scheduler of the class that its config names, DDIM or DPM."""
    named = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name")
    cls = CogVideoXDPMScheduler if named == "CogVideoXDPMScheduler" else CogVideoXDDIMScheduler
    return cls.from_pretrained(folder, subfolder="scheduler", local_files_only=True)


@torch.no_grad()
def encode_prompts(tokenizer: Any, text_encoder: T5EncoderModel, texts: Sequence[str], max_length: int) -> torch.Tensor:
    """Embeddings ``[len(texts), max_length, width]`` in the encoder's dtype.

    As ``CogVideoXPipeline`` does it: padded to ``max_length``, no attention mask, so that the padding is encoded, too.
    """
    tokens = tokenizer(list(texts), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]
