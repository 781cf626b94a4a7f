"""Plain dicts to the dataclasses of the schema: every key must be known and every value of its kind."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from cogflow.config.problems import Problem, did_you_mean, fail, nearest, nearest_key
from cogflow.config.schema import STAGES, AnyConfig, Config
from cogflow.errors import ConfigError

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def build(raw: Mapping[str, Any]) -> AnyConfig:
    """The config of a plain dict as the yaml files give it. Raises one :class:`ConfigError` with everything that does not fit."""
    config, problems = construct(raw)
    fail(problems)
    if config is None:
        raise ConfigError(no_stage().text)
    return config


def construct(raw: Mapping[str, Any]) -> tuple[AnyConfig | None, list[Problem]]:
    """The config with every bad value left at its default, and what was bad. ``None`` when no stage is known."""
    problems: list[Problem] = []
    known = known_keys(stage_class(raw.get("stage")))
    values: dict[str, Any] = {}
    for name, kind in section_names().items():
        values[name] = _section(kind, raw.get(name), name, known, problems)
    for name in sorted(set(raw) - set(values) - {"stage"}):
        problems.append(Problem(f"{name}: no such section.{did_you_mean(nearest(name, [*values, 'stage']))}", (name,)))
    stage = stage_class(raw.get("stage"))
    if stage is None:
        problems.append(no_stage(raw.get("stage")))
        return None, problems
    return Config(stage=_section(stage, raw["stage"], "stage", known, problems), **values), problems


def stage_class(raw: Any) -> type | None:
    """The dataclass of the stage that ``raw["name"]`` names."""
    name = raw.get("name") if isinstance(raw, Mapping) else None
    return STAGES.get(name) if isinstance(name, str) else None


def no_stage(raw: Any = None) -> Problem:
    name = raw.get("name") if isinstance(raw, Mapping) else None
    if name is None:
        return Problem(f"stage=NAME is missing: one of {', '.join(STAGES)}.", ("stage",))
    return Problem(
        f"stage={name}: no such stage; one of {', '.join(STAGES)}.{did_you_mean(nearest(str(name), STAGES))}",
        ("stage",),
    )


def known_keys(stage: type | None) -> list[str]:
    """Every dotted key there is when ``stage`` runs, without the names that the groups choose."""
    keys = [key for name, kind in section_names().items() for key in keys_of(kind, name)]
    return keys + (keys_of(stage, "stage") if stage else [])


def keys_of(kind: type, prefix: str) -> list[str]:
    """Dotted keys below a dataclass, nested ones included."""
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        keys += keys_of(hint, f"{prefix}.{name}") if _is_section(hint) else [f"{prefix}.{name}"]
    return keys


def is_open(key: str, stage: type | None) -> bool:
    """Whether ``key`` lies below one that takes any names, such as ``stage.set``."""
    return any(key.startswith(f"{name}.") for name in (open_keys(stage, "stage") if stage else []))


def open_keys(kind: type, prefix: str) -> list[str]:
    """Dotted keys below a dataclass whose values are mappings of names that the schema does not know."""
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        if _is_section(hint):
            keys += open_keys(hint, f"{prefix}.{name}")
        elif typing.get_origin(hint) is dict:
            keys.append(f"{prefix}.{name}")
    return keys


def section_names(kind: type = Config) -> dict[str, type]:
    """The dataclasses nested in one, by field name; of ``Config`` all but the stage."""
    return {name: hint for name, hint in typing.get_type_hints(kind).items() if _is_section(hint)}


def _is_section(hint: Any) -> typing.TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _section(kind: type, raw: Any, path: str, known: list[str], problems: list[Problem]) -> Any:
    """An instance of the dataclass ``kind`` from a mapping; ``raw`` may be ``None`` for all defaults."""
    if raw is None:
        return kind()
    if not isinstance(raw, Mapping):
        problems.append(
            Problem(f"{path}={raw}: it is a section, set its keys: {', '.join(keys_of(kind, path))}.", (path,))
        )
        return kind()
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in raw.items():
        key = f"{path}.{name}"
        if name not in hints:
            problems.append(unknown(key, value, known))
        elif _is_section(hints[name]):
            values[name] = _section(hints[name], value, key, known, problems)
        elif name == "name" and path.startswith("stage") and value != (default := kind().name):
            problems.append(
                Problem(
                    f"{key}={show(value)}: it is {default} here; choose another stage with stage={show(value)}.", (key,)
                )
            )
        else:
            try:
                values[name] = convert(value, hints[name])
            except ValueError as error:
                problems.append(Problem(f"{key}={show(value)}: {error}", (key,)))
    return kind(**values)


def unknown(key: str, value: Any, known: list[str]) -> Problem:
    return Problem(f"{key}={show(value)}: no such key.{did_you_mean(nearest_key(key, known))}", (key,))


def show(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(show, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{show(item)}" for name, item in value.items()) + "}"
    return str(value)


def convert(value: Any, hint: Any) -> Any:
    """``value`` as the kind that ``hint`` names. Raises ``ValueError`` saying what would be right.

    Whole floats pass as integers (5e8), integers as floats and as text (``run.name=2024``); nothing else changes its kind.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        (inner,) = (item for item in typing.get_args(hint) if item is not type(None))
        try:
            return convert(value, inner)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}, or null.") from None
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            raise ValueError(f"it should be a list, as [{show(value)}].")
        return [convert(item, inner) for item in value]
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ValueError("its keys are given one by one, such as stage.set.vae.scaling_factor=0.7.")
        return {str(name): convert(item, typing.get_args(hint)[1]) for name, item in value.items()}
    if hint is Any:
        return value
    if isinstance(value, bool):
        if hint is bool:
            return value
    elif isinstance(value, int):
        if hint in (int, float, str):
            return hint(value)
    elif isinstance(value, float):
        if hint is float:
            return value
        if hint is int and value.is_integer():
            return int(value)
    elif isinstance(value, str) and hint is str:
        return value
    raise ValueError(f"it should be {KINDS[hint]}.")


def as_yaml(config: AnyConfig) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
