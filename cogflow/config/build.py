"""Build a :class:`Config` from plain dicts: look up every key, convert every value, and check all rules."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from cogflow.config.config import CROSS_CHECKS, STAGES, AnyConfig, Config
from cogflow.config.problems import Problem, did_you_mean, fail, format_value, nearest, nearest_key
from cogflow.config.setting import rule_of
from cogflow.errors import ConfigError

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def build(raw: Mapping[str, Any]) -> AnyConfig:
    """Return the config that a plain dict describes, with the types checked.

    Raises one :class:`ConfigError` that lists all unknown keys and wrong types. Ranges are checked by :func:`check`.
    """
    config, problems = construct(raw)
    fail(problems)
    if config is None:
        raise ConfigError(missing_stage().text)
    return config


def check(config: AnyConfig) -> None:
    """Raise one :class:`ConfigError` that lists every value out of range and every contradiction."""
    fail(find_problems(config))


def construct(raw: Mapping[str, Any]) -> tuple[AnyConfig | None, list[Problem]]:
    """Return the config with wrong values left at their defaults, and the problems. No config without a known stage."""
    problems: list[Problem] = []
    stage = stage_class(raw.get("stage"))
    known = known_keys(stage)
    sections = {
        name: _build_section(kind, raw.get(name), name, known, problems) for name, kind in section_names().items()
    }
    for name in sorted(set(raw) - set(sections) - {"stage"}):
        problems.append(
            Problem(f"{name}: no such section.{did_you_mean(nearest(name, [*sections, 'stage']))}", (name,))
        )
    if stage is None:
        problems.append(missing_stage(raw.get("stage")))
        return None, problems
    return Config(stage=_build_section(stage, raw["stage"], "stage", known, problems), **sections), problems


def find_problems(config: AnyConfig) -> list[Problem]:
    """Return every value that breaks its rule, and every contradiction between values that do not."""
    problems = [
        problem
        for field in dataclasses.fields(config)
        for problem in _rule_problems(getattr(config, field.name), field.name)
    ]
    bad = {key for problem in problems for key in problem.keys}
    return problems + [
        problem for cross_check in CROSS_CHECKS for problem in cross_check(config) if not bad & set(problem.keys)
    ]


def _rule_problems(values: Any, path: str) -> Iterator[Problem]:
    """Yield the problems of a section's own values, nested sections included."""
    for field in dataclasses.fields(values):
        value, key, rule = getattr(values, field.name), f"{path}.{field.name}", rule_of(field)
        if dataclasses.is_dataclass(value):
            yield from _rule_problems(value, key)
            continue
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield Problem(f"{key}={format_value(value)}: it should be finite.", (key,))
        elif rule is not None and (wrong := rule.problem(value)):
            yield Problem(f"{key}={format_value(value)}: {wrong}", (key,))


def stage_class(raw: Any) -> type | None:
    """Return the settings class of the stage that ``raw["name"]`` names, or ``None``."""
    name = raw.get("name") if isinstance(raw, Mapping) else None
    return STAGES.get(name) if isinstance(name, str) else None


def missing_stage(raw: Any = None) -> Problem:
    """Return the problem of a command without a stage, or with the unknown one that ``raw["name"]`` names."""
    name = raw.get("name") if isinstance(raw, Mapping) else None
    if name is None:
        return Problem(f"stage=NAME is missing: one of {', '.join(STAGES)}.", ("stage",))
    return Problem(
        f"stage={name}: no such stage; one of {', '.join(STAGES)}.{did_you_mean(nearest(str(name), STAGES))}",
        ("stage",),
    )


def unknown_key(key: str, value: Any, known: list[str]) -> Problem:
    """Return the problem of a key that does not exist."""
    return Problem(f"{key}={format_value(value)}: no such key.{did_you_mean(nearest_key(key, known))}", (key,))


def known_keys(stage: type | None) -> list[str]:
    """Return every dotted key of the sections and of ``stage``."""
    keys = [key for name, kind in section_names().items() for key in keys_of(kind, name)]
    return keys + (keys_of(stage, "stage") if stage else [])


def keys_of(kind: type, prefix: str) -> list[str]:
    """Return the dotted keys of a settings class, nested sections included."""
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        keys += keys_of(hint, f"{prefix}.{name}") if _is_section(hint) else [f"{prefix}.{name}"]
    return keys


def is_open(key: str, stage: type | None) -> bool:
    """Return whether ``key`` is below a key that takes any names, such as ``stage.set``."""
    return any(key.startswith(f"{name}.") for name in (open_keys(stage, "stage") if stage else []))


def text_keys(kind: type, prefix: str) -> set[str]:
    """Return the dotted keys of a settings class whose values are text, nested sections included."""
    keys = set()
    for name, hint in typing.get_type_hints(kind).items():
        if _is_section(hint):
            keys |= text_keys(hint, f"{prefix}.{name}")
        elif set(typing.get_args(hint) or [hint]) <= {str, type(None)}:
            keys.add(f"{prefix}.{name}")
    return keys


def open_keys(kind: type, prefix: str) -> list[str]:
    """Return the dotted keys of a settings class whose values are mappings of any names."""
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        if _is_section(hint):
            keys += open_keys(hint, f"{prefix}.{name}")
        elif typing.get_origin(hint) is dict:
            keys.append(f"{prefix}.{name}")
    return keys


def section_names(kind: type = Config) -> dict[str, type]:
    """Return the sections nested in a settings class by field name. The stage of ``Config`` is not among them."""
    return {name: hint for name, hint in typing.get_type_hints(kind).items() if _is_section(hint)}


def _is_section(hint: Any) -> typing.TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _build_section(kind: type, raw: Any, path: str, known: list[str], problems: list[Problem]) -> Any:
    """Return an instance of the settings class ``kind``. ``raw``: a mapping, or ``None`` for all defaults."""
    if raw is None:
        return kind()
    if not isinstance(raw, Mapping):
        problems.append(
            Problem(f"{path}={raw}: it is a section; set its keys: {', '.join(keys_of(kind, path))}.", (path,))
        )
        return kind()
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in raw.items():
        key = f"{path}.{name}"
        if name not in hints:
            problems.append(unknown_key(key, value, known))
        elif _is_section(hints[name]):
            values[name] = _build_section(hints[name], value, key, known, problems)
        elif name == "name" and path.startswith("stage") and value != (default := kind().name):
            problems.append(
                Problem(
                    f"{key}={format_value(value)}: it is {default} here; choose another stage with "
                    f"stage={format_value(value)}.",
                    (key,),
                )
            )
        else:
            try:
                values[name] = convert(value, hints[name])
            except ValueError as error:
                problems.append(Problem(f"{key}={format_value(value)}: {error}", (key,)))
    return kind(**values)


def convert(value: Any, hint: Any) -> Any:
    """Return ``value`` as the type ``hint``.

    Whole floats are accepted as integers (5e8), integers as floats and as text (``run.name=2024``). Raises
    ``ValueError`` that says what would be right."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _convert_optional(value, hint)
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            raise ValueError(f"it should be a list, as [{format_value(value)}].")
        return [convert(item, inner) for item in value]
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ValueError("its keys are given one by one, such as stage.set.vae.scaling_factor=0.7.")
        return {str(name): convert(item, typing.get_args(hint)[1]) for name, item in value.items()}
    if hint is Any:
        return value
    return _convert_scalar(value, hint)


def _convert_optional(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    (inner,) = (item for item in typing.get_args(hint) if item is not type(None))
    try:
        return convert(value, inner)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}, or null.") from None


def _convert_scalar(value: Any, kind: type) -> Any:
    accepted: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int, float, str), float: (float,), str: (str,)}
    if kind in accepted.get(type(value), ()):
        return kind(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    raise ValueError(f"it should be {TYPE_NAMES[kind]}.")


def as_yaml(config: AnyConfig) -> str:
    """Return the config as yaml text, which :func:`build` reads again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
