"""stage=flow: prepare, train, export, assemble and diagnose on one config, and a closing table that says where everything is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.config import Config
from cogflow.config.diagnose_settings import FlowStage
from cogflow.files.paths import run_folder
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.sampling.sample_record import newest_samples
from cogflow.stages import assemble, diagnose, export, prepare, train
from cogflow.tracking.html_report import write_report
from cogflow.tracking.stage_record import write_stage_record
from cogflow.tracking.tracker import open_tracker
from cogflow.training import sequence


def run(config: Config[FlowStage]) -> None:
    """Each stage goes on from what it left before, so the same command finishes a flow that was stopped."""
    stage = config.stage
    started = time.time()
    folder = run_folder(config.run)
    # Before hours of preparing clips: the training will ask it again.
    sequence.check(config)
    examined = replace(stage.diagnose, candidate=stage.diagnose.candidate or str(RunLayout(folder).pipeline))
    steps: list[tuple[str, Callable[[], None]]] = [
        ("prepare", lambda: prepare.run(config.with_stage(stage.prepare))),
        ("train", lambda: train.run(config.with_stage(stage.train))),
        ("export", lambda: export.run(config.with_stage(stage.export))),
        ("assemble", lambda: assemble.run(config.with_stage(stage.assemble))),
        ("diagnose", lambda: diagnose.run(config.with_stage(examined))),
    ]
    for number, (name, run_step) in enumerate(steps, start=1):
        echo(f"\n[{number}/{len(steps)}] {name}")
        run_step()
    if ranks.is_main():
        close(config, folder, started)
    ranks.barrier()
    ranks.close()


def close(config: Config[FlowStage], folder: Path, started: float) -> None:
    """Write ``flow.json`` and the report, print the closing table and the places."""
    rows = closing_rows(folder)
    pipeline, samples = RunLayout(folder).pipeline, newest_samples(RunLayout(folder).samples)
    results: dict[str, Any] = {"summary": f"{len(rows)} stages", "where": str(pipeline), "table": rows}
    with open_tracker(config, "flow", folder) as tracker:
        tracker.table("flow/stages", ["stage", "result", "seconds", "where"], rows)
        place = tracker.url_or_dir
    write_stage_record(folder, "flow", config, {}, results, started=started)
    report = write_report(folder)
    echo("")
    table(rows, ["stage", "result", "seconds", "where"])
    echo(
        f"videos:   {samples or 'none'}\npipeline: {pipeline}\nreport:   {report}\nW&B run:  {place}\n"
        f"finished in {time.time() - started:.0f} s"
    )


def closing_rows(folder: Path) -> list[list[str]]:
    """One row per stage, from the records that the stages wrote."""
    rows = []
    for name in ("prepare", "train", "export", "assemble", "diagnose"):
        path = folder / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            results = record["results"]
            rows.append(
                [name, str(results.get("summary", "")), f"{record['seconds']:.0f}", str(results.get("where", ""))]
            )
    return rows
