"""stage=export: convert weights of any layout into components of another, and prove that they are equal."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cogflow.artifacts.identify import identify, kind_named
from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.schema import Config, ExportStage
from cogflow.export.component import PreparedExport, check_tables, prepare
from cogflow.export.origin import ExportOrigin, open_origin
from cogflow.export.to_diffusers import export_diffusers, written_bytes
from cogflow.export.to_sat import export_sat
from cogflow.files.paths import run_folder
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.runtime.progress import progress
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker

SHOWN = 5
"""Tensors in the console's table: those that the cast changed most."""


def run(config: Config[ExportStage]) -> None:
    """Export ``stage.source`` to ``stage.output`` and write ``<run>/export.json``. Rank 0 works, the others wait."""
    if ranks.is_main():
        _export(config)
    ranks.barrier()


def _export(config: Config[ExportStage]) -> None:
    started = time.time()
    stage = config.stage
    folder = run_folder(config.run)
    output = Path(stage.output).expanduser() if stage.output else RunLayout(folder).export
    origin = _open_source(stage, folder)
    given = {key: value for key, value in asdict(stage.facts).items() if value is not None}
    # A checkpoint of cogflow states its model; the name in the config describes a checkpoint of another program.
    family = config.model.name if origin.tensors is not None else "auto"
    prepared = prepare(origin, stage.components, family, given, stage.dtype, stage.lora == "separate")
    _print_plan(origin, prepared, stage)
    if stage.dry_run:
        for component in prepared.components:
            check_tables(component)
        echo(f"dry run: nothing is written. {written_bytes(prepared) / 1e9:.2f} GB would go to {output}")
        return
    bar = partial(progress, unit="bytes")
    if stage.to == "sat":
        description = export_sat(prepared, origin, output, given, bar)
    else:
        description = export_diffusers(prepared, origin, output, stage.max_shard_size, stage.verify, bar)
    _report(config, output, origin, description, started)


def _open_source(stage: ExportStage, folder: Path) -> ExportOrigin:
    """Open ``stage.source``, by default the run ``folder``, and print what it was taken for."""
    kind = kind_named(stage.source_kind, "stage.source_kind")
    artifact = identify(Path(stage.source or folder), kind, key="stage.source")
    echo(artifact.line("stage.source"))
    origin = open_origin(artifact, stage.components, weights=stage.weights, masters=stage.masters, configs=stage.config)
    for problem in origin.passed_over:
        echo(f"warning: passed over a broken checkpoint: {problem}")
    for note in origin.notes:
        echo(f"note: {note}")
    return origin


def _print_plan(origin: ExportOrigin, prepared: PreparedExport, stage: ExportStage) -> None:
    """Print the source, the facts that were found, and what will be written."""
    step = "" if origin.step is None else f" of step {origin.step}"
    echo(f"exporting {origin.place} ({origin.kind}, {origin.weights} weights{step})")
    if prepared.facts is not None:
        table(prepared.facts.table(), ["fact", "value", "from"])
        echo(f"model: {prepared.facts.family or 'no member of the family at its published size'}")
    if prepared.adapted:
        echo(f"LoRA: {', '.join(f'{key} {value}' for key, value in prepared.adapted.items())}")
    for name, count in prepared.ignored.items():
        echo(f"ignored: {count} tensors of {name} (stage.components names what is exported)")
    rows = []
    for component in prepared.components:
        outputs = component.outputs()
        kinds = sorted({output.operation for output in outputs})
        operations = ", ".join(f"{sum(output.operation == kind for output in outputs)} {kind}" for kind in kinds)
        size = sum(output.bytes(component.dtype) for output in outputs)
        rows.append(
            [component.name, str(len(outputs)), operations, str(len(component.dropped)), f"{size / 1e9:.3f} GB"]
        )
    table(rows, ["component", "tensors", "how", "dropped", "size"])
    if stage.dry_run:
        dropped = [
            [component.name, name, reason] for component in prepared.components for name, reason in component.dropped
        ]
        if dropped:
            table(dropped, ["component", "dropped", "why"])


def _report(
    config: Config[ExportStage], output: Path, origin: ExportOrigin, description: dict[str, Any], started: float
) -> None:
    """Print the changes by the cast and the proofs, log them, and write ``<run>/export.json``."""
    folder = run_folder(config.run)
    summary, step = description["summary"], origin.step or 0
    most = sorted(description["tensors"], key=lambda fact: fact["changed"], reverse=True)[:SHOWN]
    columns = ["tensor", "shape", "from", "to", "largest change", "relative", "became zero", "subnormal"]
    keys = ("name", "shape", "dtype_in", "dtype_out", "changed", "relative", "became_zero", "became_subnormal")
    rows = [
        [f"{value:.3g}" if isinstance(value, float) else str(value) for value in (fact[key] for key in keys)]
        for fact in most
    ]
    line = (
        f"{summary['parameters']:,} parameters in {description['dtype']}, largest change {summary['changed']:.3g}, "
        f"{summary['became_zero']} values became zero"
    )
    if summary["changed"] > 0:
        table(rows, columns)
    for dtype, count in summary["holds_only"].items():
        echo(f"note: {count} tensors are stored wider, but hold only values of {dtype}: they were rounded before")
    for name, proof in description["proof"].items():
        echo(f"proof: {name}: {_proof_text(proof)}")
    with open_tracker(config, "export", folder) as tracker:
        counted = ("parameters", "changed", "relative", "became_zero", "became_subnormal")
        tracker.log(step, {f"export/{name}": summary[name] for name in counted})
        if summary["changed"] > 0:
            tracker.table("export/most_changed", columns, rows)
        if description["facts"]:
            tracker.table(
                "export/facts",
                ["fact", "value", "from"],
                [[fact["fact"], fact["value"], fact["from"]] for fact in description["facts"]],
            )
        tracker.artifact("export", "model", output, uses=["transformer"])
        tracker.artifact("export-report", "report", output / "export.json")
    inputs = {
        "source": description["source"],
        "weights": origin.weights,
        "step": origin.step,
        "files": dict(origin.files),
    }
    results = {
        "summary": line,
        "where": str(output),
        **{key: description[key] for key in ("dtype", "files", "weights_sha256", "trained_with", "family", "proof")},
    }
    record_stage(folder, "export", config, inputs, results, started=started)
    echo(f"{line}\nexported: {output}\nreport:   {output / 'export.json'}")


def _proof_text(proof: dict[str, Any]) -> str:
    """Return the result of a component's proof in words."""
    if "runs" in proof:
        worst = max(run["difference"] for run in proof["runs"])
        return f"{proof['what']}; outputs differ by {worst:.2g} at most (up to {proof['tolerance']:g} counts as equal)"
    if "psnr_db" in proof:
        return f"{proof['what']}: {proof['psnr_db']:.1f} dB"
    return str(proof["what"])
