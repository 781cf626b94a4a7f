"""Describe the layout of a training over GPUs: the settings that determine memory, traffic and speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogflow.config.config import Config
from cogflow.config.deepspeed_section import EVERYTHING
from cogflow.config.train_settings import TrainStage

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NODE = 8
"""GPUs of one machine, where there are that many."""

REUSE = 10**9
"""Elements within which ZeRO-3 keeps what it gathered because it is used again: DeepSpeed's
``stage3_max_reuse_distance``."""


@dataclass(frozen=True)
class GpuLayout:
    """``bytes``: of one element of the weights that train, ``reduced_bytes``: of one gradient on its way. ``gpus``:
    all of them, ``local``: those of one machine. ``checkpoint_every``: 0 for as few blocks as fit, ``keep``: what
    they keep, ``auto`` for what fits; ``fitted``: what that comes to, once it is known, as :meth:`kept` has it.
    ``ema``: whether averages are kept, every ``ema_every`` steps, in host memory with ``ema_on_host``. ``reuse``:
    elements within which ZeRO-3 keeps weights for their next use. ``sequence``: GPUs that share each batch of
    ``batch`` clips."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    checkpointing: bool
    checkpoint_every: int
    gpus: int
    local: int
    bytes: int
    reduced_bytes: int
    batch: int
    accumulation: int
    reduce_bucket: int
    gather_bucket: int
    overlap: bool
    ema: bool
    ema_every: int
    ema_on_host: bool
    keep: str = "nothing"
    fitted: Mapping[str, int] | None = None
    reuse: int = REUSE
    sequence: int = 1

    @property
    def clips(self) -> int:
        """Clips of one optimizer step on all GPUs together."""
        return self.batch * self.accumulation * self.gpus // self.sequence

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.local)

    def kept(self, layers: int) -> Mapping[str, int]:
        """Blocks by what they keep (:data:`cogflow.training.gpu_memory.KEPT`), those that keep least first."""
        if self.fitted is not None:
            return self.fitted
        again = -(-layers // max(1, self.checkpoint_every)) if self.checkpointing else 0
        return {"nothing" if self.keep == "auto" else self.keep: again, EVERYTHING: layers - again}

    def recomputed(self, layers: int) -> int:
        """Blocks whose activations are dropped and computed again, all or some."""
        return layers - self.kept(layers).get(EVERYTHING, 0)


def of_config(config: Config[TrainStage], dtype: str, gpus: int, local: int | None = None) -> GpuLayout:
    """The layout that ``config`` asks for on ``gpus`` GPUs; ``local``: GPUs of one machine, else as many as are
    usual."""
    stage, deepspeed = config.stage, config.deepspeed
    return GpuLayout(
        zero_stage=deepspeed.zero_stage,
        offload_optimizer=deepspeed.offload_optimizer,
        offload_parameters=deepspeed.offload_parameters,
        checkpointing=deepspeed.activation_checkpointing,
        checkpoint_every=deepspeed.checkpoint_every_block,
        keep="nothing"
        if deepspeed.zero_stage == 3 or not deepspeed.activation_checkpointing
        else deepspeed.checkpoint_keep,
        gpus=gpus,
        local=min(gpus, local or NODE),
        bytes=BYTES[dtype],
        reduced_bytes=4 if deepspeed.reduce_dtype == "fp32" else BYTES[dtype],
        batch=stage.batch_size,
        accumulation=stage.gradient_accumulation,
        reduce_bucket=deepspeed.reduce_bucket_size,
        gather_bucket=deepspeed.allgather_bucket_size,
        overlap=deepspeed.overlap_comm,
        ema=stage.ema_decay > 0,
        ema_every=stage.ema_every,
        ema_on_host=stage.ema_device == "cpu",
        sequence=config.parallel.sequence,
    )
