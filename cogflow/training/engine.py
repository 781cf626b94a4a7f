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
from cogflow.errors import CheckpointError, ConfigError, QualityGateError
from cogflow.training.adamw import GuardedAdamW

TAG = "state"
SCALE_SPENT = "loss scale already at minimum"
"""What DeepSpeed says when fp16 overflows at the smallest loss scale there is."""


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
    reduced = {} if deepspeed.reduce_dtype == "model" else {"communication_data_type": "fp32"}
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
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A transformer that DeepSpeed steps.

    ``forward`` runs the wrapped module; ``backward`` scales for gradient accumulation and reduces; ``step`` updates at the
    last micro step only. ``module`` is the transformer itself, for sampling. Raises :class:`ConfigError` for half precision
    without ZeRO, which DeepSpeed trains by other rules.
    """

    def __init__(self, module: torch.nn.Module, deepspeed_settings: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype) -> None:
        if deepspeed_settings.zero_stage == 0 and dtype != torch.float32:
            raise ConfigError(
                f"deepspeed=zero0 trains in fp32 only, not in {str(dtype).removeprefix('torch.')}: fp32 masters need ZeRO.",
                "Use deepspeed=zero1, zero2 or zero3, which train the same, or model.dtype=fp32.",
            )
        deepspeed = start_deepspeed()
        _supported(dtype)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = _optimizer(trained, deepspeed_settings, stage)
        self.zero_stage, self.dtype, self._stage = deepspeed_settings.zero_stage, dtype, stage
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

    def step(self, learning_rate: float, *, skip: bool = False) -> bool:
        """Update, when the last micro step is done; whether weights were changed. A gradient that is not finite on any rank changes
        nothing, and no more does one that is to ``skip``: DeepSpeed's way of leaving out a step, without its lowering of the loss scale.

        Raises :class:`QualityGateError` when fp16 has no smaller loss scale left.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        try:
            with self._overflowing() if skip else contextlib.nullcontext():
                self.engine.step()
        except Exception as error:  # DeepSpeed raises a bare one
            if SCALE_SPENT not in str(error):
                raise
            raise QualityGateError(
                "fp16 overflows at the smallest loss scale: the activations or gradients do not fit its range.",
                "Train in bf16 (model.dtype=bf16), or lower stage.learning_rate and resume from an earlier checkpoint.",
            ) from error
        return bool(self.engine.was_step_applied())

    @contextlib.contextmanager
    def _overflowing(self) -> Iterator[None]:
        """Have the optimizer take the step for one that overflowed. (Private names: DeepSpeed's version is pinned, and tests hold it.)"""
        optimizer = self.optimizer
        if self.zero_stage == 0:
            optimizer.skip_next = True
            yield
            return
        scaler = dict(vars(optimizer.loss_scaler))
        checked, looked = getattr(optimizer, "check_grad_overflow", True), optimizer.has_overflow
        optimizer.check_grad_overflow, optimizer.has_overflow = True, lambda *_, **__: True
        try:
            yield
        finally:
            optimizer.check_grad_overflow, optimizer.has_overflow = checked, looked
            vars(optimizer.loss_scaler).update(scaler)

    def gradient_norm(self) -> torch.Tensor | float:
        """L2 norm before clipping, over all ranks, of the last step that was applied; it may still lie on the device."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def loss_scale(self) -> float | None:
        """What fp16's losses are multiplied by at present; ``None`` in other dtypes."""
        return float(self.optimizer.loss_scaler.loss_scale) if self.dtype == torch.float16 else None

    def sizes(self) -> tuple[int, int, int]:
        """Elements that are trained, elements in all, and bytes of one as it is stored."""
        parameters = list(self.module.parameters())
        counts = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
        trained = sum(count for count, parameter in zip(counts, parameters, strict=True) if parameter.requires_grad)
        return trained, sum(counts), self.dtype.itemsize

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
        self.settings_win()

    def put_states(self, parameter: Any, states: dict[str, torch.Tensor]) -> None:
        """Have the optimizer hold this rank's part of ``states`` of one trained parameter: its master ``fp32`` and Adam's moments, whole
        tensors on the CPU. (DeepSpeed's places for them are private: its version is pinned, and tests hold it.)"""
        optimizer = self.optimizer
        if self.zero_stage == 0:
            state = optimizer.state[parameter]
            state.setdefault("step", torch.zeros(()))
            state.update({key: value.to(parameter.device).clone() for key, value in states.items() if key != "fp32"})
        elif self.zero_stage == 3:
            group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
            self._state_of(optimizer.fp32_partitioned_groups_flat[group])
            rank, size = optimizer._get_param_partition_rank(parameter), parameter.ds_tensor.ds_numel
            for key, value in states.items():
                part, _ = optimizer._get_fp32_opt_state_partition(parameter, False, None if key == "fp32" else key)
                mine = value.reshape(-1)[rank * size : (rank + 1) * size]
                part[: len(mine)].data.copy_(mine)
        elif (mapping := parameter._hp_mapping) is not None:
            group = next(i for i, some in enumerate(optimizer.bit16_groups) if any(one is parameter for one in some))
            flat, place, source = optimizer.single_partition_of_fp32_groups[group], mapping.hp_fragment_address, mapping.lp_fragment_address
            for key, value in states.items():
                target = flat if key == "fp32" else self._state_of(flat)[key]
                mine = value.reshape(-1)[source.start : source.start + source.numel]
                target.data[place.start : place.start + place.numel].copy_(mine)

    def _state_of(self, flat: torch.Tensor) -> dict[str, Any]:
        """Adam's state of a flat group, which it makes at its first step only."""
        state = self.optimizer.optimizer.state[flat]
        if "exp_avg" not in state:
            counted = 0 if type(self.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam" else torch.zeros(())
            state.update(step=counted, exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
        return state

    def count_steps(self, steps: int) -> None:
        """Have Adam go on as after ``steps`` updates, once its states are put."""
        optimizer = self.optimizer if self.zero_stage == 0 else self.optimizer.optimizer
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], torch.Tensor) else steps

    def settings_win(self) -> None:
        """Have the optimizer go by the run's settings: DeepSpeed brings back those that a checkpoint was saved with."""
        stage = self._stage
        for group in self.optimizer.param_groups:
            group.update(betas=tuple(stage.betas), eps=stage.eps, weight_decay=stage.weight_decay)
        if self.zero_stage:
            self.optimizer.clip_grad = stage.gradient_clipping


@contextlib.contextmanager
def sharded_init(deepspeed_settings: DeepSpeedConfig, stage: Any, dtype: torch.dtype) -> Iterator[None]:
    """Have a model that is made inside the block be dealt out over the ranks, layer by layer, under ZeRO-3; else nothing."""
    if deepspeed_settings.zero_stage < 3:
        yield
        return
    deepspeed = start_deepspeed()
    with deepspeed.zero.Init(config_dict_or_path=settings(deepspeed_settings, stage, dtype), dtype=dtype):
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
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _supported(dtype: torch.dtype) -> None:
    """Raise :class:`ConfigError` when DeepSpeed does not train in ``dtype`` on this device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    wanted = {torch.float16: device.is_fp16_supported, torch.bfloat16: device.is_bf16_supported}.get(dtype, lambda: True)
    if not wanted():
        raise ConfigError(
            f"model.dtype={str(dtype).removeprefix('torch.')}: DeepSpeed does not train in it on this {device.device_name()}.",
            "Use model.dtype=fp32 here, or bf16 where it is supported.",
        )


def _optimizer(parameters: list[torch.nn.Parameter], deepspeed_settings: DeepSpeedConfig, stage: TrainStage) -> torch.optim.Optimizer:
    arguments = {"lr": stage.learning_rate, "betas": tuple(stage.betas), "eps": stage.eps, "weight_decay": stage.weight_decay}
    if deepspeed_settings.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **arguments)
    if deepspeed_settings.zero_stage == 0:
        return GuardedAdamW(parameters, gradient_clipping=stage.gradient_clipping, fused=torch.cuda.is_available(), **arguments)
    return torch.optim.AdamW(parameters, fused=torch.cuda.is_available(), **arguments)
