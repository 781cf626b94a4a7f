"""The two sides of a diagnosis: a pipeline folder, a run, an export, a checkpoint; or only what a model is declared to be."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from cogflow.artifacts.run_layout import ASSEMBLY, SAMPLES_RECORD
from cogflow.assemble.components import PipelineComponent, read_component
from cogflow.assemble.expectations import Expectation, expectations, family_of
from cogflow.config.schema import ModelConfig
from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.errors import ConfigError, PipelineError
from cogflow.files.record_io import read_record
from cogflow.models.code_check import CONFIGS
from cogflow.models.family import FAMILY, Family
from cogflow.models.loading import model_folder
from cogflow.records.pipeline_records import AssemblyRecord, PipelineSampling, TransformerOrigin
from cogflow.records.sample_records import SamplesRecord
from cogflow.records.training_records import ModelIdentity, TrainedWith
from cogflow.sampling import gallery
from cogflow.weights.source import TRAINER, find_source

UNREADABLE = "It cannot be read."


@dataclass(frozen=True)
class DiagnosisInput:
    """``parts`` by component, empty for declared facts; ``expected``: what it was trained with (or else its family's facts).

    ``sampling``: how it is called, as far as that is recorded. ``run``: the training it came from, where that is still there.
    ``problems``: what reading the parts refused. ``rung``: of the ladder, on which samples of it stand.
    """

    role: str
    place: Path | None
    parts: dict[str, PipelineComponent]
    family: Family | None
    expected: dict[str, Expectation]
    sampling: PipelineSampling | None = None
    run: Path | None = None
    problems: list[DiagnosisFinding] = field(default_factory=list)
    rung: int = 5

    @property
    def complete(self) -> bool:
        """Whether it can be sampled."""
        return set(self.parts) == set(CONFIGS) and all(part.class_name for part in self.parts.values())

    @property
    def training(self) -> TransformerOrigin:
        """How its transformer was trained."""
        return self.parts["transformer"].training if "transformer" in self.parts else TransformerOrigin()


def resolve(place: Path | None, model: ModelConfig, role: str, other: DiagnosisInput | None = None) -> DiagnosisInput:
    """The side at ``place``, or without one what ``model=`` declares; or what the ``other`` side's own record says that it should be.

    Raises :class:`ConfigError` or :class:`PipelineError` for a place that is nothing of the kind, and for neither place nor model.
    """
    if place is None and model.name not in FAMILY and other is not None and other.expected:
        return DiagnosisInput(role, None, {}, other.family, other.expected)
    if place is None:
        return _declared(model, role)
    place = Path(place).expanduser()
    if not place.exists():
        raise PipelineError(
            f"stage.{role}={place} does not exist.", "Give a pipeline folder, a run, an export or a checkpoint."
        )
    if (place / "model_index.json").is_file():
        return _of_parts(role, place, dict.fromkeys(CONFIGS, place), 5)
    if (place / "pipeline" / "model_index.json").is_file():
        found = _of_parts(role, place / "pipeline", dict.fromkeys(CONFIGS, place / "pipeline"), 5)
        return replace(found, place=place, run=place, sampling=_recorded(place) or found.sampling)
    if (place / "export" / "export.json").is_file():
        place = place / "export"
    if (place / "export.json").is_file():
        transformer, _ = read_component("transformer", place)
        return _with_base(role, place, transformer, model, 5)
    if (place / "checkpoints").is_dir() or (place / TRAINER).is_file():
        source = find_source(place, "auto")
        transformer, _ = read_component("transformer", source.folder)
        trainer = source.trainer
        training = TransformerOrigin(
            source=str(source.origin),
            step=source.step,
            weights=source.weights,
            family=trainer.get("family"),
            model=ModelIdentity(**trainer["model"]) if trainer.get("model") else None,
            trained_with=TrainedWith(**trainer["trained_with"]) if trainer.get("trained_with") else None,
        )
        return _with_base(role, place, replace(transformer, training=training), model, 4)
    raise PipelineError(
        f"stage.{role}={place} is neither a pipeline folder, nor a run, an export or a checkpoint.",
        "A pipeline folder has model_index.json, a run checkpoints/, an export export.json.",
    )


def _declared(model: ModelConfig, role: str) -> DiagnosisInput:
    family = FAMILY.get(model.name)
    if family is None:
        raise ConfigError(
            f"There is nothing to hold the candidate against: stage.{role} is not given and model={model.name} declares nothing.",
            f"Give stage.{role}=FOLDER, or model= one of {', '.join(FAMILY)}.",
        )
    declared = PipelineComponent("transformer", Path(), "", {})
    return DiagnosisInput(role, None, {}, family, expectations(declared, family))


def _with_base(role: str, place: Path, transformer: PipelineComponent, model: ModelConfig, rung: int) -> DiagnosisInput:
    """A transformer alone, with everything else from the model it was trained from."""
    trained = transformer.training.model
    named = model if model.path is not None or trained is None else ModelConfig(name=trained.name, path=trained.path)
    base = model_folder(named)
    side = _of_parts(
        role, place, {name: base for name in CONFIGS if name != "transformer"}, rung, {"transformer": transformer}
    )
    return side


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
    run = source.parent.parent if source.parent.name == "checkpoints" and source.parent.is_dir() else None
    sampling = _recorded(run) if run is not None else None
    if (place / ASSEMBLY).is_file():
        sampling = read_record(place / ASSEMBLY, AssemblyRecord).sampling
    return DiagnosisInput(role, place, parts, family, expected, sampling, run, problems, rung)


def _recorded(run: Path) -> PipelineSampling | None:
    """Return how the run's newest samples were made, or ``None``."""
    newest = gallery.newest(run / "samples")
    if newest is None:
        return None
    record = read_record(newest / SAMPLES_RECORD, SamplesRecord)
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
