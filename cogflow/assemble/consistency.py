"""Check that components belong together: configs and weights against each other, the training record and the manifests.

Diffusers reports none of these errors: a scheduler or a VAE with another model's values loads, samples, and gives
blurry videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import AutoTokenizer

from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.expectations import (
    ARCHITECTURE,
    POSITIONS,
    TRAINED,
    Expectation,
    expectations,
    family_of,
    record_of,
    require_resolved,
    same_value,
    setting_contradiction,
)
from cogflow.assemble.stored_files import dtype_contradictions, tensor_problems
from cogflow.files.record_io import JsonValue
from cogflow.models.family import MODEL_SPECS, ModelSpec
from cogflow.records.pipeline_records import ContradictionRecord
from cogflow.records.training_records import TrainedWith

SPATIAL_COMPRESSION = 8
"""Pixels per latent pixel of every CogVideoX."""

UNCHECKED_BY_LOADING = (*POSITIONS, "patch_size", "patch_size_t", "ofs_embed_dim", "in_channels")
"""Keys in which a transformer must equal its family. Wrong positions load without an error."""

POSITION_FLAGS = {"sincos": (False, False), "rotary": (True, False), "learned+rotary": (True, True)}
"""Position embedding as an export's facts name it -> values of :data:`POSITIONS`."""


@dataclass(frozen=True)
class ConsistencyResult:
    """``expected``: setting -> value that the components were checked against.

    ``forced``: contradictions that the user accepted; ``not_needed``: names in ``stage.force`` without a contradiction.
    """

    expected: dict[str, JsonValue] = field(default_factory=dict)
    forced: list[ContradictionRecord] = field(default_factory=list)
    not_needed: list[str] = field(default_factory=list)


def check_components(
    components: Mapping[str, PipelineComponent],
    problems: Sequence[str],
    *,
    found: Sequence[ContradictionRecord] = (),
    force: Sequence[str] = (),
    family: ModelSpec | None = None,
) -> ConsistencyResult:
    """Check the components against each other and against what the transformer requires.

    ``problems`` and ``found`` were found before. ``force``: keys of contradictions to accept. ``family``: as named by
    the user; ``None``: inferred from the files. Raises one :class:`PipelineError` with every problem and
    contradiction.
    """
    transformer = components["transformer"]
    family = family or family_of(transformer)
    expected = expectations(transformer, family)
    problems, contradictions = list(problems), list(found)
    if all(component.class_name for component in components.values()):
        contradictions += [
            *_against_training(components, expected),
            *_between_components(components),
            *_against_family(transformer, family),
            *dtype_contradictions(components, family),
        ]
        problems += tensor_problems(components)
        if not problems:
            problems += _vocabulary_problems(components)
    forced, not_needed = require_resolved(problems, contradictions, force)
    return ConsistencyResult({key: one.value for key, one in expected.items()}, forced, not_needed)


def _against_training(
    components: Mapping[str, PipelineComponent], expected: Mapping[str, Expectation]
) -> Iterator[ContradictionRecord]:
    """Yield settings that differ from those the transformer was trained with."""
    transformer, tokenizer = components["transformer"], components.get("tokenizer")
    trained = transformer.training.trained_with or TrainedWith()
    for key, name in TRAINED.items():
        if key in expected and not same_value(components[name].settings.get(key), expected[key].value):
            why = "the transformer was trained with" if getattr(trained, key, None) is not None else "it requires"
            yield setting_contradiction(components[name], key, why, expected[key])
    length = transformer.settings.get("max_text_seq_length")
    wanted = expected.get("max_sequence_length")
    if wanted is not None and wanted.value != length:
        yield setting_contradiction(transformer, "max_text_seq_length", "text tokens in training:", wanted)
    most = tokenizer.settings.get("model_max_length") if tokenizer else None
    if tokenizer and isinstance(most, int | float) and isinstance(length, int) and most < length:
        needed = Expectation(length, transformer.source_of("max_text_seq_length"))
        yield setting_contradiction(tokenizer, "model_max_length", "text tokens of the transformer:", needed)


def _between_components(components: Mapping[str, PipelineComponent]) -> Iterator[ContradictionRecord]:
    """Yield channels, widths and compressions in which the components differ."""
    transformer, vae, text = (components[name] for name in ("transformer", "vae", "text_encoder"))
    channels = vae.settings.get("latent_channels")
    latent_channels = Expectation(channels, vae.source_of("latent_channels"))
    if transformer.settings.get("in_channels") not in (channels, 2 * channels if channels else None):
        why = "latent channels of the VAE (twice that for image to video):"
        yield setting_contradiction(transformer, "in_channels", why, latent_channels, exchange="vae")
    if transformer.settings.get("out_channels") != channels:
        why = "latent channels of the VAE:"
        yield setting_contradiction(transformer, "out_channels", why, latent_channels, exchange="vae")
    width = Expectation(text.settings.get("d_model"), text.source_of("d_model"))
    if transformer.settings.get("text_embed_dim") != width.value:
        why = "width of the text encoder:"
        yield setting_contradiction(transformer, "text_embed_dim", why, width, exchange="text_encoder")
    key = "temporal_compression_ratio"
    ratio = Expectation(vae.settings.get(key), vae.source_of(key))
    if not same_value(transformer.settings.get(key), ratio.value):
        yield setting_contradiction(transformer, key, "frames per latent frame of the VAE:", ratio, exchange="vae")
    blocks = vae.settings.get("block_out_channels")
    if isinstance(blocks, list | tuple) and 2 ** (len(blocks) - 1) != SPATIAL_COMPRESSION:
        yield ContradictionRecord(
            key="vae.spatial_compression",
            value=2 ** (len(blocks) - 1),
            source=vae.source_of("block_out_channels"),
            why="pixels per latent pixel of every CogVideoX:",
            needed=SPATIAL_COMPRESSION,
            needed_source="the facts of the family",
            override="stage.vae=FOLDER of the VAE that the transformer was trained with",
        )


def _against_family(transformer: PipelineComponent, family: ModelSpec | None) -> Iterator[ContradictionRecord]:
    """Yield a family other than the named one, and settings that differ from the family's or from the checkpoint's."""
    recorded = transformer.training.family
    if family is not None and recorded in MODEL_SPECS and recorded != family.name:
        yield ContradictionRecord(
            key="transformer.family",
            value=recorded,
            source=record_of(transformer),
            why="model= is",
            needed=family.name,
            needed_source="the command",
            override=f"model={recorded}",
        )
    if family is not None:
        for key in UNCHECKED_BY_LOADING:
            wanted = Expectation(getattr(family, ARCHITECTURE[key]), f"the facts of {family.name}")
            if key in POSITIONS and _recorded_positions(transformer):
                continue  # the checkpoint's own fact is preferred
            if not same_value(transformer.settings.get(key), wanted.value):
                yield setting_contradiction(transformer, key, "its family has", wanted)
    for key, wanted in _recorded_positions(transformer).items():
        if not same_value(transformer.settings.get(key), wanted.value):
            yield setting_contradiction(transformer, key, "the checkpoint has", wanted)


def _recorded_positions(transformer: PipelineComponent) -> dict[str, Expectation]:
    """Return the position flags that the export inferred from the checkpoint; empty when it did not."""
    fact = next((fact for fact in transformer.training.facts or [] if fact.fact == "position"), None)
    if fact is None or fact.value not in POSITION_FLAGS:
        return {}
    source = f"{record_of(transformer)}, which has it from {fact.origin}"
    flags = POSITION_FLAGS[str(fact.value)]
    return {key: Expectation(flag, source) for key, flag in zip(POSITIONS, flags, strict=True)}


def _vocabulary_problems(components: Mapping[str, PipelineComponent]) -> list[str]:
    """Return a problem when the tokenizer cannot be loaded or has tokens without an embedding."""
    tokenizer, size = components["tokenizer"], components["text_encoder"].settings.get("vocab_size")
    try:
        count = len(AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # noqa: BLE001 - the Rust library raises bare exceptions
        return [f"tokenizer: {tokenizer.folder} cannot be loaded: {error}"]
    if size is not None and count <= size:
        return []
    return [f"tokenizer has {count} tokens; text_encoder's vocab_size is {size}"]
