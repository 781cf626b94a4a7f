"""stage=benchmark: measure on this machine what one part of cogflow costs, beside standard tools.

Evidence about cogflow itself and comparisons with other trainers are in the repository's ``benchmarks/``, outside of
the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cogflow.benchmarking.assemble_cost import measure_assemble
from cogflow.benchmarking.checkpoint_cost import measure_checkpoints
from cogflow.benchmarking.export_cost import measure_export
from cogflow.benchmarking.loader_cost import measure_loading
from cogflow.benchmarking.prepare_cost import measure_preparing
from cogflow.benchmarking.results import BenchmarkResult, format_cell
from cogflow.benchmarking.step_settings import compare_settings, measure_configured_step
from cogflow.benchmarking.validation_cost import measure_validation
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.config import Config
from cogflow.errors import CogflowError
from cogflow.files.paths import run_folder
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker

BENCHMARKS: dict[str, Callable[[Config[BenchmarkStage], Path], BenchmarkResult]] = {
    "step": measure_configured_step,
    "train": compare_settings,
    "checkpoint": measure_checkpoints,
    "validate": measure_validation,
    "prepare": measure_preparing,
    "loader": measure_loading,
    "export": measure_export,
    "assemble": measure_assemble,
}
"""Benchmark functions by the value of ``stage.what``; each takes the config and the run folder."""

ALL = ("train", "checkpoint", "validate", "prepare", "loader", "export", "assemble")
"""Benchmarks that ``stage.what=all`` runs, in this order; train includes step."""


def run(config: Config[BenchmarkStage]) -> None:
    """Run ``stage.what``, print its table and write ``<run>/benchmark.json``.

    Only ``stage.what=step`` uses several ranks.
    """
    what = config.stage.what
    if what == "step":
        ranks.setup()
    elif not ranks.is_main():
        return
    started = time.time()
    folder = run_folder(config.run)
    if what == "all":
        results = {name: _run_or_explain(config, name, folder) for name in ALL}
        summary = "\n".join(result.summary for result in results.values())
        record: dict[str, object] = {"summary": summary, **{name: result.record() for name, result in results.items()}}
    else:
        result = _run_one(config, what, folder)
        summary, record = result.summary, result.record()
    if not ranks.is_main():
        return
    path = record_stage(folder, "benchmark", config, {"what": what}, record, started=started)
    echo(summary, f"record: {path}")


def _run_one(config: Config[BenchmarkStage], what: str, folder: Path) -> BenchmarkResult:
    """Run one benchmark; rank 0 prints and logs its table."""
    result = BENCHMARKS[what](config, folder)
    if ranks.is_main():
        table([[format_cell(cell) for cell in row] for row in result.rows], result.columns)
        with open_tracker(config, "benchmark", folder) as tracker:
            tracker.table(f"benchmark/{what}", list(result.columns), [list(row) for row in result.rows])
    return result


def _run_or_explain(config: Config[BenchmarkStage], what: str, folder: Path) -> BenchmarkResult:
    """Run one benchmark; return its error as the summary when it fails for a reason that cogflow explains."""
    try:
        return _run_one(config, what, folder)
    except CogflowError as error:
        return BenchmarkResult(f"{what}: not measured: {error}", [], [])
