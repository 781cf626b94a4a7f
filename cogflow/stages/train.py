"""stage=train: full finetuning under DeepSpeed, with samples from fixed noise before the first step and while it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import TRAINER, RunLayout, step_name
from cogflow.config.schema import Config, TrainStage
from cogflow.data import buckets
from cogflow.data.cache import LatentCache
from cogflow.errors import ConfigError
from cogflow.files.paths import run_folder
from cogflow.models import loading, transformer_inputs
from cogflow.planning import plan_report as planning
from cogflow.planning.plan import kept
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import Watchdog
from cogflow.runtime.progress import progress
from cogflow.runtime.stop_signals import StopRequest
from cogflow.sampling.sample_record import newest_samples
from cogflow.tracking.html_report import write_report
from cogflow.tracking.stage_record import write_stage_record
from cogflow.tracking.tracker import Tracker, open_tracker
from cogflow.training import checkpoint, policy, retention, sequence, speed
from cogflow.training.failures import translate_errors
from cogflow.training.loop import Hooks
from cogflow.training.rollback import Rollback
from cogflow.training.run_identity import check_same
from cogflow.training.setup import TrainingSetup

MOST_DROPPED = 0.5


def run(config: Config[TrainStage]) -> None:
    """Train ``<run>/cache`` into ``<run>/checkpoints``; the same command resumes. Works alone and under torchrun."""
    stage = config.stage
    if stage.plan:
        return planning.show(config)
    started = time.time()
    sequence.check(config)
    speed.grow_segments()
    ranks.setup()
    folder = run_folder(config.run)
    cache = open_cache(config, folder)
    retention.sweep_all(RunLayout(folder).checkpoints)
    found, passed = checkpoint.find(stage.resume, RunLayout(folder).checkpoints)
    for line in passed:
        echo(f"warning: checkpoint passed over: {line}")
    found, before, rollbacks = where_to_start(found, stage, folder)
    if before is not None:
        check_same(before, config, cache)
        if before["step"] >= stage.steps:
            echo(
                f"this run is finished: {found} stands at step {before['step']} of {stage.steps}; give more stage.steps to go on"
            )
            return
    with (
        open_tracker(config, "train", folder) as tracker,
        Watchdog(folder, 60 * stage.stall_minutes) as watchdog,
        StopRequest() as request,  # up to the report: after the last step a signal has nothing left to stop
    ):
        with translate_errors(config, watchdog):
            keeps = kept(config)
            if keeps is not None:
                echo(f"activations: {planning.keeping(keeps)}")
            prepared = TrainingSetup(config, cache, folder, tracker, keeps)
            train(prepared, tracker, request, found, rollbacks)
        tracker.artifact(
            "checkpoint",
            "checkpoint",
            [RunLayout(folder).checkpoints / step_name(stage.steps) / TRAINER],
            uses=["clips"],
        )
        finish(config, folder, cache, prepared, started, tracker.url_or_dir)


def open_cache(config: Config[TrainStage], folder: Path) -> LatentCache:
    """The prepared clips, which must have been made with this config's data settings."""
    cache = LatentCache(RunLayout(folder).cache)
    if problems := cache.mismatches(config.data):
        raise ConfigError(
            "The prepared clips were made with other settings: " + "; ".join(problems), "Run stage=prepare again."
        )
    transformer = transformer_inputs.read_transformer_config(loading.model_folder(config.model))
    if transformer_inputs.takes_image(transformer) != bool(cache.image_variants):
        of = (
            "without first frames, for text to video"
            if not cache.image_variants
            else "with first frames, for image to video"
        )
        raise ConfigError(
            f"The prepared clips were made {of}; the model is not for that.",
            "Run stage=prepare again, with this model.",
        )
    transformer_inputs.check_sizes(transformer, buckets.sizes(config.data))
    return cache


def where_to_start(
    found: Path | None, stage: TrainStage, folder: Path
) -> tuple[Path | None, dict[str, Any] | None, list[Rollback]]:
    """The checkpoint to go on from, its ``trainer.json``, and the rollbacks that hold: a run that an alarm stopped may go back first."""
    trainer = checkpoint.read_trainer(found) if found else None
    try:
        return found, trainer, policy.before_resuming(found, trainer, stage, folder)
    except policy.GoBack as back:
        return back.path, checkpoint.read_trainer(back.path), back.rollbacks


def train(
    prepared: TrainingSetup, tracker: Tracker, request: StopRequest, found: Path | None, rollbacks: list[Rollback]
) -> None:
    """Go on from ``found`` to the last step, going back where ``stage.on_blur=rollback`` says so."""
    stage, folder, reached = prepared.stage, prepared.folder, 0

    def validate(done: int) -> None:
        outcome = prepared.validation(done)
        policy.act(outcome, stage, folder, prepared.validation.quiet, prepared.save)

    with progress(stage.steps, "training") as bar:
        hooks = Hooks(
            log=tracker.log,
            validate=validate,
            save=prepared.save,
            stopped=lambda done: prepared.save(done, owed=True),
            save_weights=prepared.save_weights,
            stop=request.anywhere,
            advance=lambda note: bar.advance(1, note),
            warn=tracker.alert,
            not_finite=lambda step, line: policy.not_finite(step, line, stage, folder, prepared.save, tracker.alert),
        )
        prepared.validation.stop = request.anywhere
        if stage.text_dropout > MOST_DROPPED:
            tracker.alert("few captions are trained on", few_captions(stage.text_dropout))
        while True:
            step, owed = prepared.resume(found, rollbacks)
            tracker.rewind(step)
            bar.advance(step - reached)
            if step:
                echo(f"resuming {folder} after step {step}")
            try:
                prepared.trainer.run(step, hooks, owed=owed)
                return
            except policy.GoBack as back:
                found, rollbacks, reached = back.path, back.rollbacks, back.start


def few_captions(dropout: float) -> str:
    """What no loss and no sharpness shows: pictures stay sharp, and stop following their prompts."""
    return (
        f"stage.text_dropout={dropout:g}: {dropout:.0%} of the samples are trained without their caption. The model unlearns its prompts, "
        "and neither the loss nor the sharpness shows it; CogVideoX was trained with 0.1."
    )


def finish(
    config: Config[TrainStage], folder: Path, cache: LatentCache, prepared: TrainingSetup, started: float, wandb: str
) -> None:
    """Write ``train.json`` and the report, and say where everything is."""
    if not ranks.is_main():
        return
    stage = prepared.stage
    last = RunLayout(folder).checkpoints / step_name(stage.steps)
    samples = newest_samples(RunLayout(folder).samples)
    clips = stage.batch_size * stage.gradient_accumulation * ranks.world_size() // config.parallel.sequence
    summary = f"{stage.steps} steps of {clips} clips"
    inputs = {"model": str(prepared.source), "data": cache.fingerprint}
    results = {"summary": summary, "where": str(last), "samples": str(samples) if samples else None, "wandb": wandb}
    write_stage_record(folder, "train", config, inputs, results, started=started)
    report = write_report(folder)
    echo(
        f"checkpoint: {last}\nsamples:    {samples or 'none (stage.sample_every=0)'}\nreport:     {report}\nW&B:        {wandb}"
    )
