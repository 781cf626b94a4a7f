"""Compare a resumed run with its checkpoint, and collect the facts of the training that an export needs."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from cogflow.config.command import options
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.latent_cache import LatentCache
from cogflow.errors import CheckpointError
from cogflow.files.record_io import JsonObject
from cogflow.models import loading
from cogflow.records.training_records import RankLayout, TrainedWith, TrainerRecord, TunableSettings
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.training.changed_data import changed_data_error, trained_data_changes

LAYOUT_SETTINGS = {
    "batch_size": "stage.batch_size",
    "gradient_accumulation": "stage.gradient_accumulation",
    "world_size": "world size",
    "sequence_parallel": "parallel.sequence",
    "zero_stage": "deepspeed.zero_stage",
    "offload_optimizer": "deepspeed.offload_optimizer",
}
"""Names of a layout's fields in messages."""

BATCH_FIELDS = ("batch_size", "gradient_accumulation", "world_size", "sequence_parallel")
"""Fields of a layout that decide the number of clips in a step."""


def check_same(record: TrainerRecord, config: Config[TrainStage], cache: LatentCache) -> None:
    """Raise :class:`CheckpointError` listing what differs between a checkpoint and the config that resumes it.

    Report what may differ. ``stage.changed_data=use_prepared`` switches ``cache`` to the clips that the checkpoint was
    trained on: see :func:`trained_data_changes`.
    """
    stage = config.stage
    for key in changed_settings(record, stage):
        then, now = getattr(record.settings, key), getattr(stage, key)
        echo(f"warning: stage.{key} changes from {then} to {now}: the run now differs from an uninterrupted one")
    layout = training_layout(config)
    different = [
        *(
            f"{key}: {record.identity.get(key)} then, {now} now"
            for key, now in run_identity(config, cache).items()
            if key != "data" and record.identity.get(key) != now
        ),
        *_batch_differences(record.layout, layout),
    ]
    former_decay = record.settings.ema_decay
    if bool(former_decay) != bool(stage.ema_decay):
        different.append(f"stage.ema_decay: {former_decay} then, {stage.ema_decay} now; an EMA starts with the run")
    data_changes = trained_data_changes(record, config, cache)
    if different:
        different += [f"the prepared clips: {line}" for line in data_changes]
        new_run = options({"run.name": f"{config.run.name}-2"})
        raise CheckpointError(
            "The checkpoint was trained with other settings:\n  " + "\n  ".join(different),
            f"Give the same settings again, train in a new run such as {new_run}, or begin this run again "
            "with stage.resume=never, which keeps its results.",
        )
    if data_changes:
        raise changed_data_error(record, config, cache, data_changes)
    if record.layout != layout:
        changes = ", ".join(
            f"{LAYOUT_SETTINGS[key]} {then} -> {now}"
            for key, then, now in _differing(asdict(record.layout), asdict(layout))
        )
        echo(
            f"note: the checkpoint's states are resharded ({changes}). Clips, noise, weights and optimizer states are "
            "those of the "
            "uninterrupted run; sums run in another order, so losses agree up to rounding and not to the bit."
        )


def changed_settings(record: TrainerRecord, stage: TrainStage) -> list[str]:
    """Return the tunable settings whose values differ from those of the checkpoint."""
    return [key for key, _, _ in _differing(asdict(record.settings), asdict(tunable_settings(stage)))]


def tunable_settings(stage: TrainStage) -> TunableSettings:
    """Return the settings that may change on resume.

    Settings that only decide when something is saved or logged are not recorded.
    """
    return TunableSettings(**{field.name: getattr(stage, field.name) for field in fields(TunableSettings)})


def training_layout(config: Config[TrainStage]) -> RankLayout:
    """Return how this process group shards the work."""
    stage = config.stage
    return RankLayout(
        batch_size=stage.batch_size,
        gradient_accumulation=stage.gradient_accumulation,
        world_size=ranks.world_size(),
        sequence_parallel=config.parallel.sequence,
        zero_stage=config.deepspeed.zero_stage,
        offload_optimizer=config.deepspeed.offload_optimizer,
    )


def clips_per_step(layout: RankLayout) -> int:
    """Return the number of clips that one step trains on, over all ranks."""
    return layout.batch_size * layout.gradient_accumulation * layout.world_size // layout.sequence_parallel


def same_states(layout: RankLayout, saved: RankLayout) -> bool:
    """Return whether DeepSpeed can load states of the layout ``saved`` as they are: the same ranks, ZeRO stage and
    optimizer.
    """
    return (layout.world_size, layout.zero_stage, layout.offload_optimizer) == (
        saved.world_size,
        saved.zero_stage,
        saved.offload_optimizer,
    )


def run_identity(config: Config[TrainStage], cache: LatentCache) -> JsonObject:
    """Return what a resumed run must share with its checkpoint, by setting. Other values make another run."""
    return {
        "stage.seed": config.stage.seed,
        "stage.freeze": list(config.stage.freeze),
        "data": cache.fingerprint,
        "model": config.model.name,
        "dtype": loading.dtype_name(loading.resolve_dtype(config.model, ranks.device())),
    }


def check_facts(then: TrainedWith, now: TrainedWith, path: Path) -> None:
    """Raise :class:`CheckpointError` when the VAE or the scheduler beside the model is not the one that ``path`` was
    trained with.
    """
    different = [
        f"{key}: {former} then, {value} now"
        for key, former, value in _differing(asdict(then), asdict(now))
        if former is not None
    ]
    if different:
        raise CheckpointError(
            f"{path} was trained beside another VAE or scheduler:\n  " + "\n  ".join(different),
            "Give the model.path it was trained from; changing them during training blurs videos, and the loss does "
            "not show it.",
        )


def trained_with(vae: Any, scheduler: Any, dtype: torch.dtype, max_sequence_length: int | None = None) -> TrainedWith:
    """Return the facts that an export must carry. ``max_sequence_length``: text tokens of the transformer."""
    return TrainedWith(
        scaling_factor=float(vae.config.scaling_factor),
        invert_scale_latents=bool(vae.config.get("invert_scale_latents", False)),
        snr_shift_scale=float(scheduler.config.snr_shift_scale),
        prediction_type=scheduler.config.prediction_type,
        timestep_spacing=scheduler.config.timestep_spacing,
        rescale_betas_zero_snr=scheduler.config.rescale_betas_zero_snr,
        dtype=loading.dtype_name(dtype),
        max_sequence_length=max_sequence_length,
    )


def _batch_differences(then: RankLayout, now: RankLayout) -> list[str]:
    """Return the differences that change the number of clips in a step; none when the number is the same."""
    before, wanted = clips_per_step(then), clips_per_step(now)
    if before == wanted:
        return []
    different = [
        f"{LAYOUT_SETTINGS[key]}: {former} then, {value} now"
        for key, former, value in _differing(asdict(then), asdict(now))
        if key in BATCH_FIELDS
    ]
    divided = ", divided by parallel.sequence" if max(then.sequence_parallel, now.sequence_parallel) > 1 else ""
    product = f"batch_size x gradient_accumulation x world size{divided}"
    different.append(f"clips in a step ({product}): {before} then, {wanted} now; it decides the order of the data")
    return different


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, former value, value) of the keys whose values differ."""
    return [(key, then[key], value) for key, value in now.items() if then[key] != value]
