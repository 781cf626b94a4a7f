"""The engine: a transformer that DeepSpeed steps, with its weights and its saved states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.config.train_settings import TrainStage
from cogflow.errors import CheckpointError, ConfigError, QualityGateError
from cogflow.runtime import ranks
from cogflow.training import optimizer_update
from cogflow.training.deepspeed_start import check_dtype, make_optimizer, settings, start_deepspeed

TAG = "state"
NO_SMALLER_SCALE = "loss scale already at minimum"
"""Part of DeepSpeed's message when fp16 overflows at the smallest loss scale."""


class Engine:
    """A transformer that DeepSpeed steps.

    ``forward`` runs the wrapped module; ``backward`` scales for gradient accumulation and reduces; ``step`` updates at
    the last micro step. ``module`` is the transformer itself, for sampling. Raises :class:`ConfigError` for half
    precision without ZeRO, because DeepSpeed then keeps no fp32 master weights.
    """

    def __init__(
        self, module: torch.nn.Module, deepspeed_settings: DeepSpeedConfig, stage: TrainStage, dtype: torch.dtype
    ) -> None:
        if deepspeed_settings.zero_stage == 0 and dtype != torch.float32:
            raise ConfigError(
                f"deepspeed=zero0 trains in fp32 only, not in {str(dtype).removeprefix('torch.')}: fp32 master weights "
                "need ZeRO.",
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
            optimizer_update.fuse_zero_update(self.optimizer, ranks.world_size())

    @property
    def module(self) -> Any:
        return self.engine.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float, *, skip: bool = False) -> bool:
        """Update the weights after the last micro step; return whether they changed.

        A gradient that is not finite on any rank changes nothing. With ``skip`` DeepSpeed treats the step as an
        overflow, but keeps its loss scale. Raises :class:`QualityGateError` when fp16 has no smaller loss scale left.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        try:
            with self._overflowing() if skip else contextlib.nullcontext():
                self.engine.step()
        except Exception as error:  # DeepSpeed raises a bare one
            if NO_SMALLER_SCALE not in str(error):
                raise
            raise QualityGateError(
                "fp16 overflows at the smallest loss scale: the activations or gradients do not fit its range.",
                "Train in bf16 (model.dtype=bf16), or lower stage.learning_rate and resume from an earlier checkpoint.",
            ) from error
        return bool(self.engine.was_step_applied())

    @contextlib.contextmanager
    def _overflowing(self) -> Iterator[None]:
        """Make the optimizer treat the step as an overflow.

        (Private names: DeepSpeed's version is pinned, and tests check it.)
        """
        optimizer = self.optimizer
        if self.zero_stage == 0:
            optimizer.skip_next = True
            yield
            return
        scaler = dict(vars(optimizer.loss_scaler))
        check_grad_overflow = getattr(optimizer, "check_grad_overflow", True)
        has_overflow = optimizer.has_overflow
        optimizer.check_grad_overflow = True
        optimizer.has_overflow = lambda *_, **__: True
        try:
            yield
        finally:
            optimizer.check_grad_overflow = check_grad_overflow
            optimizer.has_overflow = has_overflow
            vars(optimizer.loss_scaler).update(scaler)

    def gradient_norm(self) -> torch.Tensor | float:
        """Return the L2 norm before clipping, over all ranks, of the last applied step; it may be on the device."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def loss_scale(self) -> float | None:
        """Return the present loss scale of fp16; ``None`` in other dtypes."""
        return float(self.optimizer.loss_scaler.loss_scale) if self.dtype == torch.float16 else None

    def sizes(self) -> tuple[int, int, int]:
        """Return the number of trained elements, the number of all elements, and the bytes of one stored element."""
        parameters = list(self.module.parameters())
        counts = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
        trained = sum(count for count, parameter in zip(counts, parameters, strict=True) if parameter.requires_grad)
        return trained, sum(counts), self.dtype.itemsize

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, weight), each whole on every rank, in the order of the state dict.

        Collective: every rank must take all.

        Under ZeRO-3 one weight is gathered at a time. A tensor is valid until the next one is taken.
        """
        self.flush_prefetch()
        for name, parameter in self.module.named_parameters():
            with self.whole([parameter]):
                yield name, parameter.detach()
        # Image-to-video models keep learned positions in a buffer.
        saved = self.module.state_dict().keys()
        yield from ((name, buffer) for name, buffer in self.module.named_buffers() if name in saved)

    def flush_prefetch(self) -> None:
        """Finish ZeRO-3's prefetches, which a forward pass without a backward pass leaves in flight.

        This calls the optimizer's part of DeepSpeed's own method only. The rest collects garbage and empties the
        device's cache, which takes half a second and waits for the device; with an EMA this runs at every step.
        """
        if self.zero_stage == 3:
            self.optimizer.empty_partition_cache()

    @contextlib.contextmanager
    def whole(self, parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
        """Gather ``parameters`` inside the block; with ``modifier_rank`` the changes of that rank are kept."""
        if self.zero_stage < 3:
            yield
            return
        with self._gathered(parameters, modifier_rank=modifier_rank):
            yield

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's states of all ranks below ``folder``. Collective."""
        self.flush_prefetch()
        # DeepSpeed warns that its "latest" file is missing: it is not needed, because the folder is published whole.
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Load states saved by :meth:`save` with the same world size and ZeRO stage.

        Collective; call it on verified folders only.
        """
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        except (RuntimeError, ValueError, KeyError, FileNotFoundError, AssertionError) as error:
            raise CheckpointError(
                f"DeepSpeed cannot load {folder}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                "A checkpoint is loaded with the world size and ZeRO stage it was saved with.",
            ) from error
        if path is None:
            raise CheckpointError(f"DeepSpeed found no states in {folder}.", "Resume from another checkpoint.")
        self._apply_settings()

    def _apply_settings(self) -> None:
        """Set the run's settings in the optimizer: loading restores those that the checkpoint was saved with."""
        stage = self._stage
        for group in self.optimizer.param_groups:
            group.update(betas=tuple(stage.betas), eps=stage.eps, weight_decay=stage.weight_decay)
        if self.zero_stage:
            self.optimizer.clip_grad = stage.gradient_clipping
