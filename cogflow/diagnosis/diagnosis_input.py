"""Resolve the two inputs of a diagnosis, candidate and reference.

An input is a pipeline, a run, an export, a checkpoint, or the facts that a model declares.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from cogflow.artifacts.identify import Artifact, ArtifactKind, identify
from cogflow.artifacts.run_layout import ASSEMBLY, RunLayout, run_of_checkpoint
from cogflow.assemble.components import PipelineComponent, read_component
from cogflow.assemble.expectations import Expectation, expectations, family_of
from cogflow.config.command import command
from cogflow.config.model_section import ModelConfig
from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.errors import ConfigError, PipelineError
from cogflow.export.origin import find_transformer
from cogflow.files.record_io import read_record
from cogflow.models.code_check import CONFIGS
from cogflow.models.family import MODEL_SPECS, ModelSpec
from cogflow.models.loading import model_folder
from cogflow.records.pipeline_records import AssemblyRecord, PipelineSampling, TransformerOrigin
from cogflow.sampling.sample_record import newest_samples, read_sample_record

DIAGNOSED = (ArtifactKind.PIPELINE, ArtifactKind.RUN, ArtifactKind.EXPORT, ArtifactKind.CHECKPOINT)
"""Kinds of artifact that can be diagnosed."""
UNREADABLE = "It cannot be read."


@dataclass(frozen=True)
class DiagnosisInput:
    """One input of the diagnosis.

    ``parts`` by component, empty for declared facts. ``expected``: the facts it was trained with, or else those of its
    family. ``sampling``: the recorded settings of its samples. ``run``: the run that trained it, where it still exists.
    ``problems``: errors from reading the parts. ``rung``: the rung of the sharpness ladder that its samples belong to.
    ``artifact``: what its path was taken for.
    """

    role: str
    place: Path | None
    parts: dict[str, PipelineComponent]
    family: ModelSpec | None
    expected: dict[str, Expectation]
    sampling: PipelineSampling | None = None
    run: Path | None = None
    problems: list[DiagnosisFinding] = field(default_factory=list)
    rung: int = 5
    artifact: Artifact | None = None

    @property
    def complete(self) -> bool:
        """True when every component is there, so that it can be sampled."""
        return set(self.parts) == set(CONFIGS) and all(part.class_name for part in self.parts.values())

    @property
    def training(self) -> TransformerOrigin:
        """The facts of its transformer's training."""
        return self.parts["transformer"].training if "transformer" in self.parts else TransformerOrigin()


def resolve(
    place: Path | None,
    model: ModelConfig,
    role: str,
    other: DiagnosisInput | None = None,
    kind: ArtifactKind | None = None,
) -> DiagnosisInput:
    """Return the diagnosis input at ``place``. ``role``: candidate or reference; ``kind``: what the user says it is.

    Without a place, return the facts that ``model`` declares, or else those that the ``other`` input recorded for
    itself. Raise :class:`ConfigError`, :class:`CheckpointError` or :class:`PipelineError` for a path that cannot be
    diagnosed, and when neither place nor model is given.
    """
    if place is None and model.name not in MODEL_SPECS and other is not None and other.expected:
        return DiagnosisInput(role, None, {}, other.family, other.expected)
    if place is None:
        return _declared(model, role)
    artifact = identify(place, kind, key=f"stage.{role}")
    if artifact.kind not in DIAGNOSED:
        raise _not_diagnosed(artifact, role)
    return replace(_of_artifact(artifact, model, role), artifact=artifact)


def _of_artifact(artifact: Artifact, model: ModelConfig, role: str) -> DiagnosisInput:
    """Resolve an artifact of :data:`DIAGNOSED`. Of a run its pipeline is taken, else its export, else its newest
    checkpoint.
    """
    place = artifact.path
    if artifact.kind is ArtifactKind.PIPELINE:
        return _of_parts(role, place, dict.fromkeys(CONFIGS, place), 5)
    if artifact.pipeline is not None:
        found = _of_parts(role, artifact.pipeline, dict.fromkeys(CONFIGS, artifact.pipeline), 5)
        return replace(found, place=place, run=place, sampling=_recorded(place) or found.sampling)
    if artifact.kind is ArtifactKind.EXPORT or artifact.export is not None:
        folder = artifact.export or place
        transformer, _ = read_component("transformer", folder)
        return _with_base(role, folder, transformer, model, 5)
    source = find_transformer(artifact)
    transformer, _ = read_component("transformer", source.folder)
    return _with_base(role, place, replace(transformer, training=source.training), model, 4)


def _not_diagnosed(artifact: Artifact, role: str) -> PipelineError:
    assembling = command("assemble", {f"stage.{name}": artifact.path for name in artifact.components})
    sampling = command("sample", {"stage.source": artifact.path, "stage.reference": "PATH"})
    exporting = command("export", {"stage.source": artifact.path})
    hints = {
        ArtifactKind.COMPONENT: f"Assemble a pipeline with it first: {assembling}",
        ArtifactKind.COMPONENTS: f"Assemble a pipeline of them first: {assembling}",
        ArtifactKind.VIDEOS: f"Compare videos: {sampling}",
        ArtifactKind.FRAMES: f"Compare frames: {sampling}",
    }
    return PipelineError(
        f"stage.{role}={artifact.path} is {artifact.kind.label} ({artifact.reason}); "
        "stage=diagnose takes a pipeline, a run, an export or a checkpoint.",
        hints.get(artifact.kind, f"Export it first: {exporting}"),
    )


def _declared(model: ModelConfig, role: str) -> DiagnosisInput:
    family = MODEL_SPECS.get(model.name)
    if family is None:
        raise ConfigError(
            f"There is nothing to compare the candidate with: stage.{role} is not given and model={model.name} "
            "declares nothing.",
            f"Give stage.{role}=FOLDER, or model= one of {', '.join(MODEL_SPECS)}.",
        )
    declared = PipelineComponent("transformer", Path(), "", {})
    return DiagnosisInput(role, None, {}, family, expectations(declared, family))


def _with_base(role: str, place: Path, transformer: PipelineComponent, model: ModelConfig, rung: int) -> DiagnosisInput:
    """Combine a transformer with the other components of the model it was trained from."""
    trained = transformer.training.model
    named = model if model.path is not None or trained is None else ModelConfig(name=trained.name, path=trained.path)
    base = model_folder(named)
    others = {name: base for name in CONFIGS if name != "transformer"}
    return _of_parts(role, place, others, rung, {"transformer": transformer})


def _of_parts(
    role: str, place: Path, places: dict[str, Path], rung: int, given: dict[str, PipelineComponent] | None = None
) -> DiagnosisInput:
    parts: dict[str, PipelineComponent] = dict(given or {})
    problems = []
    for name, folder in places.items():
        try:
            parts[name], refused = read_component(name, folder)
        except PipelineError as error:
            refused = [error.message]
        problems += [
            DiagnosisFinding("facts", name, "broken", candidate=text, rung=rung, confidence=1.0, why=UNREADABLE)
            for text in refused
        ]
    transformer = parts.get("transformer")
    family = family_of(transformer) if transformer is not None else None
    expected = expectations(transformer, family) if transformer is not None else {}
    source = Path((transformer.training.source if transformer is not None else None) or "")
    run = run_of_checkpoint(source) if source.parent.is_dir() else None
    sampling = _recorded(run) if run is not None else None
    if (place / ASSEMBLY).is_file():
        sampling = read_record(place / ASSEMBLY, AssemblyRecord).sampling
    return DiagnosisInput(role, place, parts, family, expected, sampling, run, problems, rung)


def _recorded(run: Path) -> PipelineSampling | None:
    """Return how the run's newest samples were made, or ``None``."""
    newest = newest_samples(RunLayout(run).samples)
    if newest is None:
        return None
    record = read_sample_record(newest)
    return PipelineSampling(
        height=record.height,
        width=record.width,
        frames=record.frames,
        fps=record.fps,
        steps=record.sampling.steps,
        guidance_scale=record.sampling.guidance_scale,
        use_dynamic_cfg=record.sampling.use_dynamic_cfg,
        dtype=record.dtype,
        max_sequence_length=record.max_sequence_length,
    )
