"""Claims about a model, each with where it comes from, and how they are settled into facts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fact:
    """A settled value and the evidence that settled it."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Claim:
    """What one place says of one fact. A claim that is not ``firm`` only fills a gap: it neither wins nor contradicts."""

    key: str
    value: Any
    origin: str
    firm: bool = True


def settle(claims: Iterable[Claim]) -> tuple[dict[str, Fact], list[str]]:
    """Facts by key, and one line for each contradiction.

    The first firm claim of a key wins (callers list shapes first), else the first one that fills. Two firm claims that differ
    are a contradiction; its line shows every value with every place that gives it.
    """
    ordered: dict[str, list[Claim]] = {}
    for claim in claims:
        ordered.setdefault(claim.key, []).append(claim)
    facts, problems = {}, []
    for key, found in ordered.items():
        firm = [claim for claim in found if claim.firm]
        chosen = (firm or found)[0]
        facts[key] = Fact(chosen.value, chosen.origin)
        if any(not same(claim.value, chosen.value) for claim in firm):
            problems.append(
                f"{key}: " + " against ".join(f"{shown(claim.value)} ({claim.origin})" for claim in _distinct(firm))
            )
    return facts, problems


def same(one: Any, other: Any) -> bool:
    """Equal, numbers to a relative 1e-6 (a yaml rounds what a checkpoint's author wrote)."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def shown(value: Any) -> str:
    """A value for messages and tables."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return (
        {None: "none", True: "yes", False: "no"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else str(value)
    )


def _distinct(claims: list[Claim]) -> list[Claim]:
    """One claim for each value, the origins of those that agree joined."""
    groups: list[list[Claim]] = []
    for claim in claims:
        group = next((group for group in groups if same(group[0].value, claim.value)), None)
        if group is None:
            groups.append([claim])
        else:
            group.append(claim)
    return [Claim(group[0].key, group[0].value, "; ".join(claim.origin for claim in group)) for group in groups]
