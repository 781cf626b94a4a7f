"""DeepSpeed behind one door: its settings, its start, its weights. The only module that imports it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cogflow import ranks
from cogflow.config.schema import DeepSpeedConfig, TrainStage
from cogflow.errors import CheckpointError

TAG = "state"


def settings(deepspeed: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run. Learning rate and schedule are ours: see :mod:`cogflow.training.schedule`."""
    zero: dict[str, Any] = {
        "stage": deepspeed.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": deepspeed.overlap_comm,
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
    return {
        "train_micro_batch_size_per_gpu": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation,
        "gradient_clipping": stage.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A transformer that DeepSpeed steps.

    ``forward`` runs the wrapped module; ``backward`` scales for gradient accumulation and reduces; ``step`` updates at the
    last micro step only. ``module`` is the transformer itself, for sampling.
    """

    def __init__(self, module: torch.nn.Module, deepspeed_settings: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype) -> None:
        deepspeed = _deepspeed()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = _optimizer(trained, deepspeed_settings, stage)
        self.zero_stage = deepspeed_settings.zero_stage
        self._gathered = deepspeed.zero.GatheredParameters
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=trained, optimizer=optimizer, config=settings(deepspeed_settings, stage, dtype)
        )

    @property
    def module(self) -> Any:
        return self.engine.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def gradient_norm(self) -> float:
        """L2 norm before clipping, over all ranks; NaN before the first update."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, weight) one after another, whole, on every rank, in the order of the state dict.

        Under ZeRO-3 one weight is gathered at a time. The tensor is only valid until the next one; every rank must go through all.
        """
        self.settle()
        for name, parameter in self.module.named_parameters():
            with self.whole([parameter]):
                yield name, parameter.detach()
        # I2V keeps its learned positions in a buffer.
        saved = self.module.state_dict().keys()
        yield from ((name, buffer) for name, buffer in self.module.named_buffers() if name in saved)

    def settle(self) -> None:
        """Have no weight on its way: a forward pass without a backward leaves ZeRO-3's prefetches in flight."""
        if self.zero_stage == 3:
            self.engine.empty_partition_cache()

    @contextlib.contextmanager
    def whole(self, parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
        """Have ``parameters`` whole inside the block; with ``modifier_rank`` that rank's changes are kept."""
        if self.zero_stage < 3:
            yield
            return
        with self._gathered(parameters, modifier_rank=modifier_rank):
            yield

    def save(self, folder: Path) -> None:
        """DeepSpeed's states of all ranks below ``folder``. Collective."""
        self.settle()
        # Its warning about a missing "latest" pointer does not concern us: the folder is published whole by our own.
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """States saved by :meth:`save` with the same world size and ZeRO stage. Collective; only call it on verified folders."""
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        except (RuntimeError, ValueError, KeyError, FileNotFoundError, AssertionError) as error:
            raise CheckpointError(
                f"DeepSpeed cannot load {folder}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                "A checkpoint is loaded with the world size and ZeRO stage it was saved with.",
            ) from error
        if path is None:
            raise CheckpointError(f"DeepSpeed found no states in {folder}.", "Resume from another checkpoint.")


def _deepspeed() -> Any:
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
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _optimizer(parameters: list[torch.nn.Parameter], deepspeed_settings: DeepSpeedConfig, stage: TrainStage) -> torch.optim.Optimizer:
    arguments = {"lr": stage.learning_rate, "betas": tuple(stage.betas), "eps": stage.eps, "weight_decay": stage.weight_decay}
    if deepspeed_settings.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **arguments)
    return torch.optim.AdamW(parameters, fused=torch.cuda.is_available(), **arguments)
