"""stage=flow: run prepare, train, export, assemble and diagnose on one config, and print a table of their results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.config import Config
from cogflow.config.diagnose_settings import FlowStage
from cogflow.files.paths import run_folder
from cogflow.files.record_io import read_record
from cogflow.records.run_records import StageRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.runtime.run_lock import hold_run
from cogflow.sampling.sample_record import newest_samples
from cogflow.stages import assemble, diagnose, export, prepare, train
from cogflow.tracking.html_report import write_report
from cogflow.tracking.stage_record import shown_command, write_stage_record
from cogflow.tracking.tracker import open_tracker
from cogflow.tracking.wandb_folders import one_upload_line
from cogflow.training import sequence

COLUMNS = ["stage", "result", "seconds", "where"]
STAGES = ("prepare", "train", "export", "assemble", "diagnose")


@dataclass(frozen=True)
class ClosingRow:
    """One stage of the closing table. ``seconds``: of the stage. ``where``: the path of its result."""

    stage: str
    result: str
    seconds: float
    where: str

    def cells(self) -> list[str]:
        """Return the cells of :data:`COLUMNS`."""
        return [self.stage, self.result, f"{self.seconds:.0f}", self.where]


def run(config: Config[FlowStage]) -> None:
    """Run every stage. Each reuses its earlier results, so the same command finishes a stopped flow."""
    started = time.time()
    folder = run_folder(config.run)
    # Training checks this again; here it fails before hours of preparing clips.
    sequence.check(config)
    ranks.setup()
    with hold_run(folder, shown_command()):
        run_stages(config, folder, started)
    ranks.close()


def run_stages(config: Config[FlowStage], folder: Path, started: float) -> None:
    """Run the stages in ``folder``, whose lock this process holds."""
    stage = config.stage
    examined = replace(stage.diagnose, candidate=stage.diagnose.candidate or str(RunLayout(folder).pipeline))
    actions: dict[str, Callable[[], None]] = {
        "prepare": lambda: prepare.run(config.with_stage(stage.prepare)),
        "train": lambda: train.run(config.with_stage(stage.train)),
        "export": lambda: export.run(config.with_stage(stage.export)),
        "assemble": lambda: assemble.run(config.with_stage(stage.assemble)),
        "diagnose": lambda: diagnose.run(config.with_stage(examined)),
    }
    with one_upload_line(folder):
        for number, name in enumerate(STAGES, start=1):
            echo("", f"[{number}/{len(STAGES)}] {name}")
            actions[name]()
        if ranks.is_main():
            close_flow(config, folder, started)
    ranks.barrier()


def close_flow(config: Config[FlowStage], folder: Path, started: float) -> None:
    """Write ``flow.json`` and the report, and print the closing table and the paths of the results."""
    rows = [row.cells() for row in closing_rows(folder)]
    layout = RunLayout(folder)
    pipeline, samples = layout.pipeline, newest_samples(layout.samples)
    with open_tracker(config, "flow", folder) as tracker:
        tracker.table("flow/stages", COLUMNS, rows)
        place = tracker.url_or_dir
    results = {"summary": f"{len(rows)} stages", "where": str(pipeline), "table": rows}
    write_stage_record(folder, "flow", config, {}, results, started=started)
    report = write_report(folder)
    echo("")
    table(rows, COLUMNS)
    echo(
        f"videos:   {samples or 'none'}\npipeline: {pipeline}\nreport:   {report}\nW&B run:  {place}\n"
        f"finished in {time.time() - started:.0f} s"
    )


def closing_rows(folder: Path) -> list[ClosingRow]:
    """Return a row for each stage that has written its record."""
    paths = [folder / f"{name}.json" for name in STAGES]
    records = [read_record(path, StageRecord) for path in paths if path.is_file()]
    return [ClosingRow(one.stage, one.summary, one.seconds, str(one.results.get("where") or "")) for one in records]
