"""What an export starts from: a run or checkpoint of cogflow, a diffusers folder, or whatever another program left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogflow.errors import CheckpointError, ConfigError
from cogflow.export.facts import read_yamls
from cogflow.weights import locate
from cogflow.weights.source import STEP, TRAINER, find_source
from cogflow.weights.tensor_source import TensorSource, read_json

COMPONENTS = ("transformer", "vae", "text_encoder")
CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}


@dataclass(frozen=True)
class ExportOrigin:
    """``folders``: components that lie there in diffusers' layout. ``tensors``: those of any other layout, by their own names.

    ``weights``: model or ema. ``trainer``: what is known of the training (keys family, model, trained_with). ``files``: the source's
    files with hashes or sizes. ``yamls``: path and content of each yaml beside the source or named by the user; ``json``: a
    diffusers config that the user named. ``notes`` and ``passed_over`` are for the user.
    """

    kind: str
    place: Path
    weights: str
    step: int | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    tensors: TensorSource | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    yamls: Sequence[tuple[Path, Mapping[str, Any]]] = ()
    json: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    passed_over: Sequence[str] = ()


def find_origin(place: Path, wanted: Sequence[str], weights: str, masters: str, configs: Sequence[str]) -> ExportOrigin:
    """Find and verify what lies at ``place``. ``wanted``: components asked for; ``configs``: files the user names beside.

    Raises :class:`CheckpointError` for what is missing, broken or unknown, :class:`ConfigError` for a config that cannot be read.
    """
    place = Path(place).expanduser()
    if not place.exists():
        raise CheckpointError(
            f"{place} does not exist.",
            "stage.source is a run, a checkpoint, a SAT folder, a .pt file, or a DeepSpeed or diffusers folder.",
        )
    yamls, json = _named(configs)
    if _ours(place):
        source = find_source(place, weights)
        folders = {"transformer": source.folder}
        kind = "cogflow" if source.trainer.get("step") is not None else "diffusers"
        return ExportOrigin(
            kind, source.origin.absolute(), source.weights, source.step, folders, None, source.trainer, source.files,
            yamls, json, (), source.passed_over,
        )  # fmt: skip
    folders = _components(place)
    if folders and ("transformer" not in wanted or "transformer" in folders):
        trainer: Mapping[str, Any] = {}
        files: Mapping[str, Any] = {}
        step = None
        chosen = weights if weights != "auto" else "model"
        if "transformer" in wanted:
            source = find_source(place, weights)
            trainer, files, step, chosen = source.trainer, source.files, source.step, source.weights
        return ExportOrigin("diffusers", place.absolute(), chosen, step, folders, None, trainer, files, yamls, json)
    found = locate.find(place, weights, masters)
    beside = read_yamls(found.yamls)
    files = {path.name: {"bytes": path.stat().st_size} for path in found.files}
    return ExportOrigin(
        found.kind, found.origin.absolute(), found.weights, found.step, {}, found.tensors, {}, files,
        [*beside, *yamls], json, found.notes,
    )  # fmt: skip


def _ours(place: Path) -> bool:
    return place.is_dir() and (
        (place / "checkpoints").is_dir() or (place / TRAINER).is_file() or bool(STEP.search(place.name))
    )


def _components(place: Path) -> dict[str, Path]:
    """Components in diffusers' layout: sub-folders of their names, or the place itself."""
    if not place.is_dir():
        return {}
    found = {name: place / name for name in COMPONENTS if (place / name / "config.json").is_file()}
    if not found and (place / "config.json").is_file():
        config = read_json(place / "config.json")
        names = [name for name, cls in CLASSES.items() if config.get("_class_name") == cls]
        names += ["text_encoder"] if config.get("model_type") == "t5" else []
        # An unknown class is looked at as a transformer, and refused there with what it is.
        found = {(names or ["transformer"])[0]: place}
    return found


def _named(configs: Sequence[str]) -> tuple[list[tuple[Path, Mapping[str, Any]]], Mapping[str, Any] | None]:
    yamls: list[tuple[Path, Mapping[str, Any]]] = []
    json = None
    for name in configs:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"stage.config={name}: no such file.", "Name SAT yaml files, or a diffusers config.json.")
        if path.suffix == ".json":
            json = read_json(path)
        else:
            yamls += read_yamls([path])
    return yamls, json
