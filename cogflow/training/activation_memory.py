"""Choose how much transformer blocks keep of their activations: as little recomputation as fits into the memory of a
GPU.

Applies with ``deepspeed.checkpoint_every_block=0`` and ``deepspeed.checkpoint_keep=auto``. Training and plans call
the same functions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from cogflow.config.config import Config
from cogflow.config.deepspeed_section import EVERYTHING, KEEPS, SHARDED_KEEPS, sequence_problems
from cogflow.config.problems import fail
from cogflow.config.train_settings import TrainStage
from cogflow.data import buckets
from cogflow.models.family import MODEL_SPECS
from cogflow.runtime import ranks
from cogflow.training import flops, gpu_layout, gpu_memory, transformer_size
from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.gpu_memory import Sampling
from cogflow.training.transformer_size import Tokens, TransformerSize

FILLED = 0.95
"""Largest share of a GPU's memory that the prediction may fill. The prediction has an error, and running out of
memory costs more time than recomputing one more block."""

GPU_BYTES = 80e9
"""Memory of a GPU that is assumed if none is present and none is given."""

KEPT_WORDS = {
    "nothing": "keep their input alone",
    "attention": "keep attention",
    "products": "keep attention and all products but the widest",
    "all": "keep all products",
    "everything": "keep everything",
}
"""Descriptions of the activations that blocks keep, by ``deepspeed.checkpoint_keep``."""


@dataclass(frozen=True)
class TrainingSize:
    """Everything about a training that determines its memory. ``encoder``: parameters of the text encoder that embeds
    prompts."""

    shape: TransformerSize
    model_source: str
    dtype: str
    tokens: Tokens
    layout: GpuLayout
    sampling: Sampling | None
    encoder: int


def kept_activations(config: Config[TrainStage]) -> Mapping[str, int] | None:
    """Return the number of blocks by what they keep, or ``None`` if the settings do not leave it to the available
    memory."""
    deepspeed = config.deepspeed
    if not deepspeed.activation_checkpointing or (
        deepspeed.checkpoint_every_block and deepspeed.checkpoint_keep != "auto"
    ):
        return None
    size = training_size(config)
    memory, _ = memory_of_one_gpu(config.stage)
    return fit(size, memory).kept(size.shape.layers)


def format_kept(kept: Mapping[str, int]) -> str:
    """Return the number of blocks by what they keep in words."""
    words = {KEPT_WORDS[keep]: count for keep, count in kept.items() if count}
    if len(words) == 1:
        return f"all blocks {next(iter(words))}"
    return ", ".join(f"{count} blocks {text}" for text, count in words.items())


def training_size(config: Config[TrainStage]) -> TrainingSize:
    """Return the size of a training on the GPUs that the settings name, else on those of this run.

    Raises :class:`ConfigError` if the ranks or the attention heads cannot share sequences as the settings ask for.
    """
    stage = config.stage
    shape, model_source = transformer_size.of_model(config.model, stage.freeze)
    gpus = stage.plan_gpus or ranks.world_size()
    fail(list(sequence_problems(config, gpus, shape.heads)), "stage.plan_gpus sets the number of GPUs to plan for.")
    # The largest bucket determines the memory. All buckets are counted at its size.
    tokens = max(
        (transformer_size.tokens(shape, *size) for size in buckets.bucket_sizes(config.data)),
        key=lambda found: found.total,
    )
    dtype = training_dtype(config)
    sampling = validation_sampling(config) if stage.sample_every else None
    return TrainingSize(
        shape=shape,
        model_source=model_source,
        dtype=dtype,
        tokens=tokens,
        layout=gpu_layout.of_config(config, dtype, gpus, local_gpus(stage)),
        sampling=sampling,
        encoder=0 if config.model.name == "tiny" or sampling is None else gpu_memory.ENCODER,
    )


def fit(size: TrainingSize, memory: float) -> GpuLayout:
    """Return the layout with the least recomputation that fits into ``memory`` bytes of a GPU.

    The layout recomputes as much as the settings allow if nothing fits, and is returned unchanged if the settings
    leave nothing open."""
    layout = size.layout
    if not layout.checkpointing or (layout.checkpoint_every and layout.keep != "auto"):
        return layout

    def cost(kept: Mapping[str, int]) -> tuple[float, int]:
        """Return the operations that are done twice, then the blocks whose norms and activations are computed twice."""
        return flops.step(size.shape, size.tokens, kept).recomputation, size.shape.layers - kept.get(EVERYTHING, 0)

    choices = sorted(_choices(layout, size.shape.layers), key=cost)
    for kept in choices:
        fitted = replace(layout, fitted=kept)
        need = gpu_memory.gpu(size.shape, size.tokens, fitted, size.sampling, encoder=size.encoder)
        if need.peak <= FILLED * memory:
            return fitted
    return replace(layout, fitted=choices[-1])


def _choices(layout: GpuLayout, layers: int) -> Iterator[Mapping[str, int]]:
    """Yield all that the settings allow. Blocks differ by at most one kind; the kind that keeps less comes first."""
    keeps = SHARDED_KEEPS if layout.zero_stage == 3 else KEEPS
    if layout.keep != "auto":
        keeps = (layout.keep,)
    if layout.checkpoint_every:
        recomputed = len(range(0, layers, layout.checkpoint_every))
        yield from ({keep: recomputed, EVERYTHING: layers - recomputed} for keep in keeps)
        return
    for less, more in pairwise([*keeps, EVERYTHING]):
        yield from ({less: count, more: layers - count} for count in range(layers + 1))


def memory_of_one_gpu(stage: TrainStage) -> tuple[float, str]:
    """Return the memory of one GPU in bytes, and where the number comes from: the settings, the present GPU, or an
    assumption."""
    if stage.plan_memory_gb:
        return stage.plan_memory_gb * 1e9, "stage.plan_memory_gb"
    if torch.cuda.is_available():
        present = torch.cuda.get_device_properties(0)
        return float(present.total_memory), present.name
    return GPU_BYTES, "assumed; give stage.plan_memory_gb"


def training_dtype(config: Config[TrainStage]) -> str:
    """Return the dtype that training chooses. Without a GPU, plans use the model's training dtype, too."""
    if config.model.dtype != "auto":
        return config.model.dtype
    on_cpu = config.model.name == "tiny" and not torch.cuda.is_available()
    return "fp32" if on_cpu or config.model.name not in MODEL_SPECS else MODEL_SPECS[config.model.name].dtype


def validation_sampling(config: Config[TrainStage]) -> Sampling:
    """Return how a validation of ``config`` samples and decodes."""
    wanted, data = config.sampling, config.data
    return Sampling(
        frames=data.frames,
        height=data.height,
        width=data.width,
        passes=2 if wanted.guidance_scale > 1 else 1,
        vae_bytes=4 if wanted.vae_dtype == "auto" else gpu_layout.BYTES[wanted.vae_dtype],
        tiled=wanted.vae_tiling,
    )


def local_gpus(stage: TrainStage) -> int | None:
    """Return the processes of this machine as torchrun sets them, ``None`` if unknown or if another number of GPUs is
    planned for."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) if local and not stage.plan_gpus else None
