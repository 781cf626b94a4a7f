"""Read the five components of a CogVideoX pipeline, check each by itself, and override values of its config.

Weights are not loaded: only the headers of safetensors files are read.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers

from cogflow.artifacts.run_layout import ASSEMBLY, EXPORT_REPORT
from cogflow.config.problems import did_you_mean, format_value, nearest
from cogflow.errors import CogflowError, ConfigError, PipelineError
from cogflow.files.publish import MANIFEST, check_manifest
from cogflow.files.record_io import read_record
from cogflow.models.code_check import CONFIGS, code_in
from cogflow.records.pipeline_records import AssemblyRecord, ExportedTransformer, TransformerOrigin
from cogflow.weights.tensor_source import STEM, WeightsFolder, contained_file, read_json

CLASSES = {
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "scheduler": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
}
"""Component -> classes of diffusers and transformers that it may have."""

STEMS = {"transformer": STEM, "vae": STEM, "text_encoder": "model"}
"""Component with weights -> stem of its safetensors files in diffusers and transformers."""

WEIGHTS_SUFFIX = ".safetensors"
COMPONENT_SUFFIXES = (".json", ".txt", ".model", WEIGHTS_SUFFIX)
"""Suffixes of the files that belong to a component: configs, vocabularies, weights."""


@dataclass(frozen=True)
class PipelineComponent:
    """One component of a pipeline.

    * ``settings``: its config file, completed with the defaults of its class; ``defaulted`` names the completed keys.
    * ``class_name``: its class; empty when the component cannot be used.
    * ``files``: name -> path of each file that belongs to it.
    * ``training``: how a transformer was trained, from ``training_file`` (export.json or assembly.json).
    * ``overrides``: key -> (value of the file, value set by the user).
    """

    name: str
    folder: Path
    class_name: str
    settings: dict[str, Any]
    defaulted: frozenset[str] = frozenset()
    files: dict[str, Path] = field(default_factory=dict)
    training: TransformerOrigin = field(default_factory=TransformerOrigin)
    training_file: Path | None = None
    overrides: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def source_of(self, key: str) -> str:
        """Return where the value of ``key`` comes from, for messages."""
        if key in self.overrides:
            return f"stage.set.{self.name}.{key}"
        file = str(self.folder / CONFIGS[self.name])
        return f"{file} does not set it: the default of its class" if key in self.defaulted else file

    def config_text(self) -> str:
        """Return the text of the component's config file with the overrides applied."""
        config = read_json(self.folder / CONFIGS[self.name])
        values = {key: value for key, (_, value) in self.overrides.items()}
        return json.dumps(config | values, indent=2, ensure_ascii=False) + "\n"

    @property
    def from_image(self) -> bool:
        """True when the transformer takes an image's latents besides the noise (image to video)."""
        return bool(self.settings.get("in_channels") != self.settings.get("out_channels"))


def read_component(name: str, place: Path, *, hashes: bool = True) -> tuple[PipelineComponent, list[str]]:
    """Return component ``name`` of ``place`` and its problems: code, another class, pickled weights, files outside its
    folder.

    ``place`` is a pipeline folder, an export folder, or the component's own folder. ``hashes``: also compare an
    export's files with its manifest, which reads them completely. Raises :class:`PipelineError` when ``place`` has no
    such component.
    """
    folder = component_folder(name, place)
    try:
        config = read_json(folder / CONFIGS[name])
    except CogflowError as error:
        return PipelineComponent(name, folder, "", {}), [f"{name}: {error.message}"]
    problems = [f"{name}: {problem}" for problem in code_in(folder, config)]
    class_name = _class_name(name, config)
    if class_name not in CLASSES[name]:
        problems.append(f"{name}: {folder} is of class {class_name!r}, not {' or '.join(CLASSES[name])}")
        return PipelineComponent(name, folder, str(class_name), config), problems
    files, file_problems = _files(name, folder)
    if hashes:
        file_problems += _changed_since_export(name, folder)
    settings, defaulted = _complete(class_name, config)
    training, training_file = _training(name, folder)
    component = PipelineComponent(
        name=name,
        folder=folder,
        class_name=str(class_name),
        settings=settings,
        defaulted=defaulted,
        files=files,
        training=training,
        training_file=training_file,
    )
    return component, problems + file_problems


def component_folder(name: str, place: Path) -> Path:
    """Return the folder of component ``name`` in ``place``. Raises :class:`PipelineError` when there is none."""
    place = Path(place).expanduser()
    for folder in (place / name, place):
        if (folder / CONFIGS[name]).is_file():
            return folder
    raise PipelineError(
        f"stage.{name}: {place} has no {name}: neither {name}/{CONFIGS[name]} nor {CONFIGS[name]} is there.",
        "Name a component folder, or a pipeline folder that contains one.",
    )


def _class_name(name: str, config: dict[str, Any]) -> Any:
    if name == "text_encoder":
        # Official folders name T5EncoderModel; a complete T5 loads its encoder from the same file.
        architectures = config.get("architectures") or [None]
        return "T5EncoderModel" if config.get("model_type") == "t5" and len(architectures) == 1 else architectures
    return config.get("tokenizer_class" if name == "tokenizer" else "_class_name")


def _files(name: str, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the component's files by name, and the problems of those that cannot be used."""
    files: dict[str, Path] = {}
    problems: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in COMPONENT_SUFFIXES or path.name == MANIFEST or path.name.startswith("."):
            continue
        try:
            files[path.name] = contained_file(folder, path.name).resolve(strict=True)
        except (CogflowError, OSError) as error:
            problems.append(f"{name}: {error}")
    if name in STEMS and not problems:
        try:
            WeightsFolder(folder, STEMS[name])
        except CogflowError as error:
            problems.append(f"{name}: {error.message} {error.hint}".rstrip())
    return files, problems


def _complete(class_name: str, config: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return ``config`` with the defaults that diffusers uses for missing keys, and those keys.

    A default may be the value of another model: ``scaling_factor`` of the VAE is that of CogVideoX-2B. Tuples become
    lists, as in a config file.
    """
    cls = getattr(diffusers, class_name, None)
    if cls is None:
        return config, frozenset()
    defaults = {
        key: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | config, frozenset(defaults.keys() - config.keys())


def _changed_since_export(name: str, folder: Path) -> list[str]:
    """Return a problem for each file that differs from its export's manifest: export.json does not describe such a
    file.
    """
    export = folder.parent
    if name != "transformer" or not ((export / EXPORT_REPORT).is_file() and (export / MANIFEST).is_file()):
        return []
    return [f"transformer: {export} was changed after the export: {problem}" for problem in check_manifest(export)]


def _training(name: str, folder: Path) -> tuple[TransformerOrigin, Path | None]:
    """Return how a transformer was trained, from the export.json or assembly.json beside it, and the file's path."""
    export, assembly = folder.parent / EXPORT_REPORT, folder.parent / ASSEMBLY
    if name == "transformer" and export.is_file():
        return read_record(export, ExportedTransformer), export
    if name == "transformer" and assembly.is_file():
        return read_record(assembly, AssemblyRecord).made, assembly
    return TransformerOrigin(), None


def override_settings(
    components: Mapping[str, PipelineComponent], values: Mapping[str, Mapping[str, Any]]
) -> dict[str, PipelineComponent]:
    """Return ``components`` with ``values`` (component -> key -> value) set in their settings. Source files stay
    unchanged.

    Raises :class:`ConfigError` that names every unknown key and every value of another type.
    """
    problems: list[str] = []
    changed = dict(components)
    for name, chosen in values.items():
        component = components.get(name)
        if component is None or not component.class_name:
            continue  # its own problem is reported already
        overrides, found = _overrides(component, chosen)
        problems += found
        settings = component.settings | {key: value for key, (_, value) in overrides.items()}
        defaulted = component.defaulted - overrides.keys()
        changed[name] = replace(component, settings=settings, defaulted=defaulted, overrides=overrides)
    if problems:
        raise ConfigError(
            "\n".join(problems),
            "The settings of a component are the keys of its config file and the options of its class.",
        )
    return changed


def _overrides(component: PipelineComponent, chosen: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Return key -> (old value, new value) of the valid ``chosen`` values, and a problem for each of the others."""
    known = [key for key in component.settings if not key.startswith("_")]
    overrides: dict[str, tuple[Any, Any]] = {}
    problems: list[str] = []
    for key, value in chosen.items():
        option = f"stage.set.{component.name}.{key}={format_value(value)}"
        if key not in known:
            problems.append(f"{option}: {component.class_name} has no such setting.{did_you_mean(nearest(key, known))}")
            continue
        old = component.settings[key]
        if not _same_type(value, old):
            problems.append(f"{option}: its value is {format_value(old)} now, and the new value is of another type.")
            continue
        overrides[key] = (old, float(value) if isinstance(old, float) and isinstance(value, int) else value)
    return overrides, problems


def _same_type(value: Any, old: Any) -> bool:
    """Return whether ``value`` may replace ``old``: both numbers, bools, texts or lists; null replaces and is replaced
    by any.
    """
    if old is None or value is None:
        return True
    if isinstance(old, bool) or isinstance(value, bool):
        return isinstance(old, bool) and isinstance(value, bool)
    if isinstance(old, int | float):
        fraction = isinstance(old, int) and isinstance(value, float) and not value.is_integer()
        return isinstance(value, int | float) and not fraction
    if isinstance(old, list | tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, type(old))
