"""Determine which settings a transformer requires of the other components, and describe settings that contradict them.

The requirements come from the record of its training, or else from the facts of its model family.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cogflow.assemble.components import PipelineComponent
from cogflow.config.problems import format_value
from cogflow.errors import PipelineError
from cogflow.files.record_io import JsonValue
from cogflow.models.family import MODEL_SPECS, ModelSpec
from cogflow.records.pipeline_records import ContradictionRecord
from cogflow.records.training_records import TrainedWith

TRAINED = {
    "scaling_factor": "vae",
    "invert_scale_latents": "vae",
    "snr_shift_scale": "scheduler",
    "prediction_type": "scheduler",
    "timestep_spacing": "scheduler",
    "rescale_betas_zero_snr": "scheduler",
    "num_train_timesteps": "scheduler",
    "beta_start": "scheduler",
    "beta_end": "scheduler",
    "beta_schedule": "scheduler",
}
"""Setting of the training -> the component that must have the same value."""

ARCHITECTURE = {
    "num_layers": "layers",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_dim",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "patch_size_t": "patch_size_t",
    "use_rotary_positional_embeddings": "rotary",
    "use_learned_positional_embeddings": "learned_positions",
    "ofs_embed_dim": "ofs_embed_dim",
}
"""Key of the transformer's config -> field of :class:`cogflow.models.family.ModelSpec`."""

POSITIONS = ("use_rotary_positional_embeddings", "use_learned_positional_embeddings")


@dataclass(frozen=True)
class Expectation:
    """A required ``value`` and the ``source`` that requires it, a file or the facts of a family."""

    value: JsonValue
    source: str


def family_of(transformer: PipelineComponent) -> ModelSpec | None:
    """Return the family member that the transformer's record or architecture names, or ``None``.

    The position flags are compared first and then left out: a flag may be the setting that is wrong.
    """
    recorded = transformer.training.family
    if recorded in MODEL_SPECS:
        return MODEL_SPECS[recorded]
    for left_out in ((), POSITIONS):
        keys = [key for key in ARCHITECTURE if key not in left_out]
        matching = [
            member
            for member in MODEL_SPECS.values()
            if all(transformer.settings.get(key) == getattr(member, ARCHITECTURE[key]) for key in keys)
        ]
        if len(matching) == 1:
            return matching[0]
    return None


def expectations(transformer: PipelineComponent, family: ModelSpec | None) -> dict[str, Expectation]:
    """Return the required value of each setting of :data:`TRAINED` and of ``max_sequence_length`` that is known.

    The record of the transformer's training (``trained_with`` of export.json) is preferred to the facts of the family.
    """
    expected: dict[str, Expectation] = {}
    if family is not None:
        scheduler = family.scheduler_config()
        facts = {key: scheduler[key] for key, component in TRAINED.items() if component == "scheduler"}
        facts |= {"scaling_factor": family.scaling_factor, "max_sequence_length": family.text_tokens}
        if family.image_to_video:
            # Only the image-to-video pipeline reads it.
            facts["invert_scale_latents"] = family.invert_scale_latents
        expected = {key: Expectation(value, f"the facts of {family.name}") for key, value in facts.items()}
    trained = transformer.training.trained_with or TrainedWith()
    origins = {fact.fact: fact.origin for fact in transformer.training.facts or []}
    for key in (*TRAINED, "max_sequence_length"):
        value = getattr(trained, key, None)
        if value is not None:
            origin = origins.get("text_tokens" if key == "max_sequence_length" else key)
            source = ", which has it from ".join(filter(None, [record_of(transformer), origin]))
            expected[key] = Expectation(value, source)
    return expected


def record_of(transformer: PipelineComponent) -> str:
    """Return the file that records the transformer's training, or else its folder."""
    return str(transformer.training_file or transformer.folder)


def same_value(one: Any, other: Any) -> bool:
    """Return whether two config values are equal: numbers to a relative 1e-6, lists and tuples element by element."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same_value(a, b) for a, b in zip(one, other, strict=True))
    if _is_number(one) and _is_number(other):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def contradiction_line(contradiction: ContradictionRecord) -> str:
    """Return the message of a contradiction: both values, their sources, and the options that correct it."""
    return (
        f"{contradiction.key} is {format_value(contradiction.value)} ({contradiction.source}); "
        f"{contradiction.why} {format_value(contradiction.needed)} ({contradiction.needed_source}). "
        f"To correct it: {contradiction.override}"
    )


def setting_contradiction(
    component: PipelineComponent, key: str, why: str, expected: Expectation, *, exchange: str | None = None
) -> ContradictionRecord:
    """Return the contradiction between the component's ``key`` and the ``expected`` value.

    ``exchange``: the component to exchange when the value cannot be set by itself, as for shapes of weights.
    """
    if exchange is None:
        override = f"stage.set.{component.name}.{key}={format_value(expected.value)}"
    else:
        override = f"stage.{exchange}=FOLDER of the training, or another stage.{component.name}"
    return ContradictionRecord(
        key=f"{component.name}.{key}",
        value=component.settings.get(key),
        source=component.source_of(key),
        why=why,
        needed=expected.value,
        needed_source=expected.source,
        override=override,
    )


def require_resolved(
    problems: Sequence[str], contradictions: Iterable[ContradictionRecord], force: Sequence[str]
) -> tuple[list[ContradictionRecord], list[str]]:
    """Return the contradictions that ``force`` names, and the names in ``force`` without a contradiction.

    Raises one :class:`PipelineError` with all ``problems`` (code, broken or missing files), which cannot be forced, and
    with all other contradictions.
    """
    found = {contradiction.key: contradiction for contradiction in contradictions}
    unresolved = [contradiction_line(contradiction) for key, contradiction in found.items() if key not in force]
    if problems or unresolved:
        hint = "Take each component from the model that was trained."
        if unresolved:
            hint = "Take each component from the model that was trained, or add the options that correct it."
            hint += f" stage.force=[{','.join(found)}] assembles the pipeline anyway, "
            hint += "which assembly.json and the model card record."
        raise incompatible([*problems, *unresolved], hint)
    forced = [contradiction for key, contradiction in found.items() if key in force]
    return forced, [key for key in force if key not in found]


def incompatible(problems: Iterable[str], hint: str = "") -> PipelineError:
    """Return the error that lists why the components do not form one pipeline."""
    lines = "\n".join(f"  {line}" for line in problems)
    return PipelineError(f"These components do not form one pipeline:\n{lines}", hint)
