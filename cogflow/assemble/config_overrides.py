"""Values of configs that are set on the way (``stage.set.<component>.<key>=value``): in the copy, never in the place it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cogflow.assemble.components import CONFIGS, PipelineComponent
from cogflow.config.build import show
from cogflow.config.problems import did_you_mean, nearest
from cogflow.errors import ConfigError
from cogflow.weights.tensor_source import read_json


def set_values(
    parts: Mapping[str, PipelineComponent], values: Mapping[str, Mapping[str, Any]]
) -> dict[str, PipelineComponent]:
    """``parts`` with ``values`` (component -> key -> value) in their settings. Raises :class:`ConfigError` for keys and kinds that the
    components do not know, all at once."""
    problems: list[str] = []
    made = dict(parts)
    for name, chosen in values.items():
        part = parts.get(name)
        if part is None or not part.class_name:
            continue  # what is wrong with it is told already
        known = [key for key in part.settings if not key.startswith("_")]
        given = {}
        for key, value in chosen.items():
            if key not in known:
                problems.append(
                    f"stage.set.{name}.{key}={show(value)}: {part.class_name} has no such setting.{did_you_mean(nearest(key, known))}"
                )
            elif not _fits(value, before := part.settings[key]):
                problems.append(
                    f"stage.set.{name}.{key}={show(value)}: it is {show(before)} now, a value of another kind."
                )
            else:
                given[key] = (before, float(value) if isinstance(before, float) and isinstance(value, int) else value)
        settings = part.settings | {key: now for key, (_, now) in given.items()}
        made[name] = replace(part, settings=settings, unset=part.unset - given.keys(), set=given)
    if problems:
        raise ConfigError(
            "\n".join(problems), "A component's settings stand in its config file; diffusers' defaults count, too."
        )
    return made


def config_text(part: PipelineComponent) -> str:
    """The component's config file with the values that were set."""
    config = read_json(part.folder / CONFIGS[part.name])
    return json.dumps(config | {key: now for key, (_, now) in part.set.items()}, indent=2, ensure_ascii=False) + "\n"


def _fits(value: Any, before: Any) -> bool:
    """Numbers for numbers, truth for truth, text for text; what is unset takes anything, and may be unset."""
    if before is None or value is None:
        return True
    if isinstance(before, bool) or isinstance(value, bool):
        return isinstance(before, bool) and isinstance(value, bool)
    if isinstance(before, int | float):
        return isinstance(value, int | float) and not (
            isinstance(before, int) and isinstance(value, float) and not value.is_integer()
        )
    if isinstance(before, list | tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, type(before))
