"""Values that sources report for facts about a model, and how they are resolved into one value per fact.

Sources are the tensors' shapes, SAT's yaml files, the user (``stage.facts``) and the family table (``model=``). This
module has the last two; :mod:`cogflow.export.facts_from_shapes` and :mod:`cogflow.export.facts_from_yaml` have the
first two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cogflow.errors import ConfigError
from cogflow.models.family import MODEL_SPECS, ModelSpec

FactValue = int | float | str | bool | tuple[int, ...] | None

FACT_TYPES: dict[str, type] = {
    "layers": int,
    "heads": int,
    "head_dim": int,
    "hidden": int,
    "in_channels": int,
    "out_channels": int,
    "patch_size": int,
    "patch_size_t": int,
    "text_width": int,
    "time_embed_dim": int,
    "ofs_embed_dim": int,
    "position": str,
    "latent_height": int,
    "latent_width": int,
    "latent_frames": int,
    "temporal_compression": int,
    "text_tokens": int,
    "scaling_factor": float,
    "snr_shift_scale": float,
    "spatial_interpolation": float,
    "temporal_interpolation": float,
    "invert_scale_latents": bool,
    "dtype": str,
    "lora_rank": int,
    "lora_alpha": float,
}
"""Facts of a transformer, which the user can give as ``stage.facts.<key>``, and their types."""

_NULLABLE = ("patch_size_t", "ofs_embed_dim")
_CHOICES = {"position": ("rotary", "sincos", "learned+rotary"), "dtype": ("fp32", "bf16", "fp16")}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class ReportedValue:
    """The value that one source reports for one fact.

    A value with ``fills_gap`` is used only if no other source reports the fact; it never conflicts.
    """

    key: str
    value: FactValue
    source: str
    fills_gap: bool = False


@dataclass(frozen=True)
class Fact:
    """A resolved value and the source that reported it."""

    value: FactValue
    source: str


def resolve_values(values: Iterable[ReportedValue]) -> tuple[dict[str, Fact], list[str]]:
    """Return one fact per key, and one line per conflict that shows every value with every source.

    The first value of a key wins (callers list shapes first). Values that only fill gaps come last.
    """
    by_key: dict[str, list[ReportedValue]] = {}
    for value in values:
        by_key.setdefault(value.key, []).append(value)
    facts: dict[str, Fact] = {}
    conflicts: list[str] = []
    for key, found in by_key.items():
        binding = [value for value in found if not value.fills_gap]
        chosen = (binding or found)[0]
        facts[key] = Fact(chosen.value, chosen.source)
        if any(not values_agree(value.value, chosen.value) for value in binding):
            conflicts.append(f"{key}: " + " against ".join(_distinct_values(binding)))
    return facts, conflicts


def values_agree(one: FactValue, other: FactValue) -> bool:
    """Return whether two values are equal; numbers may differ by a relative 1e-6, because yaml files hold rounded
    numbers."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def format_fact(value: FactValue) -> str:
    """Return a value as text for messages and tables."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value)


def _distinct_values(values: list[ReportedValue]) -> list[str]:
    """Return one text per distinct value, with all its sources."""
    groups: list[list[ReportedValue]] = []
    for value in values:
        group = next((group for group in groups if values_agree(group[0].value, value.value)), None)
        if group is None:
            groups.append([value])
        else:
            group.append(value)
    return [f"{format_fact(group[0].value)} ({'; '.join(value.source for value in group)})" for group in groups]


def user_values(given: Mapping[str, FactValue]) -> list[ReportedValue]:
    """Return the values of ``stage.facts``; null means not given, ``none`` means that the fact has no value.

    Raises :class:`ConfigError` for an unknown fact or a value of another type.
    """
    values = []
    for key, raw in given.items():
        if key not in FACT_TYPES:
            raise ConfigError(f"stage.facts.{key} is unknown.", f"Facts that can be given: {', '.join(FACT_TYPES)}.")
        if raw is None:
            continue
        value = None if key in _NULLABLE and raw == "none" else raw
        if not _is_valid(key, value):
            expected = _TYPE_NAMES.get(FACT_TYPES[key]) or "one of " + ", ".join(_CHOICES[key])
            raise ConfigError(f"stage.facts.{key}={raw} is not {expected}.")
        values.append(ReportedValue(key, value, f"stage.facts.{key}"))
    return values


def _is_valid(key: str, value: FactValue) -> bool:
    if value is None:
        return True
    expected = FACT_TYPES[key]
    if isinstance(value, bool) != (expected is bool):
        return False
    return isinstance(value, (int, float) if expected is float else expected) and value in _CHOICES.get(key, (value,))


_TRAITS = (
    "layers",
    "heads",
    "head_dim",
    "in_channels",
    "patch_size",
    "patch_size_t",
    "ofs_embed_dim",
    "text_tokens",
    "text_width",
    "scaling_factor",
    "snr_shift_scale",
    "invert_scale_latents",
    "latent_channels",
)
"""Fields of :class:`ModelSpec` that are facts of every checkpoint of that member."""


def family_member(name: str) -> ModelSpec | None:
    """Return the member that ``model=`` names, ``None`` for auto. Raises :class:`ConfigError` for an unknown name."""
    if name == "auto":
        return None
    if name not in MODEL_SPECS:
        raise ConfigError(f"model={name} is unknown.", f"Choose auto or {', '.join(MODEL_SPECS)}.")
    return MODEL_SPECS[name]


def position_kind(member: ModelSpec) -> str:
    """Return the kind of position embedding of a member, a value of the fact ``position``."""
    if not member.rotary:
        return "sincos"
    return "learned+rotary" if member.learned_positions else "rotary"


def family_values(member: ModelSpec | None) -> list[ReportedValue]:
    """Return the values of ``model=``. Traits must agree; sizes and dtype, which finetuning may change, only fill
    gaps."""
    if member is None:
        return []
    source = f"model={member.name}"
    traits: dict[str, FactValue] = {key: getattr(member, key) for key in _TRAITS}
    traits |= {"position": position_kind(member), "out_channels": member.latent_channels}
    gaps: dict[str, FactValue] = {
        "latent_height": member.height // 8,
        "latent_width": member.width // 8,
        "latent_frames": (member.frames - 1) // 4 + 1,
        "temporal_compression": 4,
        "dtype": member.dtype,
    }
    if not member.rotary:  # sat/configs/cogvideox_2b.yaml
        gaps |= {"spatial_interpolation": 1.875, "temporal_interpolation": 1.0}
    return [ReportedValue(key, value, source) for key, value in traits.items()] + [
        ReportedValue(key, value, source, fills_gap=True) for key, value in gaps.items()
    ]
