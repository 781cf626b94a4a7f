"""Load the components of a pipeline folder, one at a time, and encode prompts as CogVideoX does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel
from transformers.utils import logging as transformers_logging

from cogflow.config.model_section import ModelConfig
from cogflow.errors import ConfigError
from cogflow.files.bounded_parsing import read_json_object
from cogflow.models import tiny
from cogflow.models.code_check import refuse_code
from cogflow.models.family import MODEL_SPECS

transformers_logging.disable_progress_bar()  # a progress bar per file is of no use in a log

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_ONLY = {"use_safetensors": True, "local_files_only": True}


def model_folder(model: ModelConfig) -> Path:
    """Return the pipeline folder that training starts from.

    Raise :class:`ConfigError` when it is not named or has no transformer, :class:`PipelineError` for code in it.
    """
    if model.path is None:
        if model.name != "tiny":
            raise ConfigError(
                f"model={model.name} has no weights: model.path is not set.",
                "Give model.path=FOLDER, a diffusers pipeline folder.",
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
    """Return the dtype of training and sampling: ``model.dtype``, else the model's own on a GPU and fp32 on a CPU."""
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    if device.type == "cpu" or model.name not in MODEL_SPECS:
        return torch.float32
    return DTYPES[MODEL_SPECS[model.name].dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """Return fp32, bf16 or fp16."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def load_transformer(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> CogVideoXTransformer3DModel:
    """Load the transformer of a pipeline folder in ``dtype``."""
    return CogVideoXTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype, **SAFETENSORS_ONLY
    ).to(device)


def load_vae(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKLCogVideoX:
    """Load the VAE in evaluation mode. It decodes one clip at a time to bound memory."""
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **SAFETENSORS_ONLY)
    vae.enable_slicing()
    return use_onednn_convolutions(vae.to(device).eval().requires_grad_(False))


def load_text_encoder(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> T5EncoderModel:
    """Load the T5 encoder in evaluation mode."""
    encoder = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **SAFETENSORS_ONLY)
    return encoder.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer; code in its folder is never run."""
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)


def load_scheduler(folder: Path) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """Load the scheduler in the class that its config names, DDIM or DPM."""
    config = read_json_object(folder / "scheduler" / "scheduler_config.json")
    is_dpm = config.get("_class_name") == "CogVideoXDPMScheduler"
    scheduler_class = CogVideoXDPMScheduler if is_dpm else CogVideoXDDIMScheduler
    return scheduler_class.from_pretrained(folder, subfolder="scheduler", local_files_only=True)


@torch.no_grad()
def encode_prompts(tokenizer: Any, text_encoder: T5EncoderModel, texts: Sequence[str], max_length: int) -> torch.Tensor:
    """Return embeddings ``[len(texts), max_length, width]`` in the encoder's dtype.

    As in ``CogVideoXPipeline``, texts are padded to ``max_length`` and no attention mask is given, so that the padding
    is encoded, too.
    """
    tokens = tokenizer(list(texts), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    embeddings: torch.Tensor = text_encoder(tokens.input_ids.to(text_encoder.device))[0]
    return embeddings


def use_onednn_convolutions(vae: Any) -> Any:
    """Make the VAE's fp32 convolutions on a CPU use oneDNN whatever their size, and return the VAE.

    torch uses oneDNN for large convolutions only. The tiny VAE decodes a clip three times as fast with it. The
    published VAEs are large enough already and give unchanged results.
    """
    if torch.backends.mkldnn.is_available():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
                module._conv_forward = _OneDnnForward(module)  # type: ignore[method-assign]
    return vae


class _OneDnnForward:
    """Replacement of one convolution's ``_conv_forward``.

    Gradients, other devices and other dtypes use the original.
    """

    def __init__(self, module: nn.Conv3d) -> None:
        self.module = module

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        module = self.module
        if input.device.type != "cpu" or {input.dtype, weight.dtype} != {torch.float32} or torch.is_grad_enabled():
            result: torch.Tensor = nn.Conv3d._conv_forward(module, input, weight, bias)
            return result
        sizes = (list(module.padding), list(module.stride), list(module.dilation))
        result = torch.ops.aten.mkldnn_convolution(input, weight, bias, *sizes, module.groups)
        return result
