"""Find where each component of a pipeline comes from, and export the sources that hold no component as diffusers loads
it.

Component folders, pipelines and exports are read as they are. Runs, checkpoints and the checkpoints of SAT and
DeepSpeed are exported first, once for all components that come from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cogflow.artifacts.identify import Artifact, ArtifactKind
from cogflow.artifacts.run_layout import EXPORT_REPORT, TRAINER
from cogflow.assemble.components import STEMS, PipelineComponent, read_component
from cogflow.config.model_section import ModelConfig
from cogflow.errors import CogflowError, PipelineError
from cogflow.export.export_plan import ExportRequest, prepare_export
from cogflow.export.origin import FOREIGN, open_origin
from cogflow.export.reported_values import FactValue
from cogflow.export.to_diffusers import export_diffusers
from cogflow.files.record_io import read_record
from cogflow.models.code_check import CONFIGS
from cogflow.models.loading import model_folder
from cogflow.records.pipeline_records import ExportedTransformer
from cogflow.records.training_records import TrainingFacts
from cogflow.runtime.console import echo

SHARD = "5GB"


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export: the settings of the same name of stage=export."""

    family: str = "auto"
    weights: str = "auto"
    dtype: str = "auto"
    facts: Mapping[str, FactValue] = field(default_factory=dict)
    config: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComponentSource:
    """The place that component ``name`` comes from. ``key``: the setting that names it. ``export``: the artifact that
    must be exported first.
    """

    name: str
    key: str
    place: Path
    export: Artifact | None = None


def find_component(name: str, key: str, artifact: Artifact) -> ComponentSource:
    """Return where component ``name`` is in ``artifact``. Raise :class:`PipelineError` when it holds no such
    component.
    """
    place, kind = artifact.path, artifact.kind
    if kind is ArtifactKind.CHECKPOINT or artifact.checkpoints:
        if name == "transformer":
            return ComponentSource(name, key, place, export=artifact)
        # Training changes the transformer alone: every other component is that of the model it started from.
        return ComponentSource(name, key, artifact.pipeline or _trained_from(artifact, key))
    if kind is ArtifactKind.RUN:
        for folder in (artifact.export, artifact.pipeline):
            if folder is not None and (folder / name / CONFIGS[name]).is_file():
                return ComponentSource(name, key, folder)
    elif (place / name / CONFIGS[name]).is_file():
        return ComponentSource(name, key, place)
    elif kind in FOREIGN:
        if name in (*STEMS, "scheduler"):
            return ComponentSource(name, key, place, export=artifact)
    elif kind is ArtifactKind.COMPONENT and (place / CONFIGS[name]).is_file():
        return ComponentSource(name, key, place)
    raise PipelineError(
        f"{key}: {place} holds no {name}: neither {name}/{CONFIGS[name]} nor {CONFIGS[name]} is there. "
        f"It is {kind.label}: {artifact.reason}.",
        "Name a component folder, a pipeline, an export, a run or a checkpoint that has it.",
    )


def read_parts(
    sources: Mapping[str, ComponentSource], folder: Path, options: ExportOptions
) -> tuple[dict[str, PipelineComponent], list[str]]:
    """Read every component, and return the components and what is wrong with each by itself.

    Sources that must be exported are exported to ``folder/<names of their components>``.
    """
    exports: dict[Path, Path | CogflowError] = {}
    for artifact in {source.place: source.export for source in sources.values() if source.export}.values():
        names = [source.name for source in sources.values() if source.export and source.place == artifact.path]
        try:
            exports[artifact.path] = export_source(artifact, names, folder / "-".join(names), options)
        except CogflowError as error:
            if error.exit_code != 2:
                raise
            exports[artifact.path] = error
    parts: dict[str, PipelineComponent] = {}
    problems: list[str] = []
    for name, source in sources.items():
        at = exports[source.place] if source.export else source.place
        if isinstance(at, CogflowError):
            parts[name] = PipelineComponent(name, source.place, "", {})
            problems.append(f"{source.key}: {at}")
            continue
        try:
            parts[name], found = read_component(name, at, hashes=False)
        except PipelineError as error:
            parts[name], found = PipelineComponent(name, at, "", {}), [error.message]
        problems += found
    return parts, list(dict.fromkeys(problems))


def export_source(artifact: Artifact, names: list[str], output: Path, options: ExportOptions) -> Path:
    """Export the components ``names`` of ``artifact`` to ``output``. Return it, or a run's own export of its newest
    checkpoint.
    """
    if (made := _own_export(artifact, options)) is not None:
        echo(f"{artifact.path} is exported already: {made}")
        return made
    wanted = [name for name in STEMS if name in names or (name == "transformer" and "scheduler" in names)]
    origin = open_origin(artifact, wanted, weights=options.weights, configs=options.config)
    for line in (*origin.passed_over, *origin.notes):
        echo(f"note: {line}")
    family = options.family if origin.tensors is not None else "auto"
    given = {key: value for key, value in options.facts.items() if value is not None}
    prepared = prepare_export(origin, ExportRequest(wanted, family, given, options.dtype))
    step = "" if origin.step is None else f" of step {origin.step}"
    echo(f"exporting {', '.join(wanted)} of {origin.place} ({origin.kind}, {origin.weights} weights{step}) to {output}")
    export_diffusers(prepared, origin, output, SHARD)
    return output


def base_of(transformer: PipelineComponent, model: ModelConfig) -> Path:
    """Return the model's pipeline folder: as ``model`` names it, or for model=auto the one that the transformer was
    trained from.
    """
    if model.name == "auto" and model.path is None:
        trained = transformer.training.model
        if trained is None:
            raise PipelineError(
                f"{transformer.folder} does not say which model it was trained from.",
                "Give stage.base=FOLDER, a pipeline folder, or model=NAME.",
            )
        model = ModelConfig(name=trained.name, path=trained.path)
    return model_folder(model)


def _newest_checkpoint(artifact: Artifact) -> Path:
    """Return the checkpoint itself, or a run's newest; the export checks whether its files are whole."""
    return artifact.checkpoints[0] if artifact.checkpoints else artifact.root


def _trained_from(artifact: Artifact, key: str) -> Path:
    """Return the pipeline folder that the checkpoint was trained from, as its trainer.json states it."""
    trained = read_record(_newest_checkpoint(artifact) / TRAINER, TrainingFacts).model
    if trained is None:
        raise PipelineError(
            f"{key}: {artifact.path} does not say which model it was trained from.",
            f"Give {key}=FOLDER, a pipeline folder.",
        )
    return model_folder(ModelConfig(name=trained.name, path=trained.path))


def _own_export(artifact: Artifact, options: ExportOptions) -> Path | None:
    """Return a run's ``export`` folder when it was made of its newest checkpoint with the same weights and dtype."""
    folder = artifact.export
    if folder is None or not artifact.checkpoints:
        return None
    report = read_record(folder / EXPORT_REPORT, ExportedTransformer)
    weights = options.weights
    if weights == "auto":
        weights = "ema" if artifact.ema else "model"
    same_source = report.source == str(_newest_checkpoint(artifact).absolute())
    alike = same_source and report.weights == weights and options.dtype in ("auto", report.dtype)
    return folder if alike else None
