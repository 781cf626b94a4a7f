"""Start and configure DeepSpeed, and make its optimizer. Only this module imports DeepSpeed."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.config.train_settings import TrainStage
from cogflow.errors import ConfigError
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.training.optimizer_update import GuardedAdamW

CPU_ADAM = "cpu_adam"
"""Name of DeepSpeed's Adam for the host in torch's folder of compiled extensions."""
STALE_LOCK_SECONDS = 20 * 60.0
"""Age from which on a compilation is taken for dead: it takes one minute, a few on a busy machine."""


def start_deepspeed() -> Any:
    """Import and start DeepSpeed without its log lines; return the module. One process gets a process group, too."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank()))  # DeepSpeed requires it for one process, too
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it DeepSpeed warns that it found no accelerator
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch is renaming, and each call would log a warning.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # On a CPU init_distributed compiles a shared-memory extension for a minute, and a process killed meanwhile
        # leaves a lock on which every later start hangs. Gloo works without it. (Private table: DeepSpeed's version is
        # pinned.)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        if ranks.world_size() > 1:
            ranks.setup()
        else:
            # A store in memory, because one process needs no port.
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed


def settings(deepspeed: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's own configuration.

    The learning rate is set at each step: see :func:`cogflow.training.objective.learning_rate`.
    """
    zero: dict[str, Any] = {
        "stage": deepspeed.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": deepspeed.overlap_comm and ranks.world_size() > 1,
        "reduce_bucket_size": deepspeed.reduce_bucket_size,
        "allgather_bucket_size": deepspeed.allgather_bucket_size,
    }
    if deepspeed.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": deepspeed.allgather_bucket_size,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": max(deepspeed.allgather_bucket_size * 4, 1_000_000),
        }
    if deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # One rank sums nothing, so a copy to fp32 and back would change no bit.
    reduced = (
        {} if deepspeed.reduce_dtype == "model" or ranks.world_size() == 1 else {"communication_data_type": "fp32"}
    )
    return {
        "train_micro_batch_size_per_gpu": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation,
        # Without ZeRO our own optimizer clips, because DeepSpeed would clip a gradient that is not finite and step.
        "gradient_clipping": stage.gradient_clipping if deepspeed.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **reduced,
        # A gradient that is not finite on any rank is found before the update, and the update is skipped.
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "fp16": {
            "enabled": dtype == torch.float16,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


@contextlib.contextmanager
def sharded_init(deepspeed_settings: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype) -> Iterator[None]:
    """Shard a model that is built inside the block over the ranks, layer by layer, under ZeRO-3; else do nothing."""
    if deepspeed_settings.zero_stage < 3:
        yield
        return
    deepspeed = start_deepspeed()
    # The dtype comes from the settings: DeepSpeed ignores it as an argument on a CPU without fp16.
    with deepspeed.zero.Init(config_dict_or_path=settings(deepspeed_settings, stage, dtype)):
        yield


@contextlib.contextmanager
def whole_on_main(target: Any) -> Iterator[None]:
    """Gather a sharded parameter inside the block; rank 0's changes are sharded again at the end of the block."""
    if not hasattr(target, "ds_id"):
        yield
        return
    with start_deepspeed().zero.GatheredParameters([target], modifier_rank=0):
        yield


def check_dtype(dtype: torch.dtype) -> None:
    """Raise :class:`ConfigError` when DeepSpeed does not train in ``dtype`` on this device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    supported = {torch.float16: device.is_fp16_supported, torch.bfloat16: device.is_bf16_supported}
    if not supported.get(dtype, lambda: True)():
        raise ConfigError(
            f"model.dtype={str(dtype).removeprefix('torch.')}: DeepSpeed does not train in it on this "
            f"{device.device_name()}.",
            "Use model.dtype=fp32 here, or bf16 where it is supported.",
        )


def make_optimizer(
    parameters: list[torch.nn.Parameter], deepspeed_settings: DeepSpeedConfig, stage: TrainStage
) -> torch.optim.Optimizer:
    """Return the AdamW that DeepSpeed steps: on the host when optimizer states are offloaded, guarded without ZeRO."""
    arguments: dict[str, Any] = {
        "lr": stage.learning_rate,
        "betas": tuple(stage.betas),
        "eps": stage.eps,
        "weight_decay": stage.weight_decay,
    }
    if deepspeed_settings.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with compiling_cpu_adam():
            optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, adamw_mode=True, **arguments)
            return optimizer
    if deepspeed_settings.zero_stage == 0:
        return GuardedAdamW(parameters, gradient_clipping=stage.gradient_clipping, fused=True, **arguments)
    return torch.optim.AdamW(parameters, fused=True, **arguments)


@contextmanager
def compiling_cpu_adam() -> Iterator[None]:
    """Report that DeepSpeed compiles its Adam for the host at its first use.

    Raises :class:`ConfigError` when it cannot be compiled, and when an earlier compilation was killed: its lock would
    make every later start wait for ever, without a message (``torch/utils/file_baton.py``).
    """
    with ranks.tag_rank_errors():
        _check_compile_locks()
        try:
            yield
        except Exception as error:  # torch, ninja and DeepSpeed raise many kinds, bare ones among them
            raise ConfigError(
                f"DeepSpeed's Adam for the host could not be compiled: {_last_line(error)}",
                "It needs a C++ compiler (g++, or $CXX) and, with GPUs, torch's CUDA toolkit. Without: deepspeed=zero2 "
                "or zero3.",
            ) from error


def _check_compile_locks() -> None:
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob(f"**/{CPU_ADAM}/lock"):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # the compilation ended meanwhile
            continue
        if age > STALE_LOCK_SECONDS:
            raise ConfigError(
                f"A compilation of DeepSpeed's Adam for the host was killed {age / 60:.0f} minutes ago and left {lock}",
                f"When no other process compiles it: rm -r {lock.parent}",
            )
        echo(
            "waiting for another process to compile DeepSpeed's Adam for the host (if there is none: rm -r "
            f"{lock.parent})"
        )
        return
    if not any(root.glob(f"**/{CPU_ADAM}/*.so")):
        echo("compiling DeepSpeed's Adam for the host: one minute, once for each machine")


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
