"""stage=train: full finetuning under DeepSpeed, with samples from fixed noise before the first step and during
training.
"""

from __future__ import annotations

import time
from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout, step_name
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data import buckets
from cogflow.data.latent_cache import LatentCache
from cogflow.errors import ConfigError
from cogflow.files.paths import run_folder
from cogflow.models import loading, transformer_inputs
from cogflow.planning import plan_report
from cogflow.records.training_records import TrainerRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import Watchdog
from cogflow.runtime.progress import progress
from cogflow.runtime.run_lock import hold_run
from cogflow.runtime.stop_signals import StopRequest
from cogflow.sampling.sample_record import newest_samples
from cogflow.tracking.html_report import write_report
from cogflow.tracking.stage_record import shown_command, write_stage_record
from cogflow.tracking.tracker import open_tracker
from cogflow.training import loop, sequence, setup, speed
from cogflow.training.activation_memory import format_kept, kept_activations
from cogflow.training.changed_data import check_data
from cogflow.training.failures import translate_errors
from cogflow.training.run_identity import clips_per_step, training_layout
from cogflow.training.starting import check_finished, closing_settings, find_start
from cogflow.training.step_monitor import ProgressBar

MAX_TEXT_DROPOUT = 0.5
"""Share of samples without caption above which a model unlearns its prompts."""


def run(config: Config[TrainStage]) -> None:
    """Train ``<run>/cache`` into ``<run>/checkpoints``; the same command resumes.

    Works in one process and under torchrun.
    """
    stage = config.stage
    if stage.plan:
        return plan_report.show(config)
    started = time.time()
    sequence.check(config)
    speed.grow_segments()
    ranks.setup()
    folder = run_folder(config.run)
    with hold_run(folder, shown_command()):
        train(config, folder, started)


def train(config: Config[TrainStage], folder: Path, started: float) -> None:
    """Resume or start the training in ``folder``, whose lock this process holds. Collective."""
    stage = config.stage
    cache = open_cache(config, folder)
    start = find_start(config, cache, folder)
    if check_finished(config, start, folder):
        echo(f"this run is finished: {start.checkpoint} is the last step; a larger stage.steps continues it")
        if ranks.is_main() and not closing_settings(folder, stage.steps):
            finish(config, cache, folder, started=started, wandb="")
        return
    changed_data = check_data(config, cache)
    with (
        open_tracker(config, "train", folder) as tracker,
        Watchdog(folder, 60 * stage.stall_minutes) as watchdog,
        StopRequest() as request,  # up to the report: after the last step there is nothing left to stop
    ):
        with translate_errors(config, watchdog):
            keeps = kept_activations(config)
            if keeps is not None:
                echo(f"activations: {format_kept(keeps)}")
            services = setup.RunServices(folder, tracker, request.on_any_rank)
            trainer, checkpointer = setup.build(config, cache, services, keeps)
            if changed_data:
                tracker.alert("clips changed after stage=prepare", changed_data)
            if stage.text_dropout > MAX_TEXT_DROPOUT:
                tracker.alert("few captions are trained on", text_dropout_message(stage.text_dropout))
            with progress(stage.steps, "training") as bar:
                trainer.callbacks.items.append(ProgressBar(bar, trainer.monitor))
                loop.train(trainer, checkpointer, start)
        last = RunLayout(folder).checkpoints / step_name(stage.steps)
        base = tracker.input(loading.model_folder(config.model), "base-model")
        tracker.artifact("checkpoint", "checkpoint", [last / TrainerRecord.file_name], uses=["clips", base])
        finish(config, cache, folder, started=started, wandb=tracker.url_or_dir)


def open_cache(config: Config[TrainStage], folder: Path) -> LatentCache:
    """Return the prepared clips.

    Raises :class:`ConfigError` when they were made with other settings or for another kind of model.
    """
    cache = LatentCache(RunLayout(folder).cache)
    if problems := cache.mismatches(config.data):
        raise ConfigError(
            "The prepared clips were made with other settings: " + "; ".join(problems), "Run stage=prepare again."
        )
    transformer = transformer_inputs.read_transformer_settings(loading.model_folder(config.model))
    if transformer.takes_image != bool(cache.image_variants):
        made = "with first frames, for image to video"
        if not cache.image_variants:
            made = "without first frames, for text to video"
        raise ConfigError(
            f"The prepared clips were made {made}; the model is of the other kind.",
            "Run stage=prepare again, with this model.",
        )
    transformer_inputs.check_sizes(transformer, buckets.bucket_sizes(config.data))
    return cache


def text_dropout_message(dropout: float) -> str:
    """Return a warning that videos stop following their prompts, which neither loss nor sharpness shows."""
    return (
        f"stage.text_dropout={dropout:g}: {dropout:.0%} of the samples are trained without their caption. The model "
        "unlearns its prompts, "
        "and neither the loss nor the sharpness shows it; CogVideoX was trained with 0.1."
    )


def finish(config: Config[TrainStage], cache: LatentCache, folder: Path, *, started: float, wandb: str) -> None:
    """Write ``train.json`` and the report, and print where everything is. Rank 0 works."""
    if not ranks.is_main():
        return
    stage = config.stage
    last = RunLayout(folder).checkpoints / step_name(stage.steps)
    samples = newest_samples(RunLayout(folder).samples)
    summary = f"{stage.steps} steps of {clips_per_step(training_layout(config))} clips"
    sources = {"model": str(loading.model_folder(config.model)), "data": cache.fingerprint}
    results = {"summary": summary, "where": str(last), "samples": str(samples) if samples else None, "wandb": wandb}
    write_stage_record(folder, "train", config, sources, results, started=started)
    report = write_report(folder)
    echo(f"checkpoint: {last}")
    echo(f"samples:    {samples or 'none (stage.sample_every=0)'}")
    echo(f"report:     {report}")
    echo(f"W&B:        {wandb}")
