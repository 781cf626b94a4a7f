"""stage=prepare: clips and captions become latents and embeddings under <run>/cache, so that training never decodes or encodes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from cogflow.config.config import Config
from cogflow.config.train_settings import PrepareStage
from cogflow.data import buckets
from cogflow.data.clip_index import LAYOUTS
from cogflow.data.encode import QUARANTINE, Embed
from cogflow.data.preparation import PrepareResult, prepare
from cogflow.data.shapes_folder import draw_folder
from cogflow.errors import ConfigError, DataError
from cogflow.files.hashing import hash_file
from cogflow.files.paths import run_folder
from cogflow.ladder import clip_rungs
from cogflow.ladder import ladder_report as ladder
from cogflow.models import loading, transformer_inputs
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import Watchdog, enter_phase
from cogflow.runtime.progress import progress
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker
from cogflow.training.failures import translate_lost_ranks

CACHE = "cache"


def run(config: Config[PrepareStage]) -> None:
    """Prepare ``config.data`` into ``<run>/cache`` and write ``<run>/prepare.json``. Works alone and under torchrun."""
    stage = config.stage
    started = time.time()
    ranks.setup()
    folder = run_folder(config.run)
    model = loading.model_folder(config.model)
    clips_folder = find_clips(config, folder)
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    hashes = ranks.run_on_main(lambda: model_hashes(model, dtype))
    max_length = caption_length(model)
    transformer = transformer_inputs.read_transformer_config(model)
    transformer_inputs.check_sizes(
        transformer, {*buckets.sizes(config.data), (config.data.frames, config.data.height, config.data.width)}
    )

    def load_text() -> Embed:
        tokenizer = loading.load_tokenizer(model)
        encoder = loading.load_text_encoder(model, dtype, device)

        def embed(texts: Sequence[str]) -> torch.Tensor:
            return loading.encode_prompts(tokenizer, encoder, list(texts), max_length)

        return embed

    with Watchdog(folder, 60 * stage.stall_minutes) as watchdog, translate_lost_ranks(watchdog):
        result = prepare(
            config,
            load_vae=lambda: loading.load_vae(model, torch.float32, device),
            load_text=load_text,
            folder=folder / CACHE,
            clips_folder=clips_folder,
            model_hashes=hashes,
            max_length=max_length,
            report=progress,
            images=config.data.image_variants if transformer_inputs.takes_image(transformer) else 0,
        )
        enter_phase("telling what was prepared")
        if ranks.is_main():
            _tell(config, folder, clips_folder, hashes, result, started)
        ranks.barrier()


def find_clips(config: Config[PrepareStage], folder: Path) -> Path:
    """The folder of clips. Drawn clips are drawn first, by rank 0. Raises :class:`DataError`."""
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
    """What determines the latents ("vae") and the embeddings (the rest): hashes over the components' files, and the dtype."""
    hashes = {name: _hash_folder(model / name) for name in ("vae", "text_encoder", "tokenizer")}
    return {**hashes, "text_dtype": loading.dtype_name(text_dtype)}


def caption_length(model: Path) -> int:
    """Tokens that captions are padded to, as the transformer's own config says."""
    return int(transformer_inputs.read_transformer_config(model)["max_text_seq_length"])


def _hash_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ConfigError(
            f"{folder} is missing or empty", "preparing needs the vae, text_encoder and tokenizer of a pipeline folder"
        )
    listing = [[path.relative_to(folder).as_posix(), hash_file(path)] for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _tell(
    config: Config[PrepareStage],
    folder: Path,
    clips_folder: Path,
    hashes: dict[str, str],
    result: PrepareResult,
    started: float,
) -> None:
    reused = result.clips - result.encoded_clips
    summary = (
        f"{result.clips} clips ({result.train} to train on, {result.holdout} held out): {result.encoded_clips} encoded, {reused} reused; "
        f"{result.encoded_captions} captions encoded"
    )
    if result.buckets:
        summary += "; to train on by bucket: " + ", ".join(
            f"{bucket} {count}" for bucket, count in result.buckets.items()
        )
    for warning in result.warnings:
        echo(f"warning: {warning}")
    with open_tracker(config, "prepare", folder) as tracker:
        tracker.log(
            0,
            {
                f"prepare/{name}": float(getattr(result, name))
                for name in ("clips", "unreadable", "upscaled", "seconds")
            },
        )
        listed = [path for path in (result.folder / "index.json", result.folder / QUARANTINE) if path.is_file()]
        tracker.artifact(f"{config.run.name}-clips", "dataset", listed)
        clip_rungs.record_clip_rungs(folder, result.folder, config.data)
        findings = ladder.report_ladder(tracker, folder)
    results = {
        "summary": summary,
        "where": str(result.folder),
        **asdict(result),
        "findings": [one.line for one in findings],
    }
    record_stage(folder, "prepare", config, {"clips": str(clips_folder), "models": hashes}, results, started=started)
    echo(f"{summary}\nprepared clips: {result.folder}")
