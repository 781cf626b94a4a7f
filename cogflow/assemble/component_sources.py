"""Where each component comes from: a component folder, a pipeline, an export, a run, a checkpoint, or another program's checkpoint.

Runs, checkpoints and what SAT or DeepSpeed left hold no component as diffusers loads it: they are exported on the way, once for all
components that come from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogflow.assemble.components import STEMS, PipelineComponent, read_component
from cogflow.config.schema import ModelConfig
from cogflow.errors import CheckpointError, CogflowError, PipelineError
from cogflow.export.component import prepare
from cogflow.export.origin import find_origin
from cogflow.export.to_diffusers import REPORT, export_diffusers
from cogflow.models.code_check import CONFIGS
from cogflow.models.loading import model_folder
from cogflow.runtime.console import echo
from cogflow.runtime.progress import progress
from cogflow.weights.locate import SUFFIXES
from cogflow.weights.source import STEP, TRAINER
from cogflow.weights.tensor_source import read_json

SHARD = "5GB"
MODEL = "model_index.json"


@dataclass(frozen=True)
class ExportOptions:
    """How a source is read that must be exported: as the settings of the same name of stage=export."""

    family: str = "auto"
    weights: str = "auto"
    dtype: str = "auto"
    facts: Mapping[str, Any] | None = None
    config: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComponentSource:
    """Where component ``name`` comes from: ``place`` as named by ``key``. ``exported``: ``place`` has to be first."""

    name: str
    key: str
    place: Path
    exported: bool = False


def find(name: str, key: str, place: Path) -> ComponentSource:
    """What ``place`` is to component ``name``. Raises :class:`PipelineError` for a place that does not hold it."""
    place = Path(place).expanduser()
    if not place.exists():
        raise PipelineError(f"{key}: {place} does not exist.", "Name a folder or a checkpoint.")
    if _checkpoint(place):
        if name == "transformer":
            return ComponentSource(name, key, place, exported=True)
        # What a run or a checkpoint does not change is that of the model it was trained from.
        return ComponentSource(name, key, _pipeline(place) or _trained_from(place, key))
    if any((folder / CONFIGS[name]).is_file() for folder in (place / name, place)):
        return ComponentSource(name, key, place)
    for part in ("export", "pipeline"):  # of a run that trained nothing itself
        if (place / part / name / CONFIGS[name]).is_file():
            return ComponentSource(name, key, place / part)
    if name in (*STEMS, "scheduler") and not (place / MODEL).is_file() and _foreign(place):
        return ComponentSource(name, key, place, exported=True)
    raise PipelineError(
        f"{key}: {place} holds no {name}: neither {name}/{CONFIGS[name]} nor {CONFIGS[name]} is there.",
        "Name a component folder, a pipeline, an export, a run or a checkpoint that has it.",
    )


def read_parts(
    sources: Mapping[str, ComponentSource], folder: Path, wishes: ExportOptions
) -> tuple[dict[str, PipelineComponent], list[str]]:
    """Every component read, those of other programs after they are exported to ``folder/<their names>``; and what is wrong with each."""
    places = list(dict.fromkeys(source.place for source in sources.values() if source.exported))
    exports: dict[Path, Path | CogflowError] = {}
    for place in places:
        names = [source.name for source in sources.values() if source.place == place and source.exported]
        try:
            exports[place] = export_on_the_way(place, names, folder / "-".join(names), wishes)
        except CogflowError as error:
            if error.exit_code != 2:
                raise
            exports[place] = error
    parts: dict[str, PipelineComponent] = {}
    problems: list[str] = []
    for name, source in sources.items():
        at = exports[source.place] if source.exported else source.place
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


def export_on_the_way(place: Path, names: list[str], output: Path, wishes: ExportOptions) -> Path:
    """Export ``names`` of ``place`` to ``output`` and return it, or a run's own export where that is of its newest checkpoint."""
    if (made := _own_export(place, wishes)) is not None:
        echo(f"{place} is exported already: {made}")
        return made
    wanted = [name for name in STEMS if name in names or (name == "transformer" and "scheduler" in names)]
    origin = find_origin(place, wanted, wishes.weights, "auto", list(wishes.config))
    for line in (*origin.passed_over, *origin.notes):
        echo(f"note: {line}")
    family = wishes.family if origin.tensors is not None else "auto"
    given = {key: value for key, value in (wishes.facts or {}).items() if value is not None}
    prepared = prepare(origin, wanted, family, given, wishes.dtype, separate_lora=False)
    step = "" if origin.step is None else f" of step {origin.step}"
    echo(f"exporting {', '.join(wanted)} of {origin.place} ({origin.kind}, {origin.weights} weights{step}) to {output}")
    export_diffusers(prepared, origin, output, SHARD, "auto", lambda total, title: progress(total, title, unit="bytes"))
    return output


def base_of(transformer: PipelineComponent, model: ModelConfig) -> Path:
    """The pipeline folder of the model: as the config names it, or for model=auto the one that the transformer was trained from."""
    if model.name == "auto" and model.path is None:
        trained = transformer.training.model
        if trained is None:
            raise PipelineError(
                f"{transformer.folder} does not say which model it was trained from.",
                "Give stage.base=FOLDER, a pipeline folder, or model=NAME.",
            )
        model = ModelConfig(name=trained.name, path=trained.path)
    return model_folder(model)


def _checkpoint(place: Path) -> bool:
    """A run or a checkpoint of cogflow."""
    return place.is_dir() and (
        (place / "checkpoints").is_dir() or (place / TRAINER).is_file() or bool(STEP.search(place.name))
    )


def _pipeline(place: Path) -> Path | None:
    """A run's assembled pipeline."""
    return place / "pipeline" if (place / "pipeline" / MODEL).is_file() else None


def _newest(place: Path) -> Path:
    """The checkpoint ``place`` itself, or a run's newest by name; whether it is whole, the export looks at."""
    if not (place / "checkpoints").is_dir():
        return place
    found = {int(match[1]): path for path in (place / "checkpoints").iterdir() if (match := STEP.match(path.name))}
    if not found:
        raise CheckpointError(
            f"{place / 'checkpoints'} holds no checkpoint.", "Train first: python -m cogflow stage=train"
        )
    return found[max(found)]


def _trained_from(place: Path, key: str) -> Path:
    trained = read_json(_newest(place) / TRAINER).get("model")
    if not isinstance(trained, dict) or not trained.get("name"):
        raise PipelineError(
            f"{key}: {place} does not say which model it was trained from.", f"Give {key}=FOLDER, a pipeline folder."
        )
    return model_folder(
        ModelConfig(name=str(trained["name"]), path=str(trained["path"]) if trained.get("path") else None)
    )


def _own_export(place: Path, wishes: ExportOptions) -> Path | None:
    """A run's ``export`` folder when it was made of its newest checkpoint, with the wished weights and dtype."""
    folder = place / "export"
    if not ((place / "checkpoints").is_dir() and (folder / REPORT).is_file()):
        return None
    report, newest = read_json(folder / REPORT), _newest(place)
    weights = wishes.weights if wishes.weights != "auto" else "ema" if (newest / "ema").is_dir() else "model"
    alike = str(report.get("source")) == str(newest.absolute()) and report.get("weights") == weights
    return folder if alike and wishes.dtype in ("auto", report.get("dtype")) else None


def _foreign(place: Path) -> bool:
    """Whether it looks like weights of another program; what exactly they are, the export finds out."""
    if place.is_file():
        return place.suffix in SUFFIXES
    if any((place / name / config).is_file() or (place / config).is_file() for name, config in CONFIGS.items()):
        return False
    return any(path.suffix in SUFFIXES for depth in ("*", "*/*", "*/*/*") for path in place.glob(depth))
