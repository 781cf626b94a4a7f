"""Choices that change how fast a step is computed, and nothing that it computes but its rounding: attention's kernel, compiled blocks."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from cogflow.config.config import AnyConfig
from cogflow.errors import ConfigError

PROGRAMS = 64
"""Compiled programs that one block may have: one for each size of clips, with gradients and without."""

HOPPER = (9, 0)
PRIORITY = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

HALF = (torch.float16, torch.bfloat16)


def grow_segments() -> None:
    """Have PyTorch grow its pieces of a GPU's memory instead of taking new ones, unless the environment says how it is to be done.

    Gradients in one piece take the place of activations in many at every optimizer step; in pieces of fixed size that would not fit.
    To be called before anything lies on a GPU.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Have ``scaled_dot_product_attention`` of this process take one kernel only; ``auto``: the quickest that takes the inputs.

    That is cuDNN's on GPUs from Hopper on, which PyTorch itself asks last (docs/benchmarks.md), and PyTorch's choice elsewhere.

    Text and video are one sequence and nothing is masked, so that every kernel takes them as they are. For the whole process, since
    recomputed blocks ask for their kernel in the backward pass. Raises :class:`ConfigError` for a kernel that there is not.
    """
    problem = None
    if device.type != "cuda" and name in ("cudnn", "efficient"):
        problem = "needs a GPU; a CPU has flash and math"
    elif device.type == "cuda" and name in ("flash", "cudnn") and dtype not in HALF:
        problem = f"takes fp16 and bf16, not {str(dtype).removeprefix('torch.')}; efficient and math take it"
    if problem:
        raise ConfigError(f"speed.attention={name}: it {problem}.", "speed.attention=auto takes the best there is.")
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(name in ("auto", "flash"))
    cuda.enable_mem_efficient_sdp(name in ("auto", "efficient"))
    cuda.enable_cudnn_sdp(name in ("auto", "cudnn"))
    cuda.enable_math_sdp(name in ("auto", "math"))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        # As torch.nn.attention.sdpa_kernel(..., set_priority=True) does, but for good.
        torch._C._set_sdp_priority_order([int(kernel) for kernel in PRIORITY])


def compile_blocks(transformer: Any, how: str) -> None:
    """Have the transformer's blocks compiled when they first run; their weights keep their names. ``how``: that of
    :func:`how_compiled`. Blocks are alike, so that two programs serve them all; norms, modulation and rotary positions become a few kernels
    between the matrix products."""
    if how == "off":
        return
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    for block in transformer.transformer_blocks:
        block.compile(mode=mode(how))


def mode(how: str) -> str | None:
    """torch.compile's, for how blocks are compiled: CUDA graphs are replayed where there is a GPU."""
    return "reduce-overhead" if how == "graphs" else None


def how_compiled(config: AnyConfig, device: torch.device) -> str:
    """What ``speed.compile=auto`` comes to: blocks of the published models are compiled on a GPU, where nothing is in the way."""
    if config.speed.compile != "auto":
        return config.speed.compile
    in_the_way = config.deepspeed.zero_stage == 3 or config.parallel.sequence > 1
    return "off" if in_the_way or device.type != "cuda" or config.model.name == "tiny" else "blocks"


def prepare(transformer: Any, config: AnyConfig, device: torch.device, dtype: torch.dtype) -> None:
    """All that ``config.speed`` asks of the model, before DeepSpeed takes it."""
    choose_attention(config.speed.attention, device, dtype)
    compile_blocks(transformer, how_compiled(config, device))
