"""Declare one setting: its default, its help text and the rule its value must satisfy.

A section of the configuration is a frozen dataclass whose fields are made by :func:`setting` and :func:`section`.
``--help`` prints the help texts and rules; :mod:`cogflow.config.build` applies the rules."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from cogflow.config.problems import did_you_mean, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class ValueRule:
    """A condition on a value. ``allowed`` is its description in ``--help``; ``problem`` returns what is wrong with a
    value, or ``None``."""

    allowed: str
    problem: Callable[[Any], str | None]


def setting(default: T, *, help: str, rule: ValueRule | None = None) -> T:
    """Return a dataclass field with a default, a help text and a rule. Lists and dicts are copied for each instance."""
    metadata = {"help": help, "rule": rule}
    if isinstance(default, list | dict):
        return cast(T, dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata))
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type[T], *, help: str) -> T:
    """Return a dataclass field that holds a nested section with all its defaults."""
    return dataclasses.field(default_factory=kind, metadata={"help": help, "rule": None})


def help_of(field: dataclasses.Field[Any]) -> str:
    """Return the help text of a field, empty if it was declared without one."""
    return str(field.metadata.get("help", ""))


def rule_of(field: dataclasses.Field[Any]) -> ValueRule | None:
    """Return the rule of a field, ``None`` if any value of its type is allowed."""
    return cast("ValueRule | None", field.metadata.get("rule"))


def at_least(low: float) -> ValueRule:
    """Allow numbers of at least ``low``."""
    return ValueRule(f"{low} or more", lambda value: None if value >= low else f"it should be {low} or more.")


def above(low: float) -> ValueRule:
    """Allow numbers greater than ``low``."""
    return ValueRule(f"more than {low}", lambda value: None if value > low else f"it should be more than {low}.")


def within(low: float, high: float) -> ValueRule:
    """Allow numbers from ``low`` to ``high``, both included."""
    return ValueRule(
        f"{low} to {high}",
        lambda value: None if low <= value <= high else f"it should be between {low} and {high}.",
    )


def one_of(*choices: str) -> ValueRule:
    """Allow a fixed set of words."""

    def problem(value: str) -> str | None:
        if value in choices:
            return None
        return f"it should be one of {', '.join(choices)}.{did_you_mean(nearest(value, choices))}"

    return ValueRule(" | ".join(choices), problem)


def each(rule: ValueRule) -> ValueRule:
    """Apply ``rule`` to every item of a list."""

    def problem(values: list[Any]) -> str | None:
        return next((found for value in values if (found := rule.problem(value))), None)

    return ValueRule(f"each {rule.allowed}", problem)


def optional(rule: ValueRule) -> ValueRule:
    """Allow ``None`` besides what ``rule`` allows."""
    return ValueRule(f"{rule.allowed}, or null", lambda value: None if value is None else rule.problem(value))


def multiple_of(step: int) -> ValueRule:
    """Allow positive multiples of ``step``."""

    def problem(value: int) -> str | None:
        if value > 0 and value % step == 0:
            return None
        return f"it should be a multiple of {step}, such as {max(step, round(value / step) * step)}."

    return ValueRule(f"a multiple of {step}", problem)


def matching(pattern: str, allowed: str, wrong: str) -> ValueRule:
    """Allow texts that match the whole regular expression ``pattern``."""
    return ValueRule(allowed, lambda value: None if re.fullmatch(pattern, value) else f"it should be {wrong}.")


NOT_EMPTY = ValueRule("not empty", lambda value: None if value else "it should not be empty.")
BELOW_ONE = ValueRule(
    "0 or more, less than 1", lambda value: None if 0 <= value < 1 else "it should be 0 or more, and less than 1."
)
SHARE = ValueRule(
    "more than 0, at most 1", lambda value: None if 0 < value <= 1 else "it should be more than 0 and at most 1."
)

ARTIFACT_KINDS = (
    "auto",
    "pipeline",
    "export",
    "checkpoint",
    "run",
    "sat_checkpoint",
    "sat_vae",
    "deepspeed",
    "components",
    "component",
    "videos",
    "frames",
)
"""Kinds of artifact that a path can name. A test compares them with :mod:`cogflow.artifacts.identify`, which this
package may not import."""


def kind_setting(path_key: str) -> str:
    """Return the field that says what the path of ``path_key`` is."""
    return setting("auto", help=f"Kind of {path_key}. auto: inferred from its content.", rule=one_of(*ARTIFACT_KINDS))
