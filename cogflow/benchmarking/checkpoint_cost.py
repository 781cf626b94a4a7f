"""stage.what=checkpoint: time the parts of a save, during which training waits, and compare the save with
``torch.save`` of as many bytes and with ``cp``."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from cogflow.benchmarking.command_cost import process_memory
from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.benchmarking.step import MemoryLog, make_trainer, train_config
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.config import Config
from cogflow.files.atomic_write import sync, sync_tree
from cogflow.models import loading
from cogflow.records.training_records import ModelIdentity, TrainedWith, TrainerRecord
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.training import checkpoint, speed
from cogflow.training.batch import Loader
from cogflow.training.run_identity import training_layout, tunable_settings

SAVE, LOAD, TORCH_SAVE, COPY = "cogflow, a save", "cogflow, verified and loaded", "torch.save + fsync", "cp -r + sync"
Result = TypeVar("Result")


@dataclass(frozen=True)
class CheckpointRun:
    """One save or load of ``gb`` GB.

    ``peak``: growth of the process's memory in GB. ``parts``: seconds of a save by part.
    """

    way: str
    gb: float
    seconds: float
    peak: float
    parts: dict[str, float] | None = None


def measure_checkpoints(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Save and load the configured model as stage=train does, ``stage.repeats`` times after one warm-up."""
    stage = config.stage
    speed.grow_segments()
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    place = Path(stage.folder).expanduser() if stage.folder else folder / "benchmark"
    shutil.rmtree(place, ignore_errors=True)
    asked = train_config(config, 1)
    trainer = make_trainer(asked, device, dtype, MemoryLog(device))
    with Loader(trainer.batches.batch, 1, device) as loader:
        trainer.train_step(0, loader)
    record = TrainerRecord(
        step=1,
        family=config.model.name,
        model=ModelIdentity(config.model.name),
        trained_with=TrainedWith(),
        identity={},
        layout=training_layout(asked),
        settings=tunable_settings(asked.stage),
    )
    runs: list[CheckpointRun] = []
    with progress(1 + stage.repeats, "saves") as bar:
        for turn in range(1 + stage.repeats):
            found = _turn(trainer.engine, place, replace(record, step=turn + 1))
            runs += found if turn else []
            bar.advance()
    if not stage.keep:
        shutil.rmtree(place, ignore_errors=True)
    return _result(runs)


def _result(runs: list[CheckpointRun]) -> BenchmarkResult:
    size = runs[0].gb
    seconds = {way: [run.seconds for run in runs if run.way == way] for way in (SAVE, LOAD, TORCH_SAVE, COPY)}
    saves = [run.parts for run in runs if run.parts is not None]
    parts = {name: median(save[name] for save in saves) for name in saves[0]}
    ratio = median(ours / theirs for ours, theirs in zip(seconds[SAVE], seconds[TORCH_SAVE], strict=True))
    by_part = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    rows: list[list[Cell]] = []
    for way, times in seconds.items():
        middle, peak = median(times), max(run.peak for run in runs if run.way == way)
        rows.append([way, middle, min(times), max(times), size / middle, middle / median(seconds[TORCH_SAVE]), peak])
    line = f"checkpoint: {size:.3g} GB in {median(seconds[SAVE]):.3g} s ({by_part})"
    return BenchmarkResult(
        summary=f"{line}, {ratio:.2f} x torch.save + fsync",
        columns=["way", "seconds", "lowest", "highest", "GB a second", "ratio to torch.save", "GB more held"],
        rows=rows,
        details={"rows": [asdict(run) for run in runs], "parts": parts},
    )


def _turn(engine: Any, place: Path, record: TrainerRecord) -> list[CheckpointRun]:
    """Run a save, a load, ``torch.save`` and ``cp`` of as many bytes."""
    saved, save = _timed(lambda: checkpoint.save(place / "cogflow", record, engine, None))

    def verify_and_load() -> None:
        checkpoint.verify(saved.path)
        checkpoint.load(saved.path, record, engine, None)

    _, load = _timed(verify_and_load)
    _, torch_save = _timed(partial(_torch_save, _tensors_of(saved.bytes), place / "torch.pt"))
    _, copy = _timed(lambda: _copy(saved.path, place / "copy"))
    for folder in (saved.path, place / "copy"):
        shutil.rmtree(folder)
    (place / "torch.pt").unlink()
    size = saved.bytes / 1e9
    return [
        CheckpointRun(SAVE, size, *save, parts=saved.phases),
        CheckpointRun(LOAD, size, *load),
        CheckpointRun(TORCH_SAVE, size, *torch_save),
        CheckpointRun(COPY, size, *copy),
    ]


def _tensors_of(size: int) -> dict[str, torch.Tensor]:
    """Return ``size`` bytes in tensors of at most 256 MiB."""
    return {str(start): torch.ones(min(2**28, size - start), dtype=torch.uint8) for start in range(0, size, 2**28)}


def _torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)
    sync(path)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    sync_tree(target)


def _timed(work: Callable[[], Result]) -> tuple[Result, tuple[float, float]]:
    """Return the result of ``work``, its seconds and the growth of the process's memory in GB."""
    before, _ = process_memory(os.getpid())
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    return result, (seconds, max(0, process_memory(os.getpid())[0] - before) / 1e9)
