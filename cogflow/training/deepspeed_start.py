"""DeepSpeed's start, its settings and the optimizer that it steps. The only module that imports it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from cogflow.config.schema import DeepSpeedConfig, TrainStage
from cogflow.errors import ConfigError
from cogflow.runtime import ranks
from cogflow.training.cpu_adam import compiling
from cogflow.training.guarded_adamw import GuardedAdamW


def settings(deepspeed: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run. Learning rate and schedule are ours: see :mod:`cogflow.training.schedule`."""
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
    # One rank sums nothing: a copy in fp32 and back would change no bit.
    reduced = (
        {} if deepspeed.reduce_dtype == "model" or ranks.world_size() == 1 else {"communication_data_type": "fp32"}
    )
    return {
        "train_micro_batch_size_per_gpu": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation,
        # Without ZeRO our own optimizer clips, since DeepSpeed would clip what is not finite and step on.
        "gradient_clipping": stage.gradient_clipping if deepspeed.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **reduced,
        # A step whose gradient is not finite is found over all ranks before the update, and left out.
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
    """Have a model that is made inside the block be dealt out over the ranks, layer by layer, under ZeRO-3; else nothing."""
    if deepspeed_settings.zero_stage < 3:
        yield
        return
    deepspeed = start_deepspeed()
    # The dtype by its settings alone: given as an argument it is ignored on a CPU without fp16.
    with deepspeed.zero.Init(config_dict_or_path=settings(deepspeed_settings, stage, dtype)):
        yield


@contextlib.contextmanager
def whole_on_main(target: Any) -> Iterator[None]:
    """Have a parameter that is dealt out over the ranks whole inside the block; what rank 0 makes of it is dealt out again."""
    if not hasattr(target, "ds_id"):
        yield
        return
    with start_deepspeed().zero.GatheredParameters([target], modifier_rank=0):
        yield


def start_deepspeed() -> Any:
    """Import and start DeepSpeed, quietly, with one process group for one process, too."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank()))  # DeepSpeed insists on it, for one process, too
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch is renaming: a line for each of them in every log.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # On a CPU init_distributed compiles a shared-memory extension for a minute, and a process killed meanwhile leaves a
        # lock on which every later start hangs. Gloo does without. (Private table: DeepSpeed's version is pinned.)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        if ranks.world_size() > 1:
            ranks.setup()
        else:
            # In memory: one process needs no port.
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed


def check_dtype(dtype: torch.dtype) -> None:
    """Raise :class:`ConfigError` when DeepSpeed does not train in ``dtype`` on this device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    wanted = {torch.float16: device.is_fp16_supported, torch.bfloat16: device.is_bf16_supported}.get(
        dtype, lambda: True
    )
    if not wanted():
        raise ConfigError(
            f"model.dtype={str(dtype).removeprefix('torch.')}: DeepSpeed does not train in it on this {device.device_name()}.",
            "Use model.dtype=fp32 here, or bf16 where it is supported.",
        )


def make_optimizer(
    parameters: list[torch.nn.Parameter], deepspeed_settings: DeepSpeedConfig, stage: TrainStage
) -> torch.optim.Optimizer:
    arguments = {
        "lr": stage.learning_rate,
        "betas": tuple(stage.betas),
        "eps": stage.eps,
        "weight_decay": stage.weight_decay,
    }
    if deepspeed_settings.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with compiling():
            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **arguments)
    if deepspeed_settings.zero_stage == 0:
        return GuardedAdamW(parameters, gradient_clipping=stage.gradient_clipping, fused=True, **arguments)
    return torch.optim.AdamW(parameters, fused=True, **arguments)
