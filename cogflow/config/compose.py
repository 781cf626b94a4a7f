"""Turn the words of a command line into a checked config.

Hydra composes the groups of ``configs/``. The values of keys are applied here, so that every key is looked up among
the known ones and a mistake can be answered with the name that was meant. All problems of a command line are reported
together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cogflow
from cogflow.config.build import (
    construct,
    find_problems,
    is_open,
    keys_of,
    known_keys,
    section_names,
    stage_class,
    text_keys,
    unknown_key,
)
from cogflow.config.config import STAGES, AnyConfig
from cogflow.config.diagnose_settings import FlowStage
from cogflow.config.problems import Problem, did_you_mean, fail, format_value, nearest
from cogflow.config.sat_import import CommandLine, imported_values, keys_of_named_groups, take_import
from cogflow.errors import ConfigError
from cogflow.files.secrets import environment_secrets_in

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OPTIONAL_GROUPS = ("local", "experiment", "debug")
GROUPS_WITHOUT_KEYS = (*OPTIONAL_GROUPS, "recipe")
HELP = "python -m cogflow stage=NAME --help lists every key with its default and meaning."


def configs_folder() -> Path:
    """Return ``configs/`` inside the installed package, else beside it in a checkout.

    Raises :class:`ConfigError` if there is neither.
    """
    package = Path(cogflow.__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"configs/config.yaml is missing in {package} and in {package.parent}.", "Install cogflow again.")


def groups() -> dict[str, list[str]]:
    """Return the choices of each group, sorted."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(configs_folder().iterdir())
        if folder.is_dir()
    }


@dataclass(frozen=True)
class ComposedCommand:
    """The checked config of a command line.

    ``given``: keys that its words set. ``named``: these, and the keys that an imported recipe or a chosen group sets
    (``experiment``, ``debug``, ...).
    """

    config: AnyConfig
    given: frozenset[str]
    named: frozenset[str]


def compose(overrides: Sequence[str]) -> AnyConfig:
    """Return the checked config of a command line's ``group=choice`` and ``key=value`` words.

    Raises one :class:`ConfigError` that lists everything that is wrong with it.
    """
    return compose_command(overrides).config


def compose_command(overrides: Sequence[str]) -> ComposedCommand:
    """Return the checked config of a command line, and which keys it sets. Raises as :func:`compose`."""
    problems: list[Problem] = []
    words: dict[str, str] = {}
    choices, values = _split(overrides, words, problems)
    recipe = take_import(choices, values, problems)
    raw = _compose_groups(choices, problems)
    raw = _place_stages(raw, problems)
    command = CommandLine(choices, values, configs_folder())
    imported: list[str] = []
    if recipe is not None:
        for key, value in imported_values(recipe, raw, command, problems):
            _put(raw, key, value)
            imported.append(key)
    stage = stage_class(raw.get("stage"))
    known = known_keys(stage)
    for key, value in _keep_text(values, words, stage):
        if key == "stage.name":
            problems.append(
                Problem(f"stage.name={format_value(value)}: choose a stage with stage={format_value(value)}.", (key,))
            )
        elif key in known or is_open(key, stage):
            _put(raw, key, value)
        elif "stage" in raw or not key.startswith("stage."):  # without a stage its keys cannot be checked
            problems.append(_unknown(key, value, known))
    config, more = construct(_resolve(raw, problems))
    reported = {key for problem in problems for key in problem.keys}
    problems += [problem for problem in more if problem.keys != ("stage",) or "stage" not in reported]
    if config is not None:
        bad = {key for problem in problems for key in problem.keys}
        problems += [problem for problem in find_problems(config) if not bad & set(problem.keys)]
    problems += [
        Problem(f"{key}: it contains the value of {variable}, which would be written into files.", (key,))
        for key, variable in ([] if config is None else environment_secrets_in(dataclasses.asdict(config)))
    ]
    fail(problems, HELP)
    assert config is not None  # a missing stage is among the problems
    given = frozenset(key for key, _ in values)
    return ComposedCommand(config, given, given | set(imported) | keys_of_named_groups(command).keys())


def _keep_text(
    values: Sequence[tuple[str, Any]], words: Mapping[str, str], stage: type | None
) -> Iterator[tuple[str, Any]]:
    """Yield the values of keys, with the word as it was typed where a key takes text: ``run.name=1e5`` is no number."""
    texts = set().union(*(text_keys(kind, name) for name, kind in section_names().items()))
    if stage is not None:
        texts |= text_keys(stage, "stage")
    for key, value in values:
        yield key, words[key] if key in texts and isinstance(value, bool | int | float) else value


def _split(
    words: Sequence[str], typed: dict[str, str], problems: list[Problem]
) -> tuple[dict[str, str], list[tuple[str, Any]]]:
    """Return the choices of groups and the values of keys. Words that are neither become problems.

    ``typed``: filled with the text behind the equals sign by key.
    """
    choices: dict[str, str] = {}
    values: list[tuple[str, Any]] = []
    available = groups()
    for word in words:
        override = _parse(word, problems)
        if override is None:
            continue
        key = override.key_or_group
        if key in available:
            _choose(key, override, available[key], choices, problems)
        elif "." not in key and key in section_names():
            keys = ", ".join(keys_of(section_names()[key], key))
            problems.append(Problem(f"{word}: {key} is a section, set its keys: {keys}.", (key,)))
        elif "." not in key and (near := nearest(key, available, cutoff=0.7)):
            problems.append(Problem(f"{word}: no such group.{did_you_mean(near)}", (key, near)))
        else:
            values.append((key, override.value()))
            typed[key] = word.partition("=")[2].strip()
    return choices, values


def _parse(word: str, problems: list[Problem]) -> Override | None:
    """Return one word as Hydra parses it; ``None`` and a problem if it is not one choice or one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        if "/" in override.key_or_group or override.package is not None:
            raise ValueError("a group takes no path or package; write group=choice.")
        if override.is_delete():
            raise ValueError("keys cannot be deleted; set another value, or group=null.")
        if override.is_sweep_override():
            raise ValueError("give one value; write a list as [1,2], and a text with a comma in 'quotes'.")
        return override
    except ValueError as error:
        problems.append(Problem(f"{word}: {error}"))
    except HydraException as error:
        near = nearest(word, STAGES) if "=" not in word else None
        meant = (
            f" Did you mean stage={near}?"
            if near
            else " It should be key=value or group=choice; quote special characters: key='a,b'."
        )
        reason = "" if near else f" ({_first(error).split(' expecting')[0]})"
        problems.append(Problem(f"{word}: not understood{reason}.{meant}"))
    return None


def _choose(group: str, override: Override, known: list[str], choices: dict[str, str], problems: list[Problem]) -> None:
    choice = format_value(override.value())
    if choice == "null" and group in OPTIONAL_GROUPS or choice in known:
        if choices.get(group, choice) != choice:
            problems.append(
                Problem(f"{group}={choice}: it is also chosen as {group}={choices[group]}; give one.", (group,))
            )
        choices.setdefault(group, choice)
    else:
        near = did_you_mean(nearest(choice, known))
        problems.append(
            Problem(f"{group}={choice}: no such choice; one of {', '.join(known) or 'none yet'}.{near}", (group,))
        )


def _compose_groups(choices: Mapping[str, str], problems: list[Problem]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs_folder()), version_base=None):
            config = hydra_compose("config", [f"{group}={choice}" for group, choice in choices.items()])
        container = OmegaConf.to_container(config)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        fail([*problems, Problem(f"{configs_folder()} cannot be composed: {error}")], HELP)
        raise
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _place_stages(raw: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Move the settings under ``stages.<name>`` of the yaml files to the stage that runs, alone or inside flow."""
    placed = {**raw}
    by_name = placed.pop("stages", None) or {}
    stage = stage_class(raw.get("stage"))
    for name, settings in by_name.items():
        if name not in STAGES:
            problems.append(Problem(f"stages.{name}: no such stage.{did_you_mean(nearest(name, STAGES))}"))
            continue
        known = keys_of(STAGES[name], "stage")
        wrong = [key for key in settings if f"stage.{key}" not in known]
        problems += [unknown_key(f"stages.{name}.{key}", settings[key], known) for key in wrong]
        for key in settings.keys() - set(wrong):
            if stage is STAGES[name]:
                _put(placed, f"stage.{key}", settings[key])
            elif stage is FlowStage and name in section_names(FlowStage):
                _put(placed, f"stage.{name}.{key}", settings[key])
    return placed


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Missing sections are created."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(raw.get(part), dict):
            raw[part] = {}
        raw = raw[part]
    raw[last] = value


def _unknown(key: str, value: Any, known: list[str]) -> Problem:
    if key.split(".")[0] in GROUPS_WITHOUT_KEYS:
        return Problem(
            f"{key}={format_value(value)}: {key.split('.')[0]} is a group, it has no keys; set the key that it "
            "would set.",
            (key,),
        )
    return unknown_key(key, value, known)


def _resolve(raw: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Return ``raw`` with all ``${...}`` replaced by their values. Raises :class:`ConfigError` for one without a
    value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        container = OmegaConf.to_container(OmegaConf.create(raw), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or "a value"
        fail([*problems, Problem(f"{key}: {_first(error)}. Give it a value.", (key,))], HELP)
        raise
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
