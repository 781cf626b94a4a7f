"""What a resumed run must share with its checkpoint, and what an export must know of the training."""

from __future__ import annotations

from typing import Any

import torch

from cogflow import ranks
from cogflow.config.schema import Config
from cogflow.data.cache import LatentCache
from cogflow.errors import CheckpointError
from cogflow.models import components
from cogflow.tracking.console import say

FIXED = ("batch_size", "gradient_accumulation", "seed")
"""Settings of the stage that a resumed run must share with its checkpoint: they settle the order of the data."""

TUNABLE = ("steps", "learning_rate", "schedule", "warmup_steps", "min_lr_ratio", "text_dropout", "gradient_clipping")
"""Settings that may change on resume; said, because the run is then not what one uninterrupted run would be."""


def check_same(trainer: dict[str, Any], config: Config, cache: LatentCache) -> None:
    """Raise :class:`CheckpointError` listing what differs between a checkpoint and the config that is to resume it."""
    now = identity(config, cache)
    for key in changed(trainer, config.stage):
        then, value = trainer["settings"][key], getattr(config.stage, key)
        say(f"warning: stage.{key} is now {value}, it was {then}: from here on this is another run than an uninterrupted one")
    different = [
        f"{key}: {trainer['identity'].get(key)} then, {value} now" for key, value in now.items() if trainer["identity"].get(key) != value
    ]
    if different:
        raise CheckpointError(
            "The checkpoint was trained with other settings:\n  " + "\n  ".join(different),
            "Give the same settings again, start anew with stage.resume=never, or use another run.name.",
        )


def changed(trainer: dict[str, Any], stage: Any) -> list[str]:
    """The tunable settings that a checkpoint was trained with other values of."""
    return [key for key in TUNABLE if trainer["settings"][key] != getattr(stage, key)]


def identity(config: Config, cache: LatentCache) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption."""
    return {
        **{f"stage.{key}": getattr(config.stage, key) for key in FIXED},
        "data": cache.fingerprint,
        "deepspeed.zero_stage": config.deepspeed.zero_stage,
        "world size": ranks.world_size(),
        "model": config.model.name,
        "dtype": components.dtype_name(components.resolve_dtype(config.model, ranks.device())),
    }


def trained_with(vae: Any, scheduler: Any, transformer: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The facts an export must carry: with other values the same weights give blurred or broken videos."""
    names = ("snr_shift_scale", "prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    return {
        "scaling_factor": vae.config.scaling_factor,
        "invert_scale_latents": bool(vae.config.get("invert_scale_latents", False)),
        **{name: scheduler.config[name] for name in names},
        "dtype": components.dtype_name(dtype),
        "max_sequence_length": transformer.config.max_text_seq_length,
    }
