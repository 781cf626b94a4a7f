"""stage=export: convert weights of any layout to another, compare them with the source, and report every tensor."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from cogflow.artifacts.identify import identify, kind_named
from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.command import command
from cogflow.config.config import Config
from cogflow.config.export_settings import ExportStage
from cogflow.export.export_plan import ExportRequest, PreparedExport, check_computed_tables, prepare_export
from cogflow.export.origin import ExportOrigin, open_origin
from cogflow.export.to_diffusers import export_diffusers
from cogflow.export.to_sat import export_sat
from cogflow.files.paths import run_folder
from cogflow.files.record_io import record_values
from cogflow.records.export_records import ExportRecord, ProofRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker

MOST_CHANGED = 5
"""Number of tensors in the console's table: those that the cast changed most."""


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
    prepared = prepare_export(
        origin, ExportRequest(stage.components, family, given, stage.dtype, separate_lora=stage.lora == "separate")
    )
    _print_plan(origin, prepared, stage)
    if stage.dry_run:
        for component in prepared.components:
            check_computed_tables(component)
        echo(f"dry run: nothing is written. {prepared.written_bytes() / 1e9:.2f} GB would go to {output}")
        return
    if stage.to == "sat":
        record = export_sat(prepared, origin, output, given)
    else:
        record = export_diffusers(prepared, origin, output, stage.max_shard_size, stage.verify)
    _report(config, output, record, started)


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
    """Print what was found, which model it is, and what will be written."""
    line = f" of line {origin.training.line}" if (origin.training.line or 1) > 1 else ""
    step = "" if origin.step is None else f" of step {origin.step}{line}"
    echo(f"exporting {origin.place} ({origin.kind}, {origin.weights} weights{step})")
    if prepared.facts is not None:
        table(prepared.facts.rows(), ["fact", "value", "from"])
        echo(f"model: {prepared.facts.family or 'no member of the family at its published size'}")
    if prepared.lora:
        echo(f"LoRA: {', '.join(f'{key} {value}' for key, value in prepared.lora.items())}")
    for name, count in prepared.ignored.items():
        echo(f"ignored: {count} tensors of {name} (stage.components names what is exported)")
    rows = []
    for component in prepared.components:
        tensors = component.planned_tensors()
        kinds = [tensor.operation for tensor in tensors]
        operations = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        size = sum(tensor.bytes(component.dtype) for tensor in tensors)
        rows.append(
            [component.name, str(len(tensors)), operations, str(len(component.dropped)), f"{size / 1e9:.3f} GB"]
        )
    table(rows, ["component", "tensors", "how", "dropped", "size"])
    dropped = [[component.name, *one] for component in prepared.components for one in component.dropped]
    if stage.dry_run and dropped:
        table(dropped, ["component", "dropped", "why"])


def _report(config: Config[ExportStage], output: Path, record: ExportRecord, started: float) -> None:
    """Print the result, log it, and write ``<run>/export.json``."""
    summary = record.summary
    most_changed = sorted(record.tensors, key=lambda one: one.changed, reverse=True)[:MOST_CHANGED]
    rows = [
        [
            one.name,
            str(one.shape),
            one.dtype_in,
            one.dtype_out,
            f"{one.changed:.3g}",
            f"{one.relative:.3g}",
            str(one.became_zero),
            str(one.became_subnormal),
        ]
        for one in most_changed
    ]
    columns = ["tensor", "shape", "from", "to", "largest change", "relative", "became zero", "subnormal"]
    line = (
        f"{summary.parameters:,} parameters in {record.dtype}, largest change {summary.changed:.3g}, "
        f"{summary.became_zero} values became zero"
    )
    if summary.changed > 0:
        table(rows, columns)
    for dtype, count in summary.holds_only.items():
        echo(f"note: {count} tensors are stored wider, but hold only values of {dtype}: they were rounded before")
    for name, proof in record.proof.items():
        echo(f"proof: {name}: {_proof_line(proof)}")
    report_file = output / ExportRecord.file_name
    folder = run_folder(config.run)
    with open_tracker(config, "export", folder) as tracker:
        logged = ("parameters", "changed", "relative", "became_zero", "became_subnormal")
        tracker.log(record.step or 0, {f"export/{name}": getattr(summary, name) for name in logged})
        if summary.changed > 0:
            tracker.table("export/most_changed", columns, rows)
        if record.facts:
            facts = [[row.fact, row.value, row.origin] for row in record.facts]
            tracker.table("export/facts", ["fact", "value", "from"], facts)
        source = tracker.input(Path(record.source), "source", "checkpoint")
        tracker.artifact("export", "model", output, uses=[source])
        tracker.artifact("export-report", "report", report_file, uses=["export"])
    values = record_values(record)
    inputs = {
        "source": record.source,
        "weights": record.weights,
        "step": record.step,
        "files": values["source_files"],
    }
    results = {
        "summary": line,
        "where": str(output),
        "weights_from": {"run": record.run, "line": record.line, "step": record.step},
        **{key: values[key] for key in ("dtype", "files", "weights_sha256", "trained_with", "family", "proof")},
    }
    record_stage(folder, "export", config, inputs, results, started=started)
    echo(line, f"exported: {output}", f"report:   {report_file}")
    if config.stage.to == "diffusers" and record.model is not None:
        # The transformer states the model that the other components come from.
        echo(f"next:     {command('assemble', {'stage.transformer': output}, config.run)}")


def _proof_line(proof: ProofRecord) -> str:
    if proof.runs is not None and proof.tolerance is not None:
        worst = max(run.difference for run in proof.runs)
        return f"{proof.what}; outputs differ by {worst:.2g} at most (up to {proof.tolerance:g} counts as equal)"
    if proof.psnr_db is not None:
        return f"{proof.what}: {proof.psnr_db:.1f} dB"
    return proof.what
