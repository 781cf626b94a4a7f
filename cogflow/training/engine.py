"""DeepSpeed behind one door: its steps, its weights, its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cogflow.config.schema import DeepSpeedConfig, TrainStage
from cogflow.errors import CheckpointError, ConfigError, QualityGateError
from cogflow.runtime import ranks
from cogflow.training import zero_update
from cogflow.training.deepspeed_start import check_dtype, make_optimizer, settings, start_deepspeed

TAG = "state"
SCALE_SPENT = "loss scale already at minimum"
"""What DeepSpeed says when fp16 overflows at the smallest loss scale there is."""


class Engine:
    """A transformer that DeepSpeed steps.

    ``forward`` runs the wrapped module; ``backward`` scales for gradient accumulation and reduces; ``step`` updates at the
    last micro step only. ``module`` is the transformer itself, for sampling. Raises :class:`ConfigError` for half precision
    without ZeRO, which DeepSpeed trains by other rules.
    """

    def __init__(
        self, module: torch.nn.Module, deepspeed_settings: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype
    ) -> None:
        if deepspeed_settings.zero_stage == 0 and dtype != torch.float32:
            raise ConfigError(
                f"deepspeed=zero0 trains in fp32 only, not in {str(dtype).removeprefix('torch.')}: fp32 masters need ZeRO.",
                "Use deepspeed=zero1, zero2 or zero3, which train the same, or model.dtype=fp32.",
            )
        deepspeed = start_deepspeed()
        check_dtype(dtype)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, deepspeed_settings, stage)
        self.zero_stage, self.dtype, self._stage = deepspeed_settings.zero_stage, dtype, stage
        self._gathered = deepspeed.zero.GatheredParameters
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=optimizer,
            config=settings(deepspeed_settings, stage, dtype),
        )

        if self.zero_stage in (1, 2) and not deepspeed_settings.offload_optimizer:
            zero_update.lighten(self.optimizer, ranks.world_size())

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
        """Have no weight on its way: a forward pass without a backward leaves ZeRO-3's prefetches in flight.

        The optimizer's part of the engine's own method, which collects garbage and empties the device's cache besides: half a second and
        a wait for the device, and with averages this is called in every step.
        """
        if self.zero_stage == 3:
            self.optimizer.empty_partition_cache()

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

    def settings_win(self) -> None:
        """Have the optimizer go by the run's settings: DeepSpeed brings back those that a checkpoint was saved with."""
        stage = self._stage
        for group in self.optimizer.param_groups:
            group.update(betas=tuple(stage.betas), eps=stage.eps, weight_decay=stage.weight_decay)
        if self.zero_stage:
            self.optimizer.clip_grad = stage.gradient_clipping
