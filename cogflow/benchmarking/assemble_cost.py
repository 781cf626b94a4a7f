"""stage.what=assemble: compare the cost of stage=assemble, with links and with copies, with ``cp -r`` and
``save_pretrained``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogflow.artifacts.run_layout import MODEL_INDEX
from cogflow.benchmarking.command_cost import run_command
from cogflow.benchmarking.random_pipeline import make_pipeline
from cogflow.benchmarking.results import BenchmarkResult, format_cell, median_or_none
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.command import override
from cogflow.config.config import Config
from cogflow.runtime.console import echo

RESAVE = """
import sys, torch
from diffusers import CogVideoXPipeline
dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
pipe = CogVideoXPipeline.from_pretrained(sys.argv[1], torch_dtype=dtypes)
pipe.save_pretrained(sys.argv[2])
"""
"""Load every component and write it again in its own dtype, as CogVideo's converter does at its end."""

SPARE_BYTES = 8e9
"""Disk space that must stay free after a command. Otherwise the benchmark does not run the command."""

LINKED = "cogflow, linked"
METRICS = ("seconds", "gb_per_second", "peak_anonymous_gb", "peak_resident_gb")


@dataclass(frozen=True)
class AssembleRun:
    """One run of one command. Seconds and rate are ``None`` after a failure; all values are ``None`` for a command that
    was not run."""

    way: str
    repeat: int
    failed: str | None
    seconds: float | None = None
    gb_per_second: float | None = None
    peak_anonymous_gb: float | None = None
    peak_resident_gb: float | None = None


def measure_assemble(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Assemble a pipeline of ``config.model`` with random weights in every way, ``stage.repeats`` times in turns."""
    stage = config.stage
    place = Path(stage.folder).expanduser() if stage.folder else folder / "benchmark"
    place.mkdir(parents=True, exist_ok=True)
    source = place / "source"
    if not (source / MODEL_INDEX).is_file():
        make_pipeline(source, config.model.name, stage.layers)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    echo(f"pipeline: {source} ({size / 1e9:.2f} GB)")
    runs = _compare(source, place, size, stage.repeats)
    if not stage.keep:
        shutil.rmtree(place)
    medians = {
        way: {name: median_or_none([getattr(run, name) for run in runs if run.way == way]) for name in METRICS}
        for way in dict.fromkeys(run.way for run in runs)
    }
    seconds, memory = format_cell(medians[LINKED]["seconds"]), format_cell(medians[LINKED]["peak_anonymous_gb"])
    return BenchmarkResult(
        summary=f"assemble: {size / 1e9:.1f} GB linked in {seconds} s with {memory} GB anonymous",
        columns=["way", *METRICS],
        rows=[[way, *values.values()] for way, values in medians.items()],
        details={"bytes": size, "rows": [asdict(run) for run in runs], "medians": medians},
    )


def _compare(source: Path, folder: Path, size: int, repeats: int) -> list[AssembleRun]:
    """Run every command ``repeats`` times.

    Each starts with the sources out of the page cache and without cached hashes, except the repeated assembly.
    """
    target = folder / "out"
    ways: dict[str, tuple[Sequence[str], int]] = {
        "cp -r + sync": (["sh", "-c", f'cp -r "{source}" "{target}" && sync'], size),
        LINKED: (_cogflow(source, target, "auto"), 0),
        "cogflow, linked, again": (_cogflow(source, target, "auto"), 0),
        "cogflow, copied": (_cogflow(source, target, "copy"), size),
        "save_pretrained": ([sys.executable, "-c", RESAVE, str(source), str(target)], size),
    }
    runs: list[AssembleRun] = []
    for repeat in range(repeats):
        for way, (command, written) in ways.items():
            shutil.rmtree(target, ignore_errors=True)
            if not way.endswith("again"):
                _drop_from_page_cache(source)
                shutil.rmtree(folder / "cache", ignore_errors=True)
            if problem := _no_space(folder, written):
                runs.append(AssembleRun(way, repeat, problem))
            else:
                runs.append(_run(way, repeat, command, folder, size))
            echo(f"{way}: {_describe(runs[-1])}")
    return runs


def _no_space(folder: Path, written: int) -> str | None:
    free = shutil.disk_usage(folder).free
    if not written or free >= written + SPARE_BYTES:
        return None
    return f"not run: it writes {written / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"


def _run(way: str, repeat: int, command: Sequence[str], folder: Path, size: int) -> AssembleRun:
    cost = run_command(command, folder / "output.log", {"XDG_CACHE_HOME": str(folder / "cache")})
    return AssembleRun(
        way=way,
        repeat=repeat,
        failed=cost.failure,
        seconds=cost.seconds if cost.ok else None,
        gb_per_second=size / 1e9 / cost.seconds if cost.ok else None,
        peak_anonymous_gb=cost.anonymous / 1e9,
        peak_resident_gb=cost.resident / 1e9,
    )


def _describe(run: AssembleRun) -> str:
    if run.failed:
        return run.failed
    return f"{run.seconds:.1f} s, {run.peak_anonymous_gb:.2f} GB anonymous, {run.peak_resident_gb:.2f} GB resident"


def _drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cogflow(source: Path, target: Path, link: str) -> list[str]:
    settings = [override("stage.transformer", source), override("stage.base", source), f"stage.link={link}"]
    run = [
        override("stage.output", target / "pipeline"),
        override("run.root", target),
        "run.name=run",
        "tracking.wandb=disabled",
    ]
    return [sys.executable, "-m", "cogflow", "stage=assemble", *settings, *run]
