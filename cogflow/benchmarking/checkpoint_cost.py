"""stage.what=checkpoint: what a save costs by part, for which training waits, beside ``torch.save`` of as many bytes and ``cp``."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cogflow.benchmarking.measure import memory
from cogflow.benchmarking.step import MemoryWatch, make_trainer, training
from cogflow.benchmarking.tables import Table
from cogflow.config.schema import BenchmarkStage, Config
from cogflow.files.atomic_write import sync, sync_tree
from cogflow.models import loading
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.training import checkpoint, speed
from cogflow.training.loader import Loader

OURS, LOADED, SAVED, COPIED = "cogflow, a save", "cogflow, verified and loaded", "torch.save + fsync", "cp -r + sync"


def checkpoints(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """Saves and loads of the configured model as stage=train does them, with as many repeats after one that does not count."""
    speed.grow_segments()
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    place = Path(stage.folder).expanduser() if stage.folder else folder / "benchmark"
    shutil.rmtree(place, ignore_errors=True)
    trainer = make_trainer(training(config, stage, 1), device, dtype, MemoryWatch(device))
    with Loader(trainer.batch, 1, device) as loader:
        trainer.train_step(0, loader)
    rows: list[dict[str, Any]] = []
    with progress(1 + stage.repeats, "saves") as bar:
        for turn in range(1 + stage.repeats):
            found = _turn(trainer.engine, place, turn + 1)
            rows += found if turn else []
            bar.advance()
    if not stage.keep:
        shutil.rmtree(place, ignore_errors=True)
    size = rows[0]["gb"]
    seconds = {way: [row["seconds"] for row in rows if row["way"] == way] for way in (OURS, LOADED, SAVED, COPIED)}
    parts = {name: median(row["parts"][name] for row in rows if row["way"] == OURS) for name in rows[0]["parts"]}
    ratio = median(ours / theirs for ours, theirs in zip(seconds[OURS], seconds[SAVED], strict=True))
    spelled = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    line = f"checkpoint: {size:.3g} GB in {median(seconds[OURS]):.3g} s ({spelled}), {ratio:.2f} x torch.save + fsync"
    peaks = {way: max(row["peak"] for row in rows if row["way"] == way) for way in seconds}
    cells = [
        [
            way,
            median(times),
            min(times),
            max(times),
            size / median(times),
            median(times) / median(seconds[SAVED]),
            peaks[way],
        ]
        for way, times in seconds.items()
    ]
    columns = ["way", "seconds", "lowest", "highest", "GB a second", "against torch.save", "GB more held"]
    return {"summary": line, "rows": rows, "parts": parts}, (columns, cells)


def _turn(engine: Any, place: Path, step: int) -> list[dict[str, Any]]:
    """A save, a load, and the two others, of the same bytes."""
    saved, ours = _timed(lambda: checkpoint.save(place / "cogflow", step, engine, None, {"step": step}))
    _, loaded = _timed(lambda: (checkpoint.verified(saved.path), checkpoint.load(saved.path, engine, None)))
    _, theirs = _timed(partial(_torch_save, _as_many(saved.bytes), place / "torch.pt"))
    _, copied = _timed(lambda: _copied(saved.path, place / "copy"))
    for gone in (saved.path, place / "copy"):
        shutil.rmtree(gone)
    (place / "torch.pt").unlink()
    size = saved.bytes / 1e9
    rows = [
        {"way": way, "gb": size, **found}
        for way, found in ((OURS, ours), (LOADED, loaded), (SAVED, theirs), (COPIED, copied))
    ]
    rows[0]["parts"] = saved.parts
    return rows


def _as_many(size: int) -> dict[str, torch.Tensor]:
    """So many bytes, in tensors of 256 MiB."""
    return {str(start): torch.ones(min(2**28, size - start), dtype=torch.uint8) for start in range(0, size, 2**28)}


def _torch_save(held: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(held, path)
    sync(path)


def _copied(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    sync_tree(target)


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` gives, its seconds, and GB that the process holds more at its end than before."""
    before, _ = memory(os.getpid())
    began = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    return found, {"seconds": seconds, "peak": max(0, memory(os.getpid())[0] - before) / 1e9}
