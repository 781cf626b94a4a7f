"""stage=assemble, linked and copied, against ``cp -r`` and against loading everything and ``save_pretrained``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from cogflow.benchmarking.measure import measure
from cogflow.benchmarking.pipeline_folder import make_pipeline
from cogflow.runtime.console import echo

RESAVE = """
import sys, torch
from diffusers import CogVideoXPipeline
pipe = CogVideoXPipeline.from_pretrained(sys.argv[1], torch_dtype={"transformer": torch.bfloat16, "default": torch.float32})
pipe.save_pretrained(sys.argv[2])
"""
"""What CogVideo's converter does in the end: every component is loaded and written again, in the dtype it is stored in."""
SPARE = 8e9
"""Bytes of disk that a way must leave free, or it is not run."""


def compare_assemble(
    folder: Path, family: str, layers: int | None, repeats: int, keep: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Bytes of the pipeline, and one row per way and repeat: seconds and peak memory.

    Every way starts with the sources out of the page cache and with no hash known, but for the one that is done again. A way that the
    disk is too small for is not run, and says so. The files lie in ``folder`` and are removed at the end unless ``keep``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source"
    if not (source / "model_index.json").is_file():
        make_pipeline(source, family, layers)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    echo(f"pipeline: {source} ({size / 1e9:.2f} GB)")
    target = folder / "out"
    ways: dict[str, tuple[list[str], int]] = {
        "cp -r + sync": (["sh", "-c", f'cp -r "{source}" "{target}" && sync'], size),
        "cogflow, linked": (_cogflow(source, target, "auto"), 0),
        "cogflow, linked, again": (_cogflow(source, target, "auto"), 0),
        "cogflow, copied": (_cogflow(source, target, "copy"), size),
        "save_pretrained": ([sys.executable, "-c", RESAVE, str(source), str(target)], size),
    }
    rows: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for way, (command, written) in ways.items():
            shutil.rmtree(target, ignore_errors=True)
            if not way.endswith("again"):
                let_go(source)
                shutil.rmtree(folder / "cache", ignore_errors=True)
            rows.append({"way": way, "repeat": repeat} | _run(command, folder, written, size))
            echo(f"{way}: {told(rows[-1])}")
    if not keep:
        shutil.rmtree(folder)
    return size, rows


def _run(command: list[str], folder: Path, written: int, size: int) -> dict[str, Any]:
    free = shutil.disk_usage(folder).free
    if written and free < written + SPARE:
        nothing = dict.fromkeys(("seconds", "gb_per_second", "peak_anonymous_gb", "peak_resident_gb"))
        return nothing | {"failed": f"not run: it writes {written / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"}
    result = measure(command, folder / "output.log", {"XDG_CACHE_HOME": str(folder / "cache")})
    return {
        "seconds": result.seconds if result.ok else None,
        "gb_per_second": size / 1e9 / result.seconds if result.ok else None,
        "peak_anonymous_gb": result.anonymous / 1e9,
        "peak_resident_gb": result.resident / 1e9,
        "failed": None if result.ok else f"exit code {result.returncode} after {result.seconds:.0f} s: {result.tail}",
    }


def told(row: dict[str, Any]) -> str:
    if row["failed"]:
        return str(row["failed"])
    return f"{row['seconds']:.1f} s, {row['peak_anonymous_gb']:.2f} GB anonymous, {row['peak_resident_gb']:.2f} GB resident"


def let_go(folder: Path) -> None:
    """Drop the files of ``folder`` from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cogflow(source: Path, target: Path, link: str) -> list[str]:
    return [
        sys.executable, "-m", "cogflow", "stage=assemble", f"stage.transformer={source}", f"stage.base={source}", f"stage.link={link}",
        f"stage.output={target / 'pipeline'}", f"run.root={target}", "run.name=run", "tracking.wandb=disabled",
    ]  # fmt: skip
