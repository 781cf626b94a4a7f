"""Open the artifact that an export starts from, and verify its files before any of them is read.

:mod:`cogflow.artifacts.identify` decides what a path is. This module opens it: a run or a checkpoint of cogflow,
components in diffusers' layout, or the checkpoint of another program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cogflow.artifacts.identify import Artifact, ArtifactKind
from cogflow.artifacts.run_layout import EXPORT_REPORT, TRAINER
from cogflow.artifacts.working_run import enclosing_run
from cogflow.config.command import command
from cogflow.config.run_section import run_at
from cogflow.errors import CheckpointError, ConfigError, format_list
from cogflow.export.facts_from_yaml import read_yamls
from cogflow.files.hashing import hash_file
from cogflow.files.publish import MANIFEST, check_manifest, read_manifest
from cogflow.files.record_io import ForeignObject, read_record
from cogflow.records.export_records import FileBytes
from cogflow.records.pipeline_records import ExportedTransformer, TransformerOrigin
from cogflow.records.training_records import TrainingFacts
from cogflow.weights.foreign import ForeignWeights, read_step_folder, read_torch_file
from cogflow.weights.tensor_source import TensorSource, contained_file, read_json

OURS = (ArtifactKind.RUN, ArtifactKind.CHECKPOINT)
DIFFUSERS = (ArtifactKind.PIPELINE, ArtifactKind.EXPORT, ArtifactKind.COMPONENTS, ArtifactKind.COMPONENT)
FOREIGN = (ArtifactKind.SAT_CHECKPOINT, ArtifactKind.SAT_VAE, ArtifactKind.DEEPSPEED)


@dataclass(frozen=True)
class TransformerSource:
    """A transformer folder and what is known of it.

    ``folder`` holds config.json and the safetensors; ``origin`` is the checkpoint, or ``folder`` itself. ``weights`` is
    model or ema. ``training``: what is known of the training, with ``origin``, step and weights. ``files``: relative
    name -> sha256. ``passed_over``: newer checkpoints of the run that are broken, a line each.
    """

    folder: Path
    origin: Path
    weights: str
    step: int | None = None
    training: TransformerOrigin = field(default_factory=TransformerOrigin)
    files: dict[str, str] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ExportOrigin:
    """The source of an export.

    ``folders``: components in diffusers' layout. ``tensors``: those of any other layout, by their own names.
    ``weights``: model or ema. ``training``: what is known of the training. ``files``:
    the source's files with hashes or sizes. ``yamls``: path and content of each yaml beside the source or named by the
    user; ``json``: a diffusers config that the user named. ``notes`` and ``passed_over`` are for the user.
    """

    kind: str
    place: Path
    weights: str
    step: int | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    tensors: TensorSource | None = None
    training: TransformerOrigin = field(default_factory=TransformerOrigin)
    files: Mapping[str, str | FileBytes] = field(default_factory=dict)
    yamls: Sequence[tuple[Path, ForeignObject]] = ()
    json: ForeignObject | None = None
    notes: Sequence[str] = ()
    passed_over: Sequence[str] = ()


def open_origin(
    artifact: Artifact,
    wanted: Sequence[str],
    *,
    weights: str = "auto",
    masters: str = "auto",
    configs: Sequence[str] = (),
) -> ExportOrigin:
    """Open and verify ``artifact``. ``wanted``: components asked for; ``configs``: files that the user names in
    addition.

    Raise :class:`CheckpointError` for files that are missing, broken or of unknown tensors, and for artifacts without
    weights; :class:`ConfigError` for a config that cannot be read.
    """
    _check_choice("masters", masters, ("auto", "fp32", "bf16"))
    yamls, json = _named(configs)
    if artifact.kind in FOREIGN:
        found = open_foreign(artifact, weights, masters)
        return ExportOrigin(
            kind=found.layout,
            place=found.origin.absolute(),
            weights=found.weights,
            step=found.step,
            tensors=found.tensors,
            files={path.name: FileBytes(path.stat().st_size) for path in found.files},
            yamls=[*read_yamls(found.yamls), *yamls],
            json=json,
            notes=found.notes,
        )
    if artifact.kind in DIFFUSERS and not ("transformer" in wanted and "transformer" in artifact.components):
        chosen = weights if weights != "auto" else "model"
        place = artifact.path.absolute()
        return ExportOrigin("diffusers", place, chosen, folders=artifact.components, yamls=yamls, json=json)
    source = find_transformer(artifact, weights)
    ours = artifact.kind in OURS
    return ExportOrigin(
        kind="cogflow" if ours else "diffusers",
        place=(source.origin if ours else artifact.path).absolute(),
        weights=source.weights,
        step=source.step,
        folders={"transformer": source.folder} if ours else artifact.components,
        training=source.training,
        files=source.files,
        yamls=yamls,
        json=json,
        passed_over=source.passed_over,
    )


def open_foreign(artifact: Artifact, weights: str = "auto", masters: str = "auto") -> ForeignWeights:
    """Open a checkpoint of SAT or DeepSpeed, or SAT's VAE; for the options and errors see :func:`read_step_folder`."""
    _check_choice("weights", weights, ("auto", "model", "ema"))
    _check_choice("masters", masters, ("auto", "fp32", "bf16"))
    opened = read_torch_file if artifact.root.is_file() else read_step_folder
    return opened(artifact.root, weights, masters, artifact.notes)


def find_transformer(artifact: Artifact, weights: str = "auto") -> TransformerSource:
    """Return the transformer of a run, a checkpoint, a pipeline, an export or a component, verified.

    Of a run the newest checkpoint that is whole is taken. ``weights``: auto (EMA where there is one), model or ema.
    Raise :class:`CheckpointError` that names what is missing or broken.
    """
    _check_choice("weights", weights, ("auto", "model", "ema"))
    if artifact.kind is ArtifactKind.RUN:
        return _newest(artifact, weights)
    if artifact.kind is ArtifactKind.CHECKPOINT:
        return _checkpoint(artifact.root, weights)
    if "transformer" not in artifact.components:
        held = ", ".join(artifact.components) or "no component"
        raise CheckpointError(
            f"{artifact.path} is {artifact.kind.label} ({artifact.reason}) and holds no transformer; it holds {held}.",
            _no_transformer_hint(artifact),
        )
    return _plain(artifact, weights)


def _no_transformer_hint(artifact: Artifact) -> str:
    if artifact.kind in FOREIGN:
        return f"Export it first: {command('export', {'stage.source': artifact.path})}"
    return "Give a run, a checkpoint, a pipeline, an export or a transformer folder."


def _newest(artifact: Artifact, weights: str) -> TransformerSource:
    if not artifact.checkpoints:
        raise CheckpointError(
            f"{artifact.path} is a run that holds no checkpoint ({artifact.reason}).",
            f"Train first: {command('train', {}, run_at(artifact.path))}",
        )
    broken: list[str] = []
    for folder in artifact.checkpoints:
        problems = check_manifest(folder)
        if not problems:
            return _checkpoint(folder, weights, verified=True, passed_over=broken)
        broken += [f"{folder.name}/{problem}" for problem in problems]
    raise CheckpointError(
        f"No checkpoint in {artifact.checkpoints[0].parent} is whole:\n{format_list(broken)}",
        "Train again, or bring the files back.",
    )


def _checkpoint(
    folder: Path, weights: str, *, verified: bool = False, passed_over: Sequence[str] = ()
) -> TransformerSource:
    problems = [] if verified else check_manifest(folder)
    if problems:
        raise CheckpointError(
            f"The checkpoint {folder} is not as it was saved:\n{format_list(problems)}",
            "Take another checkpoint, or bring the files back.",
        )
    facts = read_record(folder / TRAINER, TrainingFacts)
    preferred = "ema" if (folder / "ema").is_dir() else "model"
    chosen = preferred if weights == "auto" else weights
    part = "ema" if chosen == "ema" else "transformer"
    if not (folder / part / "config.json").is_file():
        hint = "It was saved by another program?"
        if part == "ema":
            hint = "It was trained without EMA; use stage.weights=model."
        raise CheckpointError(f"{folder} holds no {part}/config.json.", hint)
    manifest = read_manifest(folder).files
    files = {name: entry.sha256 for name, entry in manifest.items() if name.startswith(f"{part}/") or name == TRAINER}
    run = enclosing_run(folder)
    training = TransformerOrigin(
        source=str(folder),
        run=None if run is None else str(run.absolute()),
        line=facts.line,
        step=facts.step,
        weights=chosen,
        family=facts.family,
        model=facts.model,
        trained_with=facts.trained_with,
    )
    return TransformerSource(
        folder=folder / part,
        origin=folder,
        weights=chosen,
        step=facts.step,
        training=training,
        files=files,
        passed_over=list(passed_over),
    )


def _plain(artifact: Artifact, weights: str) -> TransformerSource:
    """A transformer in diffusers' layout. A manifest is not needed, but must hold when it is there; an export passes on
    what it knows.
    """
    if weights == "ema":
        raise CheckpointError(
            f"{artifact.path} holds no EMA weights.",
            "stage.weights=ema needs a checkpoint trained with stage.ema_decay.",
        )
    folder = artifact.components["transformer"]
    for published in (artifact.path, folder.parent):
        if (published / MANIFEST).is_file() and (problems := check_manifest(published)):
            raise CheckpointError(
                f"{published} is not as it was published:\n{format_list(problems)}", "Export it again."
            )
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors") and path.name != MANIFEST
    )
    report = folder.parent / EXPORT_REPORT
    former = read_record(report, ExportedTransformer) if report.is_file() else TransformerOrigin()
    return TransformerSource(
        folder=folder,
        origin=folder,
        weights=former.weights or "model",
        step=former.step,
        training=former,
        files={name: hash_file(contained_file(folder, name)) for name in names},
    )


def _named(configs: Sequence[str]) -> tuple[list[tuple[Path, ForeignObject]], ForeignObject | None]:
    """Read the files of stage.config: SAT yamls with their paths, and a diffusers config."""
    yamls: list[tuple[Path, ForeignObject]] = []
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


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"stage.{key}={value} is unknown.", f"Choose {', '.join(known[:-1])} or {known[-1]}.")
