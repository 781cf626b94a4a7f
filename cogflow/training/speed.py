"""Apply the settings of speed: attention kernel and compiled blocks. They change only the rounding of results."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from cogflow.config.config import AnyConfig
from cogflow.errors import ConfigError

MAX_PROGRAMS = 64
"""Compiled programs that one block may have: one for each size of clips, with gradients and without."""

HOPPER = (9, 0)
"""CUDA capability from which on cuDNN's attention is the fastest."""
KERNEL_PRIORITY = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)

HALF_PRECISION = (torch.float16, torch.bfloat16)


def grow_segments() -> None:
    """Make PyTorch's CUDA allocator grow its segments instead of adding new ones, unless the environment configures the
    allocator.

    At every optimizer step gradients in one tensor take the place of activations in many; segments of fixed size would
    not hold them. Call it before anything is on a GPU.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Allow ``scaled_dot_product_attention`` of this process one kernel only; ``auto``: the fastest that accepts the
    inputs.

    That is cuDNN's on GPUs from Hopper on, which PyTorch itself tries last (docs/benchmarks.md), and PyTorch's choice
    on others. Text and video are one sequence and nothing is masked, so every kernel accepts them. The choice holds for
    the whole process, because recomputed blocks select their kernel in the backward pass. Raises :class:`ConfigError`
    for a kernel that does not exist on ``device`` or for ``dtype``.
    """
    problem = None
    if device.type != "cuda" and name in ("cudnn", "efficient"):
        problem = "needs a GPU; a CPU has flash and math"
    elif device.type == "cuda" and name in ("flash", "cudnn") and dtype not in HALF_PRECISION:
        problem = f"takes fp16 and bf16, not {str(dtype).removeprefix('torch.')}; efficient and math take it"
    if problem:
        raise ConfigError(f"speed.attention={name}: it {problem}.", "speed.attention=auto takes the fastest there is.")
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(name in ("auto", "flash"))
    cuda.enable_mem_efficient_sdp(name in ("auto", "efficient"))
    cuda.enable_cudnn_sdp(name in ("auto", "cudnn"))
    cuda.enable_math_sdp(name in ("auto", "math"))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        # As torch.nn.attention.sdpa_kernel(..., set_priority=True) does inside its block.
        torch._C._set_sdp_priority_order([int(kernel.value) for kernel in KERNEL_PRIORITY])


def compile_blocks(transformer: Any, how: str) -> None:
    """Compile the transformer's blocks when they first run; their weights keep their names.

    ``how``: that of :func:`how_compiled`.

    Blocks are alike, so two programs serve them all; norms, modulation and rotary positions become a few kernels
    between the matrix products.
    """
    if how == "off":
        return
    torch._dynamo.config.recompile_limit = max(MAX_PROGRAMS, torch._dynamo.config.recompile_limit)
    for block in transformer.transformer_blocks:
        block.compile(mode=compile_mode(how))


def compile_mode(how: str) -> str | None:
    """Return the ``mode`` of torch.compile for blocks compiled as ``how`` says: with CUDA graphs for "graphs"."""
    return "reduce-overhead" if how == "graphs" else None


def how_compiled(config: AnyConfig, device: torch.device) -> str:
    """Return ``speed.compile``.

    ``auto`` means "blocks" for published models on a GPU without ZeRO-3 and sequence parallelism, else "off".
    """
    if config.speed.compile != "auto":
        return config.speed.compile
    unsupported = config.deepspeed.zero_stage == 3 or config.parallel.sequence > 1
    return "off" if unsupported or device.type != "cuda" or config.model.name == "tiny" else "blocks"


def prepare(transformer: Any, config: AnyConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Apply ``config.speed`` to the model, before DeepSpeed wraps it."""
    choose_attention(config.speed.attention, device, dtype)
    compile_blocks(transformer, how_compiled(config, device))
