"""Decide what a path holds: a run, a checkpoint, a pipeline, a SAT folder, videos, ...

:func:`identify` is the only place that decides this, and every stage that takes a path calls it. It decides by content
and never by a folder's name. :data:`PRECEDENCE` lists the rules: the first rule that fits a folder wins, the others
that fit are named to the user, who can choose one of them (``stage.source_kind=run``).

Identifying is cheap: it looks for files of known names, lists at most :data:`MOST_ENTRIES` entries of a folder, and
reads small JSON files and the tensor names of torch files (with the reader that builds nothing but tensors). It reads
no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import (
    EXPORT_REPORT,
    MODEL_INDEX,
    SAMPLES_RECORD,
    TRAINER,
    RunLayout,
    parse_step,
    step_folders,
)
from cogflow.errors import CheckpointError, ConfigError
from cogflow.files.bounded_parsing import read_json_object
from cogflow.files.contained_files import open_regular
from cogflow.files.publish import MANIFEST
from cogflow.models.code_check import CONFIGS
from cogflow.weights import foreign, torch_file
from cogflow.weights.tensor_source import contained_file
from cogflow.weights.torch_file import TorchFile
from cogflow.weights.zero import latest_step_folder

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
CONTACT_SHEET = "contact.png"
"""Overview that cogflow writes beside samples; it is no frame."""
MOST_ENTRIES = 10_000
"""Entries of one folder that are listed. A folder with more is a data set, and its first entries show that."""
MOST_STEPS = 1_000
"""Sub-folders of one folder that are examined as checkpoints or step folders."""
AUTO = "auto"


class ArtifactKind(Enum):
    """Kinds of content of a path. The values are those of ``stage.source_kind`` and of similar settings."""

    PIPELINE = "pipeline"
    EXPORT = "export"
    CHECKPOINT = "checkpoint"
    RUN = "run"
    SAT_CHECKPOINT = "sat_checkpoint"
    SAT_VAE = "sat_vae"
    DEEPSPEED = "deepspeed"
    COMPONENTS = "components"
    COMPONENT = "component"
    VIDEOS = "videos"
    FRAMES = "frames"

    @property
    def label(self) -> str:
        """The kind in words, with its article."""
        return LABELS[self]


LABELS = {
    ArtifactKind.PIPELINE: "a pipeline",
    ArtifactKind.EXPORT: "an export",
    ArtifactKind.CHECKPOINT: "a checkpoint",
    ArtifactKind.RUN: "a run",
    ArtifactKind.SAT_CHECKPOINT: "a SAT checkpoint",
    ArtifactKind.SAT_VAE: "a SAT VAE",
    ArtifactKind.DEEPSPEED: "a DeepSpeed checkpoint",
    ArtifactKind.COMPONENTS: "a folder of components",
    ArtifactKind.COMPONENT: "a component",
    ArtifactKind.VIDEOS: "videos",
    ArtifactKind.FRAMES: "frames",
}


@dataclass(frozen=True)
class Artifact:
    """Content that was recognised at ``path``.

    ``reason``: the content it was recognised by, a clause. ``root``: the folder or file to read, which differs from
    ``path`` where ``latest`` or the only step names a folder inside. ``components``: diffusers component -> folder.
    ``step``: as the content states it. ``ema``: True when averaged weights are there, too. ``checkpoints``: of a run,
    newest first, not verified. ``also``: other kinds whose rules fit. ``notes``: choices that were made inside
    ``path``, for the user.
    """

    kind: ArtifactKind
    path: Path
    root: Path
    reason: str
    components: Mapping[str, Path] = field(default_factory=dict)
    step: int | None = None
    ema: bool = False
    checkpoints: tuple[Path, ...] = ()
    also: tuple[ArtifactKind, ...] = ()
    notes: tuple[str, ...] = ()

    def line(self, key: str, *, has_kind_setting: bool = True) -> str:
        """Return the line that a stage prints of the path in setting ``key``.

        It names the other kinds where ``<key>_kind`` can choose one of them.
        """
        line = f"{key}={self.path} is taken for {self.kind.label}: {self.reason}"
        if not (self.also and has_kind_setting):
            return line
        other = " or ".join(kind.label for kind in self.also)
        return f"{line} (it could be {other}, too: {key}_kind={self.also[0].value})"

    @property
    def pipeline(self) -> Path | None:
        """The pipeline that a run assembled."""
        folder = RunLayout(self.root).pipeline
        return folder if self.kind is ArtifactKind.RUN and (folder / MODEL_INDEX).is_file() else None

    @property
    def export(self) -> Path | None:
        """The export that a run made."""
        folder = RunLayout(self.root).export
        return folder if self.kind is ArtifactKind.RUN and (folder / EXPORT_REPORT).is_file() else None


def identify(path: Path, kind: ArtifactKind | None = None, *, key: str = "") -> Artifact:
    """Return the artifact at ``path``.

    ``kind``: the kind that the user states, which must fit. ``key``: the setting that names the path.

    Raise :class:`CheckpointError` for a path that does not exist, that is nothing cogflow knows, that is not of
    ``kind``, or whose torch files are broken.
    """
    path = Path(path).expanduser()
    named = f"{key}={path}" if key else str(path)
    if not path.exists():
        raise CheckpointError(f"{named} does not exist.", EXPECTED)
    place = _Place(path)
    rules = [rule for rule in PRECEDENCE if kind is None or kind in rule.kinds]
    found = next((one for rule in rules if (one := rule.find(place)) and kind in (None, one.kind)), None)
    if found is None:
        raise _not_of_kind(place, named, kind, key) if kind else _unknown(place, named)
    also = [
        other.kind
        for rule in PRECEDENCE
        if not rule.reads_weights and (other := rule.find(place)) and other.kind is not found.kind
    ]
    return replace(found, also=tuple(one for one in also if one not in IMPLIED.get(found.kind, ())))


def kind_named(word: str, key: str) -> ArtifactKind | None:
    """Return the kind that setting ``key`` names, ``None`` for auto. Raise :class:`ConfigError` for an unknown word."""
    if word == AUTO:
        return None
    try:
        return ArtifactKind(word)
    except ValueError as error:
        choices = ", ".join([AUTO, *(kind.value for kind in ArtifactKind)])
        raise ConfigError(f"{key}={word} is unknown.", f"Choose one of {choices}.") from error


@dataclass(frozen=True)
class KindRule:
    """``find`` returns what a place is by this rule, or ``None``. ``kinds``: what it can return; ``needs``: what it
    looks for.
    """

    kinds: tuple[ArtifactKind, ...]
    needs: str
    find: Callable[[_Place], Artifact | None]
    reads_weights: bool = False


class _Place:
    """A path and its folder's entries, listed once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, *names: str) -> bool:
        """Return whether every one of these files is there."""
        return self.path.is_dir() and all((self.path / name).is_file() for name in names)

    @cached_property
    def entries(self) -> list[Path]:
        """The first :data:`MOST_ENTRIES` entries, by name, without hidden ones; empty for a file."""
        if not self.path.is_dir():
            return []
        return sorted(entry for entry in islice(self.path.iterdir(), MOST_ENTRIES) if not entry.name.startswith("."))

    @cached_property
    def folders(self) -> list[Path]:
        """The first :data:`MOST_STEPS` sub-folders."""
        return list(islice((entry for entry in self.entries if entry.is_dir()), MOST_STEPS))

    def with_suffix(self, suffixes: tuple[str, ...]) -> list[Path]:
        """Return the files whose names end so, in either case."""
        return [entry for entry in self.entries if entry.suffix.lower() in suffixes and entry.is_file()]

    def artifact(self, kind: ArtifactKind, reason: str, **known: Any) -> Artifact:
        """Return the artifact of this path; its root is the path itself unless ``known`` names another."""
        return Artifact(kind, self.path, reason=reason, **({"root": self.path} | known))

    @cached_property
    def components(self) -> dict[str, Path]:
        """Component -> sub-folder of its name that holds its config."""
        return {name: self.path / name for name, config in CONFIGS.items() if (self.path / name / config).is_file()}


def _pipeline(place: _Place) -> Artifact | None:
    if not place.has(MODEL_INDEX):
        return None
    return place.artifact(ArtifactKind.PIPELINE, f"{MODEL_INDEX} is there", components=place.components)


def _export(place: _Place) -> Artifact | None:
    """A run has an export.json, too, its record of stage=export; only an export has components beside it."""
    if not (place.has(EXPORT_REPORT) and place.components):
        return None
    step = read_json_object(place.path / EXPORT_REPORT).get("step")
    reason = f"{EXPORT_REPORT} and {' and '.join(f'{name}/' for name in place.components)} are there"
    return place.artifact(ArtifactKind.EXPORT, reason, components=place.components, step=_whole(step))


def _checkpoint(place: _Place) -> Artifact | None:
    if (reason := _is_checkpoint(place.path)) is None:
        return None
    return place.artifact(
        ArtifactKind.CHECKPOINT,
        reason,
        components=place.components,
        step=_whole(read_json_object(place.path / TRAINER).get("step")),
        ema=(place.path / "ema").is_dir(),
    )


def _run_with_checkpoints(place: _Place) -> Artifact | None:
    folder = RunLayout(place.path).checkpoints
    if not folder.is_dir():
        return None
    found = {path for path in _Place(folder).folders if _is_checkpoint(path)} | set(step_folders(folder))
    if not found:
        return None
    newest_first = tuple(sorted(found, key=lambda path: (_step_of_checkpoint(path) or 0, path.name), reverse=True))
    return place.artifact(
        ArtifactKind.RUN,
        f"checkpoints/{newest_first[0].name} is there",
        step=_step_of_checkpoint(newest_first[0]),
        ema=(newest_first[0] / "ema").is_dir(),
        checkpoints=newest_first,
    )


def _run_without_checkpoints(place: _Place) -> Artifact | None:
    layout = RunLayout(place.path)
    samples = next((path for path in step_folders(layout.samples) if (path / SAMPLES_RECORD).is_file()), None)
    marks = (
        layout.pipeline / MODEL_INDEX,
        layout.export / EXPORT_REPORT,
        *([samples / SAMPLES_RECORD] if samples else []),
        layout.cache / "index.json",
        place.path / "metrics.jsonl",
    )
    mark = next((path for path in marks if path.is_file()), None)
    if mark is None:
        return None
    return place.artifact(ArtifactKind.RUN, f"{mark.relative_to(place.path)} is there, and no checkpoint")


def _step_files(place: _Place) -> Artifact | None:
    """A folder that SAT or DeepSpeed saved to, the folder of one of its steps, or SAT's folder as CogVideoX publishes
    it.
    """
    if place.has("latest"):
        return _step_folder(place, latest_step_folder(place.path), "latest is there")
    if states := next((entry.name for entry in place.entries if foreign.is_model_states(entry.name)), None):
        return _step_folder(place, place.path, f"{states} is there")
    if place.path.is_dir() and (place.path / "transformer" / "latest").is_file():
        note = f"{place.path} holds several components; its transformer is taken."
        return _step_folder(place, latest_step_folder(place.path / "transformer"), "transformer/latest is there", note)
    return None


def _only_step(place: _Place) -> Artifact | None:
    """A folder of step folders without ``latest``."""
    holding = [folder for folder in place.folders if any((folder / name).is_file() for name in FIRST_STATES)]
    steps = [folder for folder in holding if not folder.name.endswith(foreign.EMA_SUFFIX)]
    if not steps:
        return None
    if len(steps) > 1:
        names = ", ".join(path.name for path in steps[:12])
        raise CheckpointError(
            f"{place.path} has no file latest, and several steps: {names}.", f"Give the one you mean: {steps[-1]}"
        )
    note = f"{place.path} has no file latest; {steps[0].name} is the only step in it."
    return _step_folder(place, steps[0], f"{steps[0].name}/ holds model states", note)


def _step_folder(place: _Place, folder: Path, reason: str, *notes: str) -> Artifact:
    if not _holds_states(folder):
        raise foreign.no_states(folder)
    layout = foreign.layout_of(foreign.tensor_names(folder))
    kind = ArtifactKind.SAT_CHECKPOINT if layout in ("sat", "vae") else ArtifactKind.DEEPSPEED
    average = folder.with_name(folder.name.removesuffix(foreign.EMA_SUFFIX) + foreign.EMA_SUFFIX)
    whose = "SAT" if kind is ArtifactKind.SAT_CHECKPOINT else "DeepSpeed"
    return place.artifact(
        kind,
        f"{reason}, with tensors named as by {whose}" if layout else reason,
        root=folder,
        step=foreign.step_in({}, folder.name),
        ema=average.is_dir(),
        notes=notes,
    )


def _torch_file(place: _Place) -> Artifact | None:
    """A torch file, or the only one in a folder that holds no safetensors: beside those, ``optimizer.bin`` is no model.

    In a folder of videos or frames, torch files of other programs are passed over.
    """
    path = place.path
    if path.is_dir():
        files = place.with_suffix(foreign.TORCH_SUFFIXES)
        if len(files) != 1 or place.with_suffix((".safetensors",)):
            return None
        path = contained_file(path, files[0].name)
    elif path.suffix.lower() not in foreign.TORCH_SUFFIXES and not torch_file.is_torch_file(path):
        return None
    try:
        file = TorchFile(path)
        layout = foreign.layout_of(file.tensors)
        if layout not in ("sat", "vae"):
            raise foreign.unknown_names(path, file.tensors)
    except CheckpointError:
        if _videos(place) or _frames(place):
            return None
        raise
    inside = path != place.path
    return place.artifact(
        ArtifactKind.SAT_VAE if layout == "vae" else ArtifactKind.SAT_CHECKPOINT,
        f"{path.name + ' in it' if inside else 'it'} is a torch file with tensors named as by SAT",
        root=path,
        step=foreign.step_in(file.metadata, path.parent.name if foreign.is_model_states(path.name) else ""),
        ema=path.parent.name.endswith(foreign.EMA_SUFFIX),
        notes=(f"{path.name} is the only weights file in {place.path}.",) if inside else (),
    )


def _components(place: _Place) -> Artifact | None:
    if not place.components:
        return None
    names = " and ".join(f"{name}/{CONFIGS[name]}" for name in place.components)
    return place.artifact(ArtifactKind.COMPONENTS, f"it holds {names}", components=place.components)


def _component(place: _Place) -> Artifact | None:
    names = [name for name in ("tokenizer", "scheduler") if place.has(CONFIGS[name])]
    reason = f"{' and '.join(CONFIGS[name] for name in names)} is there"
    config = read_json_object(place.path / "config.json")
    weights = [entry for entry in place.entries if entry.name.endswith(WEIGHT_ENDINGS)]
    if place.has("config.json") and (weights or config.keys() & {"_class_name", "model_type", "architectures"}):
        class_name = str(config.get("_class_name") or config.get("model_type") or "unnamed class")
        # A class that is not known is examined as a transformer, whose reader says what is wrong with it.
        names = [COMPONENT_CLASSES.get(class_name, "transformer"), *names]
        reason = f"config.json of {class_name} is there"
    if not names:
        return None
    return place.artifact(ArtifactKind.COMPONENT, reason, components=dict.fromkeys(names, place.path))


def _videos(place: _Place) -> Artifact | None:
    if place.path.is_file():
        is_video = place.path.suffix.lower() in VIDEO_SUFFIXES
        return place.artifact(ArtifactKind.VIDEOS, "it is a video file") if is_video else None
    found = place.with_suffix(VIDEO_SUFFIXES)
    return place.artifact(ArtifactKind.VIDEOS, f"{found[0].name} is there") if found else None


def _frames(place: _Place) -> Artifact | None:
    found = [path for path in place.with_suffix(PICTURE_SUFFIXES) if path.name != CONTACT_SHEET]
    return place.artifact(ArtifactKind.FRAMES, f"{found[0].name} is there") if found else None


COMPONENT_CLASSES = {
    "CogVideoXTransformer3DModel": "transformer",
    "AutoencoderKLCogVideoX": "vae",
    "t5": "text_encoder",
}
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json")

FIRST_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Model states of the first rank, whole and sharded by ZeRO-3."""

PRECEDENCE: tuple[KindRule, ...] = (
    KindRule((ArtifactKind.PIPELINE,), MODEL_INDEX, _pipeline),
    KindRule((ArtifactKind.EXPORT,), f"{EXPORT_REPORT} beside a component folder such as transformer/", _export),
    KindRule((ArtifactKind.CHECKPOINT,), f"{TRAINER} and {MANIFEST}", _checkpoint),
    KindRule((ArtifactKind.RUN,), "checkpoints/ with a checkpoint in it", _run_with_checkpoints),
    KindRule(
        (ArtifactKind.SAT_CHECKPOINT, ArtifactKind.DEEPSPEED),
        f"latest, {' or '.join(FIRST_STATES)}",
        _step_files,
        reads_weights=True,
    ),
    KindRule((ArtifactKind.COMPONENTS,), "a component folder such as transformer/ with config.json", _components),
    KindRule((ArtifactKind.COMPONENT,), "config.json of a diffusers model", _component),
    KindRule((ArtifactKind.RUN,), "export/, pipeline/, samples/, cache/ or metrics.jsonl", _run_without_checkpoints),
    KindRule((ArtifactKind.SAT_CHECKPOINT, ArtifactKind.DEEPSPEED), "a step folder", _only_step, reads_weights=True),
    KindRule((ArtifactKind.SAT_CHECKPOINT, ArtifactKind.SAT_VAE), "a .pt file", _torch_file, reads_weights=True),
    KindRule((ArtifactKind.VIDEOS,), f"a video ({' '.join(VIDEO_SUFFIXES)})", _videos),
    KindRule((ArtifactKind.FRAMES,), f"a picture ({' '.join(PICTURE_SUFFIXES)})", _frames),
)
"""The rules, first match first. A pipeline stays a pipeline whatever else is put into its folder. Videos and pictures
decide only where no rule of models fits.
"""

IMPLIED: Mapping[ArtifactKind, tuple[ArtifactKind, ...]] = {
    ArtifactKind.PIPELINE: (ArtifactKind.COMPONENTS,),
    ArtifactKind.EXPORT: (ArtifactKind.COMPONENTS,),
    ArtifactKind.CHECKPOINT: (ArtifactKind.COMPONENTS,),
    ArtifactKind.VIDEOS: (ArtifactKind.FRAMES,),
}
"""Kinds that every artifact of a kind fits as well, which is no ambiguity."""

EXPECTED = (
    f"Expected is one of: a run; a checkpoint ({TRAINER}); a pipeline ({MODEL_INDEX}); an export ({EXPORT_REPORT}); "
    "a component (config.json and safetensors); a SAT folder (latest), its step folder or .pt file; 3d-vae.pt; "
    "a DeepSpeed folder; videos or frames."
)


def _is_checkpoint(folder: Path) -> str | None:
    """Return why a folder is a checkpoint: its trainer.json, or a manifest that lists one."""
    if (folder / TRAINER).is_file():
        return f"{TRAINER} is there"
    files = read_json_object(folder / MANIFEST).get("files")
    return f"{MANIFEST} lists {TRAINER}" if isinstance(files, dict) and TRAINER in files else None


def _step_of_checkpoint(folder: Path) -> int | None:
    """Return the step that a checkpoint's trainer.json states, else the one in its name."""
    step = _whole(read_json_object(folder / TRAINER).get("step"))
    return parse_step(folder.name) if step is None else step


def _holds_states(folder: Path) -> bool:
    return any(foreign.is_model_states(path.name) for path in islice(folder.iterdir(), MOST_ENTRIES))


def _not_of_kind(place: _Place, named: str, kind: ArtifactKind, key: str) -> CheckpointError:
    needs = " or ".join(rule.needs for rule in PRECEDENCE if kind in rule.kinds)
    try:
        found = identify(place.path)
    except CheckpointError:
        hint = "Give another path."
    else:
        hint = f"By its content it is {found.kind.label} ({found.reason}): {key}_kind={found.kind.value}."
    return CheckpointError(f"{named} is not {kind.label}: {needs} is missing.", hint)


def _unknown(place: _Place, named: str) -> CheckpointError:
    if place.path.is_file():
        return _unknown_file(place.path, named)
    if weights := [entry.name for entry in place.entries if entry.name.endswith(WEIGHT_ENDINGS)]:
        return CheckpointError(
            f"{named} holds {weights[0]} without the config.json that says what it is.",
            "Copy the component's config.json beside it.",
        )
    names = [path.name + "/" * path.is_dir() for path in place.entries[:12]]
    return CheckpointError(
        f"{named} is nothing that cogflow knows. It holds {', '.join(names) or 'nothing'}.", EXPECTED
    )


def _unknown_file(path: Path, named: str) -> CheckpointError:
    if path.suffix == ".safetensors":
        return CheckpointError(
            f"{named} is one file of a folder.", "Give the folder, with config.json and all safetensors in it."
        )
    with open_regular(path) as file:
        start = file.read(64)
    what = torch_file.describe_first_bytes(start) if start else "it is empty."
    return CheckpointError(f"{named} is a file that cogflow does not know: {what}", EXPECTED)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
