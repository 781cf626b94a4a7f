"""stage=benchmark: speed and memory of one part of cogflow beside what it competes with, in one run."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

from cogflow import ranks
from cogflow.benchmarking.export import compare_export
from cogflow.config.schema import BenchmarkStage, Config
from cogflow.files.paths import run_folder
from cogflow.tracking.console import say, table
from cogflow.tracking.report import record_stage
from cogflow.tracking.tracker import open_tracker

FIGURES = ("seconds", "ratio_to_cp", "gb_per_second", "peak_anonymous_gb", "peak_resident_gb")


def run(config: Config) -> None:
    """Measure ``stage.what``, print a table and write ``<run>/benchmark.json``. One process."""
    stage = config.stage
    if not isinstance(stage, BenchmarkStage):
        raise TypeError("stages.benchmark needs the settings of stage=benchmark")
    if not ranks.is_main():
        return
    started = time.time()
    folder = run_folder(config.run)
    place = Path(stage.folder).expanduser() if stage.folder else folder / "benchmark"
    clone = Path(stage.vs).expanduser() if stage.vs else None
    rows = compare_export(place, config.model.name, stage.layers, stage.repeats, clone, stage.keep)
    medians = {way: middle([row for row in rows if row["way"] == way]) for way in dict.fromkeys(row["way"] for row in rows)}
    table([[way, *(shown(figures[name]) for name in FIGURES)] for way, figures in medians.items()], ["way", *FIGURES])
    with open_tracker(config, "benchmark", folder) as tracker:
        tracker.table("benchmark/export", ["way", *FIGURES], [[way, *figures.values()] for way, figures in medians.items()])
    ours = medians["cogflow, verified"]
    line = f"export: {shown(ours['ratio_to_cp'])} x cp, {shown(ours['peak_anonymous_gb'])} GB anonymous"
    record = record_stage(
        folder, "benchmark", config, {"what": stage.what}, {"summary": line, "rows": rows, "medians": medians}, started=started
    )
    say(f"{line}\nrecord: {record}")


def middle(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median of each figure over the repeats that ended well."""
    found = {name: [row[name] for row in rows if row[name] is not None] for name in FIGURES}
    return {name: median(values) if values else None for name, values in found.items()}


def shown(value: float | None) -> str:
    return "failed" if value is None else f"{value:.3g}"
