"""The two sides of a diagnosis: a pipeline folder, a run, an export, a checkpoint; or only what a model is declared to be."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cogflow.assemble.components import CONFIGS, PipelineComponent, read_part
from cogflow.assemble.consistency import expectations, family_of
from cogflow.config.schema import ModelConfig
from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.errors import ConfigError, PipelineError
from cogflow.models.family import FAMILY, Family
from cogflow.models.loading import model_folder
from cogflow.sampling import gallery
from cogflow.weights.source import TRAINER, find_source
from cogflow.weights.tensor_source import read_json

UNREADABLE = "It cannot be read."
SAMPLING = ("steps", "guidance_scale", "use_dynamic_cfg")
SHAPE = ("height", "width", "frames", "fps", "dtype", "max_sequence_length")


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
    expected: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    problems: list[DiagnosisFinding] = field(default_factory=list)
    rung: int = 5

    @property
    def complete(self) -> bool:
        """Whether it can be sampled."""
        return set(self.parts) == set(CONFIGS) and all(part.class_name for part in self.parts.values())

    @property
    def made(self) -> dict[str, Any]:
        """What is known of the training of its transformer."""
        return self.parts["transformer"].made if "transformer" in self.parts else {}


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
        return replace(found, place=place, run=place, sampling=found.sampling | _recorded(place))
    if (place / "export" / "export.json").is_file():
        place = place / "export"
    if (place / "export.json").is_file():
        transformer, _ = read_part("transformer", place)
        return _with_base(role, place, transformer, model, 5)
    if (place / "checkpoints").is_dir() or (place / TRAINER).is_file():
        source = find_source(place, "auto")
        transformer, _ = read_part("transformer", source.folder)
        known = {
            key: source.trainer[key]
            for key in ("family", "model", "trained_with")
            if source.trainer.get(key) is not None
        }
        made = {**known, "step": source.step, "weights": source.weights, "source": str(source.origin)}
        return _with_base(role, place, replace(transformer, made=made), model, 4)
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
    scheduler = family.scheduler_config()
    expected = {
        key: scheduler[key]
        for key in ("snr_shift_scale", "prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    }
    expected |= {"scaling_factor": family.scaling_factor, "max_sequence_length": family.text_tokens}
    if family.image_to_video:
        expected["invert_scale_latents"] = family.invert_scale_latents
    return DiagnosisInput(role, None, {}, family, expected)


def _with_base(role: str, place: Path, transformer: PipelineComponent, model: ModelConfig, rung: int) -> DiagnosisInput:
    """A transformer alone, with everything else from the model it was trained from."""
    trained = transformer.made.get("model") or {}
    named = (
        model
        if model.path is not None or not trained.get("name")
        else ModelConfig(name=trained["name"], path=trained.get("path"))
    )
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
            parts[name], refused = read_part(name, folder)
        except PipelineError as error:
            refused = [error.message]
        problems += [
            DiagnosisFinding("facts", name, "broken", candidate=text, rung=rung, confidence=1.0, why=UNREADABLE)
            for text in refused
        ]
    transformer = parts.get("transformer")
    family = family_of(transformer) if transformer is not None else None
    expected = expectations(transformer, family) if transformer is not None else {}
    made = transformer.made if transformer is not None else {}
    source = Path(str(made.get("source", "")))
    run = source.parent.parent if source.parent.name == "checkpoints" and source.parent.is_dir() else None
    sampling = _recorded(run) if run is not None else {}
    if (place / "assembly.json").is_file():
        sampling |= read_json(place / "assembly.json").get("sampling") or {}
    return DiagnosisInput(role, place, parts, family, expected, sampling, run, problems, rung)


def _recorded(run: Path) -> dict[str, Any]:
    """How the run's newest samples were made."""
    newest = gallery.newest(run / "samples")
    if newest is None:
        return {}
    record = gallery.read_record(newest)
    found = {key: record["sampling"][key] for key in SAMPLING if key in record["sampling"]}
    return found | {key: record[key] for key in SHAPE if key in record}
