"""What a resumed run must share with its checkpoint, and what an export must know of the training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from cogflow.config.schema import Config, TrainStage
from cogflow.data.cache import LatentCache
from cogflow.errors import CheckpointError
from cogflow.models import loading
from cogflow.runtime import ranks
from cogflow.runtime.console import echo

FIXED = ("seed", "freeze")
"""Settings of the stage that a resumed run must share with its checkpoint: with others, another run's states would be taken."""

TUNABLE = (
    "steps", "learning_rate", "schedule", "warmup_steps", "min_lr_ratio", "betas", "eps", "weight_decay", "gradient_clipping",
    "text_dropout", "ema_decay", "ema_every", "ema_warmup", "on_spike",
)  # fmt: skip
"""Settings that may change on resume; said, because the run is then not what one uninterrupted run would be. What only says when
something is saved, sampled, kept or logged may change without a word."""


def check_same(trainer: dict[str, Any], config: Config[TrainStage], cache: LatentCache) -> None:
    """Raise :class:`CheckpointError` listing what differs between a checkpoint and the config that is to resume it."""
    now = identity(config, cache)
    for key in changed(trainer, config.stage):
        then, value = trainer["settings"][key], getattr(config.stage, key)
        echo(
            f"warning: stage.{key} is now {value}, it was {then}: from here on this is another run than an uninterrupted one"
        )
    then_layout, layout = saved_layout(trainer), layout_of(config)
    different = [
        f"{key}: {trainer['identity'].get(key)} then, {value} now"
        for key, value in now.items()
        if trainer["identity"].get(key) != value
    ]
    if (before := clips_per_step(then_layout)) != (wanted := clips_per_step(layout)):
        different += [
            f"{key}: {then_layout[key]} then, {layout[key]} now"
            for key in (*BATCH, "parallel.sequence")
            if then_layout[key] != layout[key]
        ]
        shared = len({1, then_layout["parallel.sequence"], layout["parallel.sequence"]}) > 1
        product = "the product of the three" + (", over parallel.sequence" if shared else "")
        different.append(f"clips in a step, {product}: {before} then, {wanted} now; it settles the order of the data")
    decay, former = getattr(config.stage, "ema_decay", 0.0), trainer["settings"]["ema_decay"]
    if bool(former) != bool(decay):
        different.append(f"stage.ema_decay: {former} then, {decay} now; averages begin with a run")
    if different:
        raise CheckpointError(
            "The checkpoint was trained with other settings:\n  " + "\n  ".join(different),
            "Give the same settings again, start anew with stage.resume=never, or use another run.name.",
        )
    if then_layout != layout:
        parts = ", ".join(
            f"{key} {then_layout[key]} -> {value}" for key, value in layout.items() if then_layout[key] != value
        )
        echo(
            f"note: the checkpoint's states are dealt out anew ({parts}). Clips, noise, weights and the optimizer's states are those of "
            "the uninterrupted run; sums run in another order, so that losses agree to rounding and no longer to the bit."
        )


BATCH = ("stage.batch_size", "stage.gradient_accumulation", "world size")


def layout_of(config: Config[TrainStage]) -> dict[str, Any]:
    """How the work is dealt out over the ranks: what may change on resume, to rounding."""
    return {
        "stage.batch_size": config.stage.batch_size,
        "stage.gradient_accumulation": config.stage.gradient_accumulation,
        "world size": ranks.world_size(),
        "parallel.sequence": config.parallel.sequence,
        "deepspeed.zero_stage": config.deepspeed.zero_stage,
        "deepspeed.offload_optimizer": config.deepspeed.offload_optimizer,
    }


def saved_layout(trainer: dict[str, Any]) -> dict[str, Any]:
    """The layout that a checkpoint records; before there was ``parallel.sequence``, no rank shared its batch."""
    return {"parallel.sequence": 1, **trainer["layout"]}


def same_states(trainer: dict[str, Any], config: Config[TrainStage]) -> bool:
    """Whether DeepSpeed can take a checkpoint's states as they lie: the same ranks, stage and optimizer."""
    keys = ("world size", "deepspeed.zero_stage", "deepspeed.offload_optimizer")
    now = layout_of(config)
    return all(trainer["layout"][key] == now[key] for key in keys)


def clips_per_step(layout: dict[str, Any]) -> int:
    return math.prod(int(layout[key]) for key in BATCH) // int(layout["parallel.sequence"])


def changed(trainer: dict[str, Any], stage: Any) -> list[str]:
    """The tunable settings that a checkpoint was trained with other values of."""
    return [key for key in TUNABLE if trainer["settings"][key] != getattr(stage, key)]


def identity(config: Config[TrainStage], cache: LatentCache) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption."""
    return {
        **{f"stage.{key}": getattr(config.stage, key) for key in FIXED},
        "data": cache.fingerprint,
        "model": config.model.name,
        "dtype": loading.dtype_name(loading.resolve_dtype(config.model, ranks.device())),
    }


def check_facts(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise :class:`CheckpointError` when the VAE or the scheduler beside the model is another than the checkpoint was trained with."""
    different = [
        f"{key}: {then[key]} then, {value} now" for key, value in now.items() if key in then and then[key] != value
    ]
    if different:
        raise CheckpointError(
            f"{path} was trained beside another VAE or scheduler:\n  " + "\n  ".join(different),
            "Give the model.path it was trained from; a change of these in mid-training blurs, and the loss does not tell.",
        )


def trained_with(vae: Any, scheduler: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The facts an export must carry: with other values the same weights give blurred or broken videos."""
    names = ("snr_shift_scale", "prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    return {
        "scaling_factor": vae.config.scaling_factor,
        "invert_scale_latents": bool(vae.config.get("invert_scale_latents", False)),
        **{name: scheduler.config[name] for name in names},
        "dtype": loading.dtype_name(dtype),
    }
