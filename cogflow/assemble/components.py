"""The five components of a CogVideoX pipeline: where each lies, what it is, and which of its files belong to it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers

from cogflow.errors import CogflowError, PipelineError
from cogflow.files.manifest import MANIFEST, check_manifest
from cogflow.models.code_check import CONFIGS, code_in
from cogflow.weights.tensor_source import STEM, WeightsFolder, contained_file, read_json

CLASSES = {
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "scheduler": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
}
WEIGHTS = ".safetensors"
KEPT = (".json", ".txt", ".model", WEIGHTS)
MADE = (
    "source",
    "step",
    "weights",
    "family",
    "model",
    "trained_with",
    "facts",
    "dtype",
    "source_weights_sha256",
    "weights_sha256",
)
"""Keys of an export's report that its pipeline passes on."""
STEMS = {"transformer": STEM, "vae": STEM, "text_encoder": "model"}
"""Component with weights -> how its safetensors are called, in diffusers and in transformers."""


@dataclass(frozen=True)
class PipelineComponent:
    """One component. ``settings``: its config with diffusers' defaults for what it leaves out, which are named in ``unset``.

    ``files``: relative name -> path. ``made``: what export.json or assembly.json says of how a transformer was trained, ``told_by``: that
    file. ``set``: values that were given on the way: key -> (before, now).
    """

    name: str
    folder: Path
    class_name: str
    settings: dict[str, Any]
    unset: frozenset[str] = frozenset()
    files: dict[str, Path] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    told_by: Path | None = None
    set: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def shown(self, key: str) -> str:
        """``key`` and its value, for messages."""
        default = ", the class's default, which the file leaves unset" if key in self.unset else ""
        return f"{self.name}'s {key} is {self.settings.get(key)}{default}"

    def said(self, key: str) -> str:
        """Where the value of ``key`` comes from, for messages."""
        if key in self.set:
            return f"stage.set.{self.name}.{key}"
        file = str(self.folder / CONFIGS[self.name])
        return f"{file} leaves it unset: the class's default" if key in self.unset else file


def locate(name: str, place: Path) -> Path:
    """The folder of component ``name`` in ``place``: a pipeline or export folder, or the component's own folder."""
    place = Path(place).expanduser()
    for folder in (place / name, place):
        if (folder / CONFIGS[name]).is_file():
            return folder
    raise PipelineError(
        f"stage.{name}: {place} holds no {name}: neither {name}/{CONFIGS[name]} nor {CONFIGS[name]} is there.",
        "Name a component folder, or a pipeline folder that has it.",
    )


def read_part(name: str, place: Path, *, hashes: bool = True) -> tuple[PipelineComponent, list[str]]:
    """The component and what is wrong with it by itself: code, another class, pickled weights, files that lead outside.

    ``hashes``: hold an export's files against its manifest, too, which reads them all.
    """
    folder = locate(name, place)
    try:
        config = read_json(folder / CONFIGS[name])
    except CogflowError as error:
        return PipelineComponent(name, folder, "", {}), [f"{name}: {error.message}"]
    problems = [f"{name}: {problem}" for problem in code_in(folder, config)]
    class_name = _class_name(name, config)
    if class_name not in CLASSES[name]:
        problems.append(f"{name}: {folder} is of class {class_name!r}, not {' or '.join(CLASSES[name])}")
        return PipelineComponent(name, folder, str(class_name), config), problems
    files, refused = _files(name, folder)
    refused += _altered(name, folder) if hashes else []
    settings, unset = _settings(class_name, config)
    made, told_by = _made(name, folder)
    return PipelineComponent(name, folder, str(class_name), settings, unset, files, made, told_by), problems + refused


def _class_name(name: str, config: dict[str, Any]) -> Any:
    if name == "text_encoder":
        # Official folders name T5EncoderModel; a whole T5 loads its encoder from the same file.
        architectures = config.get("architectures") or [None]
        return "T5EncoderModel" if config.get("model_type") == "t5" and len(architectures) == 1 else architectures
    return config.get("tokenizer_class" if name == "tokenizer" else "_class_name")


def _files(name: str, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """What is taken along: configs, vocabularies and safetensors that lie in the folder itself."""
    files, problems = {}, []
    for path in sorted(folder.iterdir()):
        if path.suffix not in KEPT or path.name == MANIFEST or path.name.startswith("."):
            continue
        try:
            files[path.name] = contained_file(folder, path.name).resolve(strict=True)
        except (CogflowError, OSError) as error:
            problems.append(f"{name}: {error}")
    if name in STEMS and not problems:
        problems += _weights(name, folder)
    return files, problems


def _weights(name: str, folder: Path) -> list[str]:
    """Weights must be there as whole safetensors in the folder itself; only their headers are read."""
    try:
        WeightsFolder(folder, STEMS[name])
    except CogflowError as error:
        return [f"{name}: {error.message} {error.hint}".rstrip()]
    return []


def _settings(class_name: str, config: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """What diffusers will use: a value that the file leaves out is the class's default, which is another model's at times."""
    cls = getattr(diffusers, class_name, None)
    if cls is None:
        return config, frozenset()
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | config, frozenset(defaults.keys() - config.keys())


def _altered(name: str, folder: Path) -> list[str]:
    """An export must be as it was published, or what it says of its weights proves nothing."""
    export = folder.parent
    if name != "transformer" or not ((export / "export.json").is_file() and (export / MANIFEST).is_file()):
        return []
    return [f"transformer: {export} is not as it was exported: {problem}" for problem in check_manifest(export)]


def _made(name: str, folder: Path) -> tuple[dict[str, Any], Path | None]:
    """What is known of the training of a transformer, and where it stands: export.json beside it, or the assembly.json of an earlier
    pipeline."""
    for file in (folder.parent / "export.json", folder.parent / "assembly.json"):
        if name == "transformer" and file.is_file():
            report = read_json(file)
            report = report if file.name == "export.json" else report.get("made") or {}
            return {key: report[key] for key in MADE if report.get(key) is not None}, file
    return {}, None
