"""stage=assemble: gather components from different places, check that they belong together, and publish one pipeline
folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cogflow.artifacts.identify import Artifact, identify, kind_named
from cogflow.artifacts.run_layout import RunLayout, run_of_checkpoint
from cogflow.assemble import hub
from cogflow.assemble.component_sources import ComponentSource, ExportOptions, base_of, find_component, read_parts
from cogflow.assemble.components import PipelineComponent, override_settings
from cogflow.assemble.consistency import ConsistencyResult, check_components
from cogflow.assemble.expectations import incompatible
from cogflow.assemble.model_card import CardContext
from cogflow.assemble.pipeline_folder import PipelinePlan, write_pipeline
from cogflow.assemble.stored_files import changed_files, hash_components, total_bytes
from cogflow.assemble.verification import Comparison, Reference, find_reference, sampling_settings, verify
from cogflow.config.command import command
from cogflow.config.config import Config
from cogflow.config.export_settings import AssembleStage
from cogflow.config.problems import format_value
from cogflow.errors import CheckpointError, PipelineError, QualityGateError
from cogflow.files.paths import run_folder
from cogflow.files.record_io import JsonObject, JsonValue, record_values
from cogflow.models.code_check import CONFIGS
from cogflow.models.family import MODEL_SPECS
from cogflow.records.history_records import current_line
from cogflow.records.ladder_records import ExportedRung
from cogflow.records.pipeline_records import AssemblyRecord, VerifyRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.runtime.progress import progress
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.stage_record import command_line
from cogflow.tracking.tracker import Tracker, open_tracker


@dataclass(frozen=True)
class Job:
    """One assembly: its settings, the run folder, the folder to write, and when it started (``time.time()``)."""

    config: Config[AssembleStage]
    run: Path
    output: Path
    started: float


def run(config: Config[AssembleStage]) -> None:
    """Assemble ``stage.output`` and write ``<run>/assemble.json``. Rank 0 works, the others wait."""
    if ranks.is_main():
        folder, output = run_folder(config.run), config.stage.output
        target = Path(output).expanduser() if output else RunLayout(folder).pipeline
        assemble(Job(config, folder, target, time.time()))
    ranks.barrier()


def assemble(job: Job) -> None:
    """Gather, check, write, verify, report and upload."""
    stage = job.config.stage
    components, problems = gather_components(job)
    components = override_settings(components, stage.set)
    hashes = hash_files(components, rehash=stage.rehash)
    contradictions = [one for component in components.values() for one in changed_files(component, hashes)]
    family = MODEL_SPECS.get(job.config.model.name)
    checks = check_components(components, problems, found=contradictions, force=stage.force, family=family)
    echo_manual_decisions(checks, components)

    transformer = components["transformer"]
    trained_by = training_run(transformer)
    # The job's run first: a copy of a run is completed itself, and not the run that it was copied from.
    runs = dict.fromkeys([job.run.absolute(), *([trained_by] if trained_by else [])])
    reference, reason = find_reference(runs, transformer)
    plan = PipelinePlan(
        components=components,
        checks=checks,
        sampling=sampling_settings(job.config, reference, transformer),
        hashes=hashes,
        link=stage.link,
        card=CardContext(trained_by, reference.folder if reference else None, command_line()),
    )

    def check(partial: Path) -> VerifyRecord:
        if not stage.verify:
            return VerifyRecord("skipped", reason="stage.verify=false")
        if reference is None:
            return VerifyRecord("skipped", reason=reason)
        echo(f"sampling the unpublished pipeline in a fresh process, as {reference.folder} was sampled")

        def store(found: Comparison) -> None:
            store_last_rung(job, reference, found, transformer.training.line)

        return verify(partial, reference, transformer.training.dtype, store)

    try:
        assembly = write_pipeline(job.output, plan, check)
    except QualityGateError:
        with open_tracker(job.config, "assemble", job.run) as tracker:
            report_ladder(job, tracker, reference)
        raise
    report_result(job, assembly, reference, components)


def gather_components(job: Job) -> tuple[dict[str, PipelineComponent], list[str]]:
    """Return each component from its own place, from the run's export, or from the base; and the problems of each.

    Raises :class:`PipelineError` when there is no transformer to determine the base by.
    """
    config, stage = job.config, job.config.stage
    facts = {key: value for key, value in asdict(stage.facts).items() if value is not None}
    options = ExportOptions(config.model.name, stage.weights, stage.dtype, facts, tuple(stage.config))
    components: dict[str, PipelineComponent] = {}
    problems: list[str] = []
    known: dict[tuple[str, Path], Artifact] = {}

    def read(places: Mapping[str, tuple[str, Path]]) -> None:
        sources: dict[str, ComponentSource] = {}
        for name, (option, place) in places.items():
            try:
                if (option, place) not in known:
                    known[option, place] = recognise(stage, option, place)
                sources[name] = find_component(name, option, known[option, place])
            except (CheckpointError, PipelineError) as error:
                problems.append(error.message if option in error.message else f"{option}: {error.message}")
                components[name] = PipelineComponent(name, place, "", {})
        found, reading_problems = read_parts(sources, RunLayout(job.run).parts, options)
        components.update(found)
        problems.extend(reading_problems)

    chosen = {name: getattr(stage, name) for name in CONFIGS}
    named = {name: (f"stage.{name}", Path(place)) for name, place in chosen.items() if place is not None}
    if "transformer" not in named:
        named["transformer"] = ("the run's export", own_export(job))
    read({name: named[name] for name in CONFIGS if name in named})
    missing = [name for name in CONFIGS if name not in components]
    if missing:
        if stage.base is None and not components["transformer"].class_name:
            raise incompatible(problems)
        option = "the model that was trained" if stage.base is None else "stage.base"
        base = base_of(components["transformer"], config.model) if stage.base is None else Path(stage.base).expanduser()
        read(dict.fromkeys(missing, (option, base)))
    return {name: components[name] for name in CONFIGS}, list(dict.fromkeys(problems))


def recognise(stage: AssembleStage, option: str, place: Path) -> Artifact:
    """Return what ``place`` is, and print it when ``option`` names it. ``<option>_kind`` is what the user says it is.

    Raises :class:`CheckpointError` for a path that is nothing cogflow knows, or not of that kind.
    """
    if not option.startswith("stage."):
        return identify(place)
    kind_option = f"{option}_kind"
    kind = kind_named(getattr(stage, kind_option.removeprefix("stage.")), kind_option)
    artifact = identify(place, kind, key=option)
    echo(artifact.line(option))
    return artifact


def own_export(job: Job) -> Path:
    """Return the run's export. Raises :class:`PipelineError` when it does not exist."""
    export = RunLayout(job.run).export
    if not export.is_dir():
        exporting = command("export", {}, job.config.run)
        raise PipelineError(f"{export} does not exist.", f"Give stage.transformer=FOLDER, or export first: {exporting}")
    return export


def hash_files(components: Mapping[str, PipelineComponent], *, rehash: bool) -> dict[Path, str]:
    """Return the sha256 of every file by path."""
    with progress(total_bytes(components), "hashed", unit="bytes") as bar:
        hashes, known = hash_components(components, lambda count, name: bar.advance(count, note=name), rehash=rehash)
    if known:
        echo(
            f"{known / 1e9:.2f} GB were not read again: unchanged since they were hashed (stage.rehash=true reads them)"
        )
    return hashes


def echo_manual_decisions(checks: ConsistencyResult, components: Mapping[str, PipelineComponent]) -> None:
    """Print what stage.force and stage.set decided."""
    for one in checks.forced:
        needed = f"{one.why} {one.needed} ({one.needed_source})"
        echo(f"warning: stage.force: {one.key} is {format_value(one.value)}; {needed}")
    for key in checks.not_needed:
        echo(f"note: stage.force={key}: nothing contradicts it")
    for component in components.values():
        for key, (before, now) in component.overrides.items():
            echo(f"note: stage.set: {component.name}.{key} is {now}; {component.folder} has {before}")


def training_run(transformer: PipelineComponent) -> Path | None:
    """Return the run that contains the transformer's checkpoint, or ``None``."""
    return run_of_checkpoint(Path(transformer.training.source or ""))


def store_last_rung(job: Job, reference: Reference, comparison: Comparison, line: int | None) -> None:
    """Store the last rung of the sharpness ladder of the job's run: the folder's samples beside the run's own.

    ``line``: the line of the run's history that the transformer is from. The ladder of another run is not changed.
    """
    if not is_own(job, reference):
        return
    # Imported here: an assembly without samples does not need the memory of the statistics.
    from cogflow.ladder.sample_rungs import record_exported_rung
    from cogflow.sharpness.metrics import measure

    exported = ExportedRung(
        metrics={name: measure(frames) for name, frames in comparison.found.items()},
        psnr={sample.name: sample.psnr for sample in comparison.samples},
        allowed=comparison.tolerance,
        failed=comparison.failed,
        dtype=comparison.dtype,
        step=reference.record.step,
        line=current_line(reference.run) if line is None else line,
    )
    record_exported_rung(reference.run, exported, comparison.found, comparison.expected)


def is_own(job: Job, reference: Reference | None) -> bool:
    """Return whether the samples that the pipeline is compared with are those of the job's run."""
    return reference is not None and reference.run.resolve() == job.run.resolve()


def report_ladder(job: Job, tracker: Tracker, reference: Reference | None) -> None:
    """Report the sharpness ladder of the job's run, when the pipeline is on it."""
    from cogflow.ladder import ladder_report

    if reference is not None and is_own(job, reference):
        ladder_report.report_ladder(tracker, reference.run, reference.record.step or 0)


def report_result(
    job: Job, assembly: AssemblyRecord, reference: Reference | None, components: Mapping[str, PipelineComponent]
) -> None:
    """Print the components, log to the tracker, write ``<run>/assemble.json``, and upload the folder if asked."""
    rows = [[name, one.class_name, one.link or "", one.origin] for name, one in assembly.components.items()]
    columns = ["component", "class", "weights", "from"]
    table(rows, columns)
    samples = assembly.verify.samples if assembly.verify is not None and assembly.verify.samples else []
    lowest = min((sample.psnr for sample in samples), default=None)
    if lowest is not None:
        summary = f"{len(samples)} samples of a fresh process equal the run's (lowest PSNR {lowest:.1f} dB)"
    else:
        summary = f"assembled; not compared with samples: {assembly.verify and assembly.verify.reason}"
        echo(f"warning: {summary}")
    with open_tracker(job.config, "assemble", job.run) as tracker:
        if lowest is not None and reference is not None:
            tracker.log(reference.record.step or 0, {"assemble/psnr": lowest})
            report_ladder(job, tracker, reference)
        for one in assembly.forced or []:
            text = f"{one.key} is {format_value(one.value)}; {one.why} {one.needed}"
            tracker.alert("assembled in spite of a contradiction", text)
        tracker.table("assemble/components", columns, rows)
        tracker.artifact("pipeline", "pipeline", job.output, uses=used_artifacts(job, tracker, components))

    values = record_values(assembly)
    inputs = {name: {"from": one["from"], "files": one["files"]} for name, one in values["components"].items()}
    made = assembly.made
    results: dict[str, JsonValue] = {
        "summary": summary,
        "where": str(job.output),
        "weights_from": {"run": made.run, "line": made.line, "step": made.step},
    }
    results |= {key: values[key] for key in ("verify", "checked_against", "forced") if key in values}
    record_stage(job.run, "assemble", job.config, inputs, results, started=job.started)
    echo(summary, f"pipeline: {job.output}", f"report:   {job.run / 'report.html'}")
    if job.config.stage.push_to_hub:
        upload(job, inputs, results)


def used_artifacts(job: Job, tracker: Tracker, components: Mapping[str, PipelineComponent]) -> list[str]:
    """Return the names of the artifacts that the components are from."""
    names = []
    for name, component in components.items():
        folder, converted = component.folder, component.folder.is_relative_to(RunLayout(job.run).parts)
        if name == "transformer":
            source = Path(component.training.source or folder) if converted else folder
            names.append(tracker.input(source, "transformer"))
        elif not converted:
            names.append(
                tracker.input(folder.parent, "base-model" if getattr(job.config.stage, name) is None else name)
            )
    return list(dict.fromkeys(names))


def upload(job: Job, inputs: JsonObject, results: JsonObject) -> None:
    """Upload the pipeline to the hub and add the address to ``<run>/assemble.json``."""
    stage = job.config.stage
    if stage.push_to_hub is None:
        return
    echo(f"uploading to {stage.push_to_hub}")
    message = f"{job.output.name}: {results['summary']}"
    address = hub.upload(job.output, stage.push_to_hub, stage.hub_private, message)
    record_stage(job.run, "assemble", job.config, inputs, {**results, "hub": address}, started=job.started)
    echo(f"uploaded: {address}")
