"""stage=prepare: encode clips and captions into <run>/cache, so that training never decodes or encodes them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.config import Config
from cogflow.config.train_settings import PrepareStage
from cogflow.data.buckets import bucket_sizes
from cogflow.data.clip_index import LAYOUTS
from cogflow.data.encode import Embed
from cogflow.data.preparation import EncoderInputs, PrepareResult, prepare
from cogflow.data.quarantine import QUARANTINE
from cogflow.data.shapes import draw_folder
from cogflow.errors import ConfigError, DataError
from cogflow.files.hashing import hash_file
from cogflow.files.paths import run_folder
from cogflow.ladder import clip_rungs
from cogflow.ladder import ladder_report as ladder
from cogflow.models import loading, transformer_inputs
from cogflow.records.cache_records import CacheIndex
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import Watchdog, enter_phase
from cogflow.runtime.progress import progress
from cogflow.runtime.run_lock import hold_run
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.stage_record import shown_command
from cogflow.tracking.tracker import open_tracker
from cogflow.training.failures import translate_lost_ranks

SHOWN_METRICS = ("clips", "unreadable", "upscaled", "seconds")
"""Fields of the result that are logged as metrics."""


def run(config: Config[PrepareStage]) -> None:
    """Prepare ``config.data`` into ``<run>/cache`` and write ``<run>/prepare.json``. Works alone and under torchrun."""
    started = time.time()
    ranks.setup()
    folder = run_folder(config.run)
    with hold_run(folder, shown_command()):
        prepare_folder(config, folder, started)


def prepare_folder(config: Config[PrepareStage], folder: Path, started: float) -> None:
    """Prepare the clips into ``folder``, whose lock this process holds. Collective."""
    data = config.data
    model = loading.model_folder(config.model)
    clips_folder = find_clips(config, folder)
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    transformer = transformer_inputs.read_transformer_settings(model)
    transformer_inputs.check_sizes(transformer, {*bucket_sizes(data), (data.frames, data.height, data.width)})
    inputs = EncoderInputs(
        hashes=ranks.run_on_main(lambda: model_hashes(model, dtype)),
        max_length=transformer.max_text_seq_length,
        images=data.image_variants if transformer.takes_image else 0,
    )

    def load_text() -> Embed:
        tokenizer = loading.load_tokenizer(model)
        encoder = loading.load_text_encoder(model, dtype, device)

        def embed(texts: Sequence[str]) -> torch.Tensor:
            return loading.encode_prompts(tokenizer, encoder, list(texts), inputs.max_length)

        return embed

    with Watchdog(folder, 60 * config.stage.stall_minutes) as watchdog, translate_lost_ranks(watchdog):
        result = prepare(
            config,
            load_vae=lambda: loading.load_vae(model, torch.float32, device),
            load_text=load_text,
            folder=RunLayout(folder).cache,
            clips_folder=clips_folder,
            inputs=inputs,
            report=progress,
        )
        enter_phase("reporting what was prepared")
        if ranks.is_main():
            summary = _report(config, folder, result, {"clips": str(clips_folder), "models": inputs.hashes}, started)
            echo(summary, f"prepared clips: {result.folder}")
        ranks.barrier()


def find_clips(config: Config[PrepareStage], folder: Path) -> Path:
    """Return the folder of clips; rank 0 first draws the clips of data=shapes.

    Raises :class:`DataError` without data.path.
    """
    data = config.data
    if data.path is not None:
        clips_folder = Path(data.path).expanduser()
    elif data.name == "shapes":
        clips_folder = folder / "data"
    else:
        raise DataError("data=folder needs data.path", LAYOUTS)
    if data.name == "shapes":
        ranks.run_on_main(lambda: draw_folder(clips_folder, data))
    return clips_folder


def model_hashes(model: Path, text_dtype: torch.dtype) -> dict[str, str]:
    """Return hashes of what determines the latents ("vae") and the embeddings (all others, with the dtype)."""
    hashes = {name: _hash_folder(model / name) for name in ("vae", "text_encoder", "tokenizer")}
    return {**hashes, "text_dtype": loading.dtype_name(text_dtype)}


def _hash_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ConfigError(
            f"{folder} is missing or empty", "preparing needs the vae, text_encoder and tokenizer of a pipeline folder"
        )
    listing = [[path.relative_to(folder).as_posix(), hash_file(path)] for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _report(
    config: Config[PrepareStage], folder: Path, result: PrepareResult, inputs: dict[str, object], started: float
) -> str:
    """Log metrics, the cache's index and the first rungs of the sharpness ladder, write prepare.json, and return its
    summary."""
    summary = _summary(result)
    for warning in result.warnings:
        echo(f"warning: {warning}")
    for note in result.notes:
        echo(f"note: {note}")
    with open_tracker(config, "prepare", folder) as tracker:
        tracker.log(0, {f"prepare/{name}": float(getattr(result, name)) for name in SHOWN_METRICS})
        files = (result.folder / CacheIndex.file_name, result.folder / QUARANTINE)
        base = tracker.input(loading.model_folder(config.model), "base-model")
        tracker.artifact("clips", "dataset", [path for path in files if path.is_file()], uses=[base])
        clip_rungs.record_clip_rungs(folder, result.folder, config.data)
        findings = ladder.report_ladder(tracker, folder)
    results = {
        "summary": summary,
        "where": str(result.folder),
        **asdict(result),
        "findings": [finding.line for finding in findings],
    }
    record_stage(folder, "prepare", config, inputs, results, started=started)
    return summary


def _summary(result: PrepareResult) -> str:
    clips = f"{result.clips} clips ({result.train} to train on, {result.holdout} held out)"
    reused = result.clips - result.encoded_clips
    summary = f"{clips}: {result.encoded_clips} encoded, {reused} reused; {result.encoded_captions} captions encoded"
    if result.buckets:
        counts = ", ".join(f"{bucket} {count}" for bucket, count in result.buckets.items())
        summary += f"; to train on by bucket: {counts}"
    return summary
