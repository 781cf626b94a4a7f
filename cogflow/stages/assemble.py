"""stage=assemble: components from different places become one checked pipeline folder, which gives the run's own videos."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from cogflow import ranks
from cogflow.config.schema import AssembleStage, Config, ModelConfig
from cogflow.errors import PipelineError, QualityGateError
from cogflow.files.paths import run_folder
from cogflow.models.components import model_folder
from cogflow.pipeline.assemble import assemble, pipeline_class
from cogflow.pipeline.consistency import check_parts
from cogflow.pipeline.parts import CONFIGS, Part, read_part
from cogflow.pipeline.verify import Reference, find_reference, verify
from cogflow.rungs import report as ladder
from cogflow.rungs import samples
from cogflow.sharpness.panel import measure
from cogflow.tracking.console import say, table
from cogflow.tracking.report import record_stage
from cogflow.tracking.tracker import open_tracker


def run(config: Config) -> None:
    """Assemble ``stage.output`` and write ``<run>/assemble.json``. Rank 0 works, the others wait."""
    if ranks.is_main():
        _assemble(config)
    ranks.barrier()


def _assemble(config: Config) -> None:
    started = time.time()
    stage = config.stage
    if not isinstance(stage, AssembleStage):
        raise TypeError(f"the assemble stage was started with the settings of {stage.name}")
    folder = run_folder(config.run)
    output = Path(stage.output).expanduser() if stage.output else folder / "pipeline"
    parts, problems = read_parts(config, stage, folder)
    expected = check_parts(parts, problems)
    reference, reason = find_reference(_runs(folder, parts["transformer"]), parts["transformer"])

    def check(partial: Path) -> dict[str, Any]:
        if not stage.verify:
            return {"status": "skipped", "reason": "stage.verify=false"}
        if pipeline_class(parts) != "CogVideoXPipeline":
            return {"status": "skipped", "reason": "image-to-video pipelines are not sampled yet"}
        if reference is None:
            return {"status": "skipped", "reason": reason}
        say(f"sampling the unpublished pipeline in a fresh process, as {reference.folder} was")
        of_run = reference.folder.parent.parent

        def measured(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
            samples.exported(of_run, found, expected, {name: measure(frames) for name, frames in found.items()}, facts)

        return verify(partial, reference, parts["transformer"].made.get("dtype"), measured)

    try:
        assembly = assemble(output, parts, expected, sample_settings(config, reference), check)
    except QualityGateError:
        with open_tracker(config, "assemble", folder) as tracker:
            ladder.tell(tracker, _ladder_of(reference, folder), _step(reference))
        raise
    _tell(config, folder, output, assembly, reference, started)


def read_parts(config: Config, stage: AssembleStage, folder: Path) -> tuple[dict[str, Part], list[str]]:
    """Each component from its own place, from the export, or from the base; and what is wrong with each by itself."""
    base: Path | None = Path(stage.base).expanduser() if stage.base else None
    parts: dict[str, Part] = {}
    problems: list[str] = []
    for name in CONFIGS:
        named = getattr(stage, name)
        if named is not None:
            place = Path(named)
        elif name == "transformer":
            place = folder / "export"
            if not place.is_dir():
                raise PipelineError(f"{place} does not exist.", "Run stage=export first, or name stage.transformer=FOLDER.")
        else:
            base = place = base or model_base(config.model, parts["transformer"])
        try:
            parts[name], found = read_part(name, place)
        except PipelineError as error:
            found = [error.message]
            parts[name] = Part(name, place, "", {})
        problems += found
    return parts, problems


def model_base(model: ModelConfig, transformer: Part) -> Path:
    """The pipeline folder of the model: as the config names it, or for model=auto the one that the transformer was trained from."""
    if model.name == "auto" and model.path is None:
        trained = transformer.made.get("model")
        if not isinstance(trained, dict) or not trained.get("name"):
            raise PipelineError(
                f"{transformer.folder} does not say which model it was trained from.",
                "Give stage.base=FOLDER, a pipeline folder, or model=NAME.",
            )
        path = trained.get("path")
        model = ModelConfig(name=str(trained["name"]), path=str(path) if path else None)
    return model_folder(model)


def sample_settings(config: Config, reference: Reference | None) -> dict[str, Any]:
    """How the model card says to sample: as the run's samples were, or as this config says."""
    if reference is not None:
        record = reference.record
        facts = {key: record[key] for key in ("height", "width", "frames", "fps", "dtype")}
        return {**facts, **record["sampling"], "text": record["samples"][0]["text"]}
    data, sampling = config.data, config.sampling
    how = {"steps": sampling.steps, "guidance_scale": sampling.guidance_scale, "use_dynamic_cfg": sampling.use_dynamic_cfg}
    return {"height": data.height, "width": data.width, "frames": data.frames, "fps": data.fps, "dtype": config.model.dtype, **how}


def _runs(folder: Path, transformer: Part) -> list[Path]:
    """Runs whose samples may be of this transformer: the one its checkpoint lies in, and this one."""
    source = Path(str(transformer.made.get("source", "")))
    trained = [source.parent.parent] if source.parent.name == "checkpoints" else []
    return list(dict.fromkeys([*trained, folder.absolute()]))


def _ladder_of(reference: Reference | None, folder: Path) -> Path:
    """The run that the samples belong to: its ladder gets the last rung."""
    return folder if reference is None else reference.folder.parent.parent


def _step(reference: Reference | None) -> int:
    return int(reference.record.get("step") or 0) if reference is not None else 0


def _tell(config: Config, folder: Path, output: Path, assembly: dict[str, Any], reference: Reference | None, started: float) -> None:
    verified = assembly["verify"]
    rows = [[name, part["class"], part["from"]] for name, part in assembly["components"].items()]
    table(rows, ["component", "class", "from"])
    if verified["status"] == "passed":
        lowest = min(sample["psnr"] for sample in verified["samples"])
        line = f"{len(verified['samples'])} samples of a fresh process equal the run's (lowest PSNR {lowest:.1f} dB)"
    else:
        line = f"assembled; not compared with samples: {verified['reason']}"
        say(f"warning: {line}")
    with open_tracker(config, "assemble", folder) as tracker:
        if verified["status"] == "passed":
            tracker.log(verified["step"] or 0, {"assemble/psnr": lowest})
            ladder.tell(tracker, _ladder_of(reference, folder), _step(reference))
        tracker.table("assemble/components", ["component", "class", "from"], rows)
        tracker.artifact("pipeline", "pipeline", output, uses=["export"])
    inputs = {name: {"from": part["from"], "files": part["files"]} for name, part in assembly["components"].items()}
    results = {"summary": line, "where": str(output), "verify": verified, "checked_against": assembly["checked_against"]}
    record_stage(folder, "assemble", config, inputs, results, started=started)
    say(f"{line}\npipeline: {output}\nreport:   {folder / 'report.html'}")
