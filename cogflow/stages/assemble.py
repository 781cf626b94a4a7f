"""stage=assemble: components from different places become one checked pipeline folder, which gives the run's own videos."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cogflow.assemble import hub
from cogflow.assemble.card_context import CardContext
from cogflow.assemble.component_hashes import altered, hash_parts, total_bytes
from cogflow.assemble.component_sources import ComponentSource, ExportOptions, base_of, find, read_parts
from cogflow.assemble.components import CONFIGS, PipelineComponent
from cogflow.assemble.config_overrides import set_values
from cogflow.assemble.consistency import check_parts
from cogflow.assemble.pipeline_folder import assemble
from cogflow.assemble.sampling_settings import how_to_sample
from cogflow.assemble.verification import Reference, find_reference, verify
from cogflow.config.schema import AssembleStage, Config
from cogflow.errors import PipelineError, QualityGateError
from cogflow.files.paths import run_folder
from cogflow.models.family import FAMILY
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.runtime.progress import progress
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.stage_record import command_line
from cogflow.tracking.tracker import Tracker, open_tracker


def run(config: Config[AssembleStage]) -> None:
    """Assemble ``stage.output`` and write ``<run>/assemble.json``. Rank 0 works, the others wait."""
    if ranks.is_main():
        _assemble(config)
    ranks.barrier()


def _assemble(config: Config[AssembleStage]) -> None:
    started = time.time()
    stage = config.stage
    folder = run_folder(config.run)
    output = Path(stage.output).expanduser() if stage.output else folder / "pipeline"
    parts, problems = gather(config, stage, folder)
    parts = set_values(parts, stage.set)
    with progress(total_bytes(parts), "hashed", unit="bytes") as bar:
        hashes, known = hash_parts(parts, lambda count, name: bar.advance(count, note=name), rehash=stage.rehash)
    if known:
        echo(
            f"{known / 1e9:.2f} GB of them were not read again: unchanged since they were hashed before (stage.rehash=true reads them)"
        )
    changed = [one for part in parts.values() for one in altered(part, hashes)]
    expected = check_parts(parts, problems, found=changed, force=stage.force, family=FAMILY.get(config.model.name))
    _warn(expected, parts)
    reference, reason = find_reference(_runs(folder, parts["transformer"]), parts["transformer"])

    def check(partial: Path) -> dict[str, Any]:
        if not stage.verify:
            return {"status": "skipped", "reason": "stage.verify=false"}
        if reference is None:
            return {"status": "skipped", "reason": reason}
        echo(f"sampling the unpublished pipeline in a fresh process, as {reference.folder} was")

        from cogflow.ladder import sample_rungs
        from cogflow.sharpness.metrics import measure

        def measured(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
            sample_rungs.exported(
                _run_of(reference), found, expected, {name: measure(frames) for name, frames in found.items()}, facts
            )

        return verify(partial, reference, parts["transformer"].made.get("dtype"), measured)

    story = CardContext(
        _trained_in(folder, parts["transformer"]), reference.folder if reference else None, command_line()
    )
    try:
        how = how_to_sample(config, reference, parts["transformer"])
        assembly = assemble(output, parts, expected, how, check, link=stage.link, hashes=hashes, story=story)
    except QualityGateError:
        with open_tracker(config, "assemble", folder) as tracker:
            _tell_ladder(tracker, reference)
        raise
    _tell(config, folder, output, assembly, reference, started)


def gather(
    config: Config[AssembleStage], stage: AssembleStage, folder: Path
) -> tuple[dict[str, PipelineComponent], list[str]]:
    """Each component from its own place, from the export, or from the base; and what is wrong with each by itself."""
    facts = {key: value for key, value in asdict(stage.facts).items() if value is not None}
    wishes = ExportOptions(config.model.name, stage.weights, stage.dtype, facts, tuple(stage.config))
    sources: dict[str, ComponentSource] = {}
    problems: list[str] = []
    parts: dict[str, PipelineComponent] = {}

    def look(name: str, key: str, place: Path) -> None:
        try:
            sources[name] = find(name, key, place)
        except PipelineError as error:
            problems.append(error.message)
            parts[name] = PipelineComponent(name, place, "", {})

    for name in CONFIGS:
        if (named := getattr(stage, name)) is not None:
            look(name, f"stage.{name}", Path(named))
        elif name == "transformer":
            if not (folder / "export").is_dir():
                raise PipelineError(
                    f"{folder / 'export'} does not exist.", "Run stage=export first, or name stage.transformer=FOLDER."
                )
            look(name, "the run's export", folder / "export")
    made, found = read_parts(sources, folder / "parts", wishes)
    parts |= made
    problems += found
    left = [name for name in CONFIGS if name not in parts]
    base, key = Path(stage.base or "").expanduser(), f"stage.base={stage.base}"
    if left and stage.base is None:
        if parts["transformer"].class_name == "":
            raise PipelineError(
                "These components do not make one pipeline:\n" + "\n".join(f"  {line}" for line in problems)
            )
        base, key = base_of(parts["transformer"], config.model), "the model that was trained"
    sources.clear()
    for name in left:
        look(name, key, base)
    made, found = read_parts(sources, folder / "parts", wishes)
    return {name: (parts | made)[name] for name in CONFIGS}, [*problems, *found]


def _runs(folder: Path, transformer: PipelineComponent) -> list[Path]:
    """Runs whose samples may be of this transformer: the one its checkpoint lies in, and this one."""
    trained = _trained_in(folder, transformer)
    return list(dict.fromkeys([*([trained] if trained else []), folder.absolute()]))


def _trained_in(folder: Path, transformer: PipelineComponent) -> Path | None:
    """The run that the transformer's checkpoint lies in."""
    source = Path(str(transformer.made.get("source", "")))
    return source.parent.parent if source.parent.name == "checkpoints" else None


def _run_of(reference: Reference) -> Path:
    """The run that the samples belong to: its ladder gets the last rung."""
    return reference.folder.parent.parent


def _tell_ladder(tracker: Tracker, reference: Reference | None) -> None:
    from cogflow.ladder import (
        ladder_report,  # with all of the statistics, which an assembly without samples need not hold
    )

    if reference is not None:
        ladder_report.tell(tracker, _run_of(reference), int(reference.record.get("step") or 0))


def _warn(expected: dict[str, Any], parts: dict[str, PipelineComponent]) -> None:
    """What was decided by hand never passes silently."""
    for one in expected.get("forced", []):
        echo(
            f"warning: stage.force: {one['key']} is {one['value']}; {one['why']} {one['needed']} ({one['needed_source']})"
        )
    for key in expected.get("not_needed", []):
        echo(f"note: stage.force={key}: nothing contradicts it")
    for part in parts.values():
        for key, (before, now) in part.set.items():
            echo(f"note: stage.set: {part.name}.{key} is {now}; {part.folder} has {before}")


def _tell(
    config: Config[AssembleStage],
    folder: Path,
    output: Path,
    assembly: dict[str, Any],
    reference: Reference | None,
    started: float,
) -> None:
    stage, verified = config.stage, assembly["verify"]
    rows = [[name, part["class"], part.get("link", ""), part["from"]] for name, part in assembly["components"].items()]
    columns = ["component", "class", "weights", "from"]
    table(rows, columns)
    if verified["status"] == "passed":
        lowest = min(sample["psnr"] for sample in verified["samples"])
        line = f"{len(verified['samples'])} samples of a fresh process equal the run's (lowest PSNR {lowest:.1f} dB)"
    else:
        line = f"assembled; not compared with samples: {verified['reason']}"
        echo(f"warning: {line}")
    with open_tracker(config, "assemble", folder) as tracker:
        if verified["status"] == "passed" and reference is not None:
            tracker.log(verified["step"] or 0, {"assemble/psnr": lowest})
            _tell_ladder(tracker, reference)
        for one in assembly.get("forced", []):
            tracker.alert(
                "assembled in spite of a contradiction", f"{one['key']} is {one['value']}; {one['why']} {one['needed']}"
            )
        tracker.table("assemble/components", columns, rows)
        tracker.artifact("pipeline", "pipeline", output, uses=["export"])
    inputs = {name: {"from": part["from"], "files": part["files"]} for name, part in assembly["components"].items()}
    results: dict[str, Any] = {
        "summary": line,
        "where": str(output),
        "verify": verified,
        "checked_against": assembly["checked_against"],
    }
    results |= {key: assembly[key] for key in ("forced",) if key in assembly}
    record_stage(folder, "assemble", config, inputs, results, started=started)
    echo(f"{line}\npipeline: {output}\nreport:   {folder / 'report.html'}")
    if stage.push_to_hub:
        echo(f"uploading to {stage.push_to_hub}")
        results["hub"] = hub.push(output, stage.push_to_hub, stage.hub_private, f"{output.name}: {line}")
        record_stage(folder, "assemble", config, inputs, results, started=started)
        echo(f"uploaded: {results['hub']}")
