"""stage.what=validate: time the parts of a validation sample, and compare them with the training that it interrupts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from diffusers import AutoencoderKLCogVideoX

from cogflow.benchmarking.random_pipeline import published_vae_config
from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.benchmarking.step import MemoryLog, make_trainer, train_config
from cogflow.benchmarking.timed_turns import TimedTurns, step_times
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.config import Config
from cogflow.data.video import write_video
from cogflow.models import loading, tiny
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.sampling.prompts import Prompt
from cogflow.sampling.sampler import Request, Sampler
from cogflow.sharpness.metrics import measure
from cogflow.training import speed
from cogflow.training.loop import Trainer

PARTS = ("denoising", "decoding", "metrics", "writing")
PROMPTS, STEPS = 8, 500
"""Number of samples of one validation, and of training steps between two validations. The share is computed for
both.
"""
Result = TypeVar("Result")


def measure_validation(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Make ``stage.repeats`` samples of ``sampling.steps`` steps after one warm-up, then train the same model."""
    stage = config.stage
    speed.grow_segments()
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    trainer = make_trainer(train_config(config, 1 + 3 * stage.steps), device, dtype, MemoryLog(device))
    samples = _sample_times(config, trainer, folder)
    with progress(3, "training") as bar:
        turns = TimedTurns(stage.steps, device, bar.advance)
        trainer.callbacks.items.append(turns)
        trainer.context.step = 1
        trainer.run()
    times = step_times(turns.ours[1:], stage.batch_size)
    step = times.median if times else 0.0
    seconds = {part: median(sample[part] for sample in samples) for part in PARTS}
    whole = sum(seconds.values())
    share = PROMPTS * whole / ranks.world_size() / (STEPS * step)
    decoding = seconds["decoding"] / whole
    sample_line = f"a sample of {config.sampling.steps} steps in {whole:.3g} s, of which decoding {decoding:.1%}"
    rows: list[list[Cell]] = []
    for part in PARTS:
        values = [sample[part] for sample in samples]
        rows.append([part, seconds[part], min(values), max(values), seconds[part] / whole])
    return BenchmarkResult(
        summary=f"validate: {sample_line}; {PROMPTS} samples are {share:.1%} of {STEPS} training steps of {step:.3g} s",
        columns=["part", "seconds a sample", "lowest", "highest", "share"],
        rows=rows,
        details={"samples": samples, "seconds": seconds, "training_step": step, "share": share, "decoding": decoding},
    )


def _sample_times(config: Config[BenchmarkStage], trainer: Trainer, folder: Path) -> list[dict[str, float]]:
    """Return the seconds of each part of ``stage.repeats`` samples, after one warm-up sample."""
    data, repeats = config.data, config.stage.repeats
    transformer = trainer.engine.module
    vae = AutoencoderKLCogVideoX.from_config(published_vae_config(config.model.name)).eval()
    empty = torch.zeros(transformer.config.max_text_seq_length, transformer.config.text_embed_dim)
    from_image = trainer.objective.inputs.image_factor is not None
    sampler = Sampler(
        transformer,
        vae,
        loading.load_scheduler(tiny.folder()),
        empty,
        config.sampling,
        frames=data.frames,
        height=data.height,
        width=data.width,
        device=trainer.device,
        dtype=trainer.objective.dtype,
        images=from_image,
    )
    image = torch.zeros(data.height, data.width, 3, dtype=torch.uint8) if from_image else None
    request = Request(Prompt("random", "random"), 0, torch.randn(empty.shape), image)
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, float]] = []
    with progress(1 + repeats, "samples") as bar, TemporaryDirectory(dir=folder) as place:
        for turn in range(1 + repeats):
            found = _parts_of_sample(sampler, request, Path(place) / "sample.mp4", data.fps, trainer.device)
            samples += [found] if turn else []
            bar.advance()
    sampler.finish()
    return samples


def _parts_of_sample(
    sampler: Sampler, request: Request, path: Path, fps: float, device: torch.device
) -> dict[str, float]:
    spent: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent[part] = time.perf_counter() - began
        return result

    latents = timed("denoising", lambda: sampler.latents(request))
    frames = timed("decoding", lambda: sampler.decode(latents))
    pixels = (frames.nan_to_num(0.5) * 255).round().to(torch.uint8)
    timed("metrics", lambda: measure(pixels))
    timed("writing", lambda: write_video(path, pixels, fps))
    return spent
