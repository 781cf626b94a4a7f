"""stage.what=validate: what a validation costs by part, and beside the training that it interrupts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX

from cogflow.benchmarking.pipeline_folder import vae_config
from cogflow.benchmarking.step import MemoryWatch, make_trainer, speed_of, training
from cogflow.benchmarking.tables import Table
from cogflow.benchmarking.turns import Turns
from cogflow.config.schema import BenchmarkStage, Config
from cogflow.data.video import write_video
from cogflow.models import loading, tiny
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.sampling.prompts import Prompt
from cogflow.sampling.sampler import Request, Sampler
from cogflow.sharpness.metrics import measure
from cogflow.training import speed

PARTS = ("denoising", "decoding", "panel", "writing")
PROMPTS, STEPS = 8, 500
"""Samples of the validation, and steps of training, that the cost is told for."""


def validation(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """``stage.repeats`` samples after one that does not count, at ``sampling.steps``; then a training step of the same model."""
    speed.grow_segments()
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    trainer = make_trainer(training(config, stage, 1 + 3 * stage.steps), device, dtype, MemoryWatch(device))
    vae = AutoencoderKLCogVideoX.from_config(vae_config(config.model.name)).eval()
    data, length = config.data, trainer.engine.module.config
    empty = torch.zeros(length.max_text_seq_length, length.text_embed_dim)
    sampler = Sampler(
        trainer.engine.module, vae, loading.load_scheduler(tiny.folder()), empty, config.sampling,
        frames=data.frames, height=data.height, width=data.width, device=device, dtype=dtype,
        images=trainer.inputs.image_factor is not None,
    )  # fmt: skip
    image = (
        torch.zeros(data.height, data.width, 3, dtype=torch.uint8) if trainer.inputs.image_factor is not None else None
    )
    request = Request(Prompt("drawn", "drawn"), 0, torch.randn(empty.shape), image)
    samples: list[dict[str, float]] = []
    with progress(1 + stage.repeats, "samples") as bar, TemporaryDirectory(dir=_made(folder)) as place:
        for turn in range(1 + stage.repeats):
            found = _sample(sampler, request, Path(place) / "sample.mp4", data.fps, device)
            samples += [found] if turn else []
            bar.advance()
    sampler.finish()
    with progress(3, "training") as bar:
        turns = Turns(stage.steps, device, bar.advance)
        trainer.run(1, turns.hooks(lambda *_: None))
    step = speed_of(turns.ours[1:], stage.batch_size)
    seconds = {part: median(one[part] for one in samples) for part in PARTS}
    whole = sum(seconds.values())
    training_seconds = step.median if step else 0.0
    share = PROMPTS * whole / ranks.world_size() / (STEPS * training_seconds)
    decoding = seconds["decoding"] / whole
    line = f"validate: a sample of {config.sampling.steps} steps in {whole:.3g} s, of which decoding {decoding:.1%}; {PROMPTS} samples are "
    line += f"{share:.1%} of {STEPS} training steps of {training_seconds:.3g} s"
    cells = [
        [
            part,
            seconds[part],
            min(one[part] for one in samples),
            max(one[part] for one in samples),
            seconds[part] / whole,
        ]
        for part in PARTS
    ]
    results = {
        "summary": line,
        "samples": samples,
        "seconds": seconds,
        "training step": training_seconds,
        "share": share,
        "decoding": decoding,
    }
    return results, (["part", "seconds a sample", "lowest", "highest", "share"], cells)


def _sample(sampler: Sampler, request: Request, path: Path, fps: float, device: torch.device) -> dict[str, float]:
    """Seconds of each part of one sample."""
    spent: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent[part] = time.perf_counter() - began
        return found

    latents = timed("denoising", lambda: sampler.latents(request))
    frames = timed("decoding", lambda: sampler.decode(latents))
    shown = (frames.nan_to_num(0.5) * 255).round().to(torch.uint8)
    timed("panel", lambda: measure(shown))
    timed("writing", lambda: write_video(path, shown, fps))
    return spent


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
