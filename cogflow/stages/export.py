"""stage=export: a checkpoint's transformer becomes a diffusers component, cast tensor by tensor, with the facts of each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cogflow import ranks
from cogflow.config.schema import Config, ExportStage
from cogflow.errors import ConfigError
from cogflow.files.paths import run_folder
from cogflow.tracking.console import say, table
from cogflow.tracking.progress import progress
from cogflow.tracking.record import write_record
from cogflow.tracking.tracker import open_tracker
from cogflow.weights.export import export_transformer
from cogflow.weights.source import Source, find_source

SHOWN = 5  # tensors in the console's table, those that the cast changed most


def run(config: Config) -> None:
    """Export ``stage.source`` to ``stage.output`` and write ``<run>/export.json``. Rank 0 works, the others wait."""
    if ranks.is_main():
        _export(config)
    ranks.barrier()


def _export(config: Config) -> None:
    started = time.time()
    stage = config.stage
    if not isinstance(stage, ExportStage):
        raise TypeError(f"the export stage was started with the settings of {stage.name}")
    if stage.to != "diffusers":
        raise ConfigError(f"stage.to={stage.to} is not yet possible.", "stage.to=diffusers is.")
    folder = run_folder(config.run)
    output = Path(stage.output).expanduser() if stage.output else folder / "export"
    source = find_source(Path(stage.source) if stage.source else folder, stage.weights)
    for problem in source.passed_over:
        say(f"warning: passed over a broken checkpoint: {problem}")
    say(f"exporting {source.folder} ({source.weights} weights{'' if source.step is None else f' of step {source.step}'})")
    description = export_transformer(source, output, stage.dtype, stage.max_shard_size, progress)
    _tell(config, folder, output, source, description, started)


def _tell(config: Config, folder: Path, output: Path, source: Source, description: dict[str, Any], started: float) -> None:
    summary, step = description["summary"], source.step or 0
    most = sorted(description["tensors"], key=lambda fact: fact["changed"], reverse=True)[:SHOWN]
    columns = ["tensor", "shape", "from", "to", "largest change", "became zero"]
    rows = [[fact[key] for key in ("name", "shape", "dtype_in", "dtype_out", "changed", "became_zero")] for fact in most]
    line = (
        f"{summary['parameters']:,} parameters in {description['dtype']}, largest change {summary['changed']:.3g}, "
        f"{summary['became_zero']} values became zero"
    )
    if summary["changed"] > 0:
        table(rows, columns)
    with open_tracker(config, "export", folder) as tracker:
        tracker.log(step, {f"export/{name}": summary[name] for name in ("parameters", "changed", "became_zero")})
        tracker.table("export/most_changed", columns, [[str(cell) for cell in row] for row in rows])
        tracker.artifact("export", "model", output, uses=["transformer"])
    inputs = {"source": description["source"], "weights": source.weights, "step": source.step, "files": source.files}
    results = {
        "summary": line,
        "where": str(output),
        **{key: description[key] for key in ("dtype", "files", "weights_sha256", "trained_with")},
    }
    write_record(folder, "export", config, inputs, results, started=started)
    say(f"{line}\nexported: {output / 'transformer'}")
