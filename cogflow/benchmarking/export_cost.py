"""stage.what=export: compare time and memory of stage=export with ``cp``, on a checkpoint of the real size with random
values."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogflow.benchmarking.command_cost import CommandCost, run_command
from cogflow.benchmarking.random_sat_checkpoint import make_sat_checkpoint
from cogflow.benchmarking.results import BenchmarkResult, format_cell, median_or_none
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.command import override
from cogflow.config.config import Config
from cogflow.runtime.console import echo

COPY, VERIFIED, UNVERIFIED = "cp + sync", "cogflow, verified", "cogflow, stage.verify=off"
OUTPUTS = ("copy.pt", "verified", "unverified", "peer")
"""Files and folders that the compared commands write in the benchmark's folder."""


@dataclass(frozen=True)
class ExportRun:
    """One run of one command.

    ``ratio_to_cp``: its seconds divided by those of ``cp`` and ``sync`` in the same repeat, ``None`` after a failure.
    """

    way: str
    repeat: int
    seconds: float | None
    ratio_to_cp: float | None
    gb_per_second: float | None
    peak_anonymous_gb: float
    peak_resident_gb: float
    failed: str | None


METRICS = ("seconds", "ratio_to_cp", "gb_per_second", "peak_anonymous_gb", "peak_resident_gb")


def measure_export(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Measure the export of a checkpoint of ``config.model`` in ``stage.folder`` (default: ``folder``/benchmark)."""
    stage = config.stage
    place = Path(stage.folder).expanduser() if stage.folder else folder / "benchmark"
    source = make_source(place, config.model.name, stage.layers)
    runs = compare_export(source, place, stage.repeats)
    if not stage.keep:
        shutil.rmtree(place)
    return export_result(runs)


def make_source(folder: Path, family: str, layers: int | None) -> Path:
    """Return ``folder``/sat, a SAT checkpoint of ``family``. Write it if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "sat"
    if not (source / "latest").is_file():
        make_sat_checkpoint(source, family, layers)
    return source


def weights_file(source: Path) -> Path:
    """Return the weights file of the SAT checkpoint ``source``."""
    return source / "1" / "mp_rank_00_model_states.pt"


def compare_export(
    source: Path, folder: Path, repeats: int, more: Mapping[str, Sequence[str]] | None = None
) -> list[ExportRun]:
    """Run every export of the SAT checkpoint ``source`` in turns, ``repeats`` times. Outputs and logs are in
    ``folder``.

    ``more``: commands of other exporters by name, which write to ``folder``/peer.
    """
    file = weights_file(source)
    size = file.stat().st_size
    echo(f"checkpoint: {file} ({size / 1e9:.2f} GB)")
    ways: dict[str, Sequence[str]] = {
        COPY: ["sh", "-c", f'cp "{file}" "{folder / "copy.pt"}" && sync'],
        VERIFIED: _cogflow(source, folder / "verified", "auto"),
        UNVERIFIED: _cogflow(source, folder / "unverified", "off"),
        **(more or {}),
    }
    runs: list[ExportRun] = []
    for repeat in range(repeats):
        copy_seconds = None
        for way, command in ways.items():
            _remove_outputs(folder)
            _warm_page_cache(file)
            cost = run_command(command, folder / "output.log")
            copy_seconds = copy_seconds or cost.seconds
            runs.append(_export_run(way, repeat, cost, copy_seconds, size))
            echo(f"{way}: {_describe(runs[-1])}")
    return runs


def export_result(runs: Sequence[ExportRun]) -> BenchmarkResult:
    """Return the result of ``runs``: the median of each metric for each command."""
    medians = {
        way: {name: median_or_none([getattr(run, name) for run in runs if run.way == way]) for name in METRICS}
        for way in dict.fromkeys(run.way for run in runs)
    }
    ours = medians[VERIFIED]
    memory = format_cell(ours["peak_anonymous_gb"])
    return BenchmarkResult(
        summary=f"export: {format_cell(ours['ratio_to_cp'])} x cp, {memory} GB anonymous",
        columns=["way", *METRICS],
        rows=[[way, *values.values()] for way, values in medians.items()],
        details={"rows": [asdict(run) for run in runs], "medians": medians},
    )


def _export_run(way: str, repeat: int, cost: CommandCost, copy_seconds: float, size: int) -> ExportRun:
    return ExportRun(
        way=way,
        repeat=repeat,
        seconds=cost.seconds if cost.ok else None,
        ratio_to_cp=cost.seconds / copy_seconds if cost.ok else None,
        gb_per_second=size / 1e9 / cost.seconds if cost.ok else None,
        peak_anonymous_gb=cost.anonymous / 1e9,
        peak_resident_gb=cost.resident / 1e9,
        failed=cost.failure,
    )


def _describe(run: ExportRun) -> str:
    if run.seconds is None:
        return f"{run.failed} (peak {run.peak_anonymous_gb:.2f} GB anonymous)"
    memory = f"{run.peak_anonymous_gb:.2f} GB anonymous, {run.peak_resident_gb:.2f} GB resident"
    return f"{run.seconds:.1f} s, {run.ratio_to_cp:.2f} x cp, {memory}"


def _cogflow(source: Path, output: Path, verify: str) -> list[str]:
    settings = [override("stage.source", source), override("stage.output", output / "export"), f"stage.verify={verify}"]
    run = [override("run.root", output), "run.name=run", "tracking.wandb=disabled"]
    return [sys.executable, "-m", "cogflow", "stage=export", *settings, *run]


def _remove_outputs(folder: Path) -> None:
    """Remove the outputs of the last command, so that every command has the same free space."""
    for name in OUTPUTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _warm_page_cache(file: Path) -> None:
    """Read ``file`` once, so that for every command as much of it as fits is in the page cache."""
    with file.open("rb", buffering=0) as data:
        while data.read(1 << 24):
            pass
