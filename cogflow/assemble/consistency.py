"""Do these components belong together? Facts of their configs and weights against each other, against what the transformer was trained
with, and against the manifests they were published with.

Nothing here fails at loading: a scheduler or a VAE with another model's values loads, samples, and gives blurry videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.contradiction import Contradiction, settle
from cogflow.assemble.stored_dtypes import dtype_contradictions
from cogflow.assemble.tensor_check import tensor_problems
from cogflow.config.build import show
from cogflow.models.family import FAMILY, Family

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
"""Setting of training -> the component that must agree."""

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
"""Key of the transformer's config -> field of the family table."""
POSITIONS = ("use_rotary_positional_embeddings", "use_learned_positional_embeddings")
SILENT = (*POSITIONS, "patch_size", "patch_size_t", "ofs_embed_dim", "in_channels")
"""Those that a transformer must share with the family it is of: wrong positions, for one, load without a word."""
POSITION = {(False, False): "sincos", (True, False): "rotary", (True, True): "learned+rotary"}
"""POSITIONS as an export's facts name them."""
SPATIAL = 8  # pixels per latent pixel of every CogVideoX


def check_parts(
    parts: Mapping[str, PipelineComponent], problems: Sequence[str], *, found: Sequence[Contradiction] = (), force: Sequence[str] = (),
    family: Family | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What training (or else the family table) says these components must be, when they are that.

    ``problems`` and ``found`` were seen before. ``force``: keys of contradictions that are passed over; they are returned under
    ``forced``, and names that nothing contradicts under ``not_needed``. ``family``: as the user names it; ``None``: the files tell.
    Raises one :class:`PipelineError` with every contradiction.
    """
    transformer = parts["transformer"]
    family = family or family_of(transformer)
    told = told_expectations(transformer, family)
    problems, every = list(problems), list(found)
    if not any(part.class_name == "" for part in parts.values()):
        every += [
            *_trained(parts, told),
            *_shapes(parts),
            *_family(transformer, family),
            *dtype_contradictions(parts, family),
        ]
        problems += tensor_problems(parts)
        if not problems:
            problems += _vocabulary(parts)
    forced, not_needed = settle(problems, every, force)
    expected = {key: value for key, (value, _) in told.items()}
    return (
        expected
        | ({"forced": [one.as_dict() for one in forced]} if forced else {})
        | ({"not_needed": not_needed} if not_needed else {})
    )


def family_of(transformer: PipelineComponent) -> Family | None:
    """The member of the family whose architecture this is, or ``None``. Positions come last: a flag may be the very thing that is wrong."""
    made = transformer.made.get("family")
    if made in FAMILY:
        return FAMILY[made]
    for left_out in ((), POSITIONS):
        keys = [key for key in ARCHITECTURE if key not in left_out]
        fits = [
            one
            for one in FAMILY.values()
            if all(transformer.settings.get(key) == getattr(one, ARCHITECTURE[key]) for key in keys)
        ]
        if len(fits) == 1:
            return fits[0]
    return None


def expectations(transformer: PipelineComponent, family: Family | None) -> dict[str, Any]:
    """``trained_with`` of the export; for what it leaves open, the facts of the family where that is known."""
    return {key: value for key, (value, _) in told_expectations(transformer, family).items()}


def told_expectations(transformer: PipelineComponent, family: Family | None) -> dict[str, tuple[Any, str]]:
    """:func:`expectations` with who says each."""
    expected: dict[str, tuple[Any, str]] = {}
    if family is not None:
        scheduler, origin = family.scheduler_config(), f"the facts of {family.name}"
        expected = {key: (scheduler[key], origin) for key, part in TRAINED.items() if part == "scheduler"}
        expected |= {
            "scaling_factor": (family.scaling_factor, origin),
            "max_sequence_length": (family.text_tokens, origin),
        }
        if family.image_to_video:
            # Read by the image-to-video pipeline alone.
            expected["invert_scale_latents"] = (family.invert_scale_latents, origin)
    trained = transformer.made.get("trained_with") or {}
    evidence = {str(fact.get("fact")): str(fact.get("from")) for fact in transformer.made.get("facts") or []}
    for key in (*TRAINED, "max_sequence_length"):
        if trained.get(key) is not None:
            first = evidence.get("text_tokens" if key == "max_sequence_length" else key)
            expected[key] = (trained[key], ", which has it from ".join(filter(None, [_record(transformer), first])))
    return expected


def _record(transformer: PipelineComponent) -> str:
    return str(transformer.told_by or transformer.folder)


def _trained(parts: Mapping[str, PipelineComponent], told: Mapping[str, tuple[Any, str]]) -> Iterator[Contradiction]:
    trained = parts["transformer"].made.get("trained_with") or {}
    for key, name in TRAINED.items():
        if key in told and not same(parts[name].settings.get(key), told[key][0]):
            yield differs(
                parts[name],
                key,
                "the transformer was trained with" if trained.get(key) is not None else "it needs",
                *told[key],
            )
    transformer, tokenizer = parts["transformer"], parts.get("tokenizer")
    length, origin = told.get("max_sequence_length", (None, ""))
    own = transformer.settings.get("max_text_seq_length")
    if length is not None and length != own:
        yield differs(transformer, "max_text_seq_length", "text tokens in training:", length, origin)
    most = tokenizer.settings.get("model_max_length") if tokenizer else None
    if tokenizer and isinstance(most, int | float) and isinstance(own, int) and most < own:
        yield differs(
            tokenizer,
            "model_max_length",
            "text tokens of the transformer:",
            own,
            transformer.said("max_text_seq_length"),
        )


def _shapes(parts: Mapping[str, PipelineComponent]) -> Iterator[Contradiction]:
    transformer, vae, text = (parts[name] for name in ("transformer", "vae", "text_encoder"))
    channels = vae.settings.get("latent_channels")
    theirs = vae.said("latent_channels")
    if transformer.settings.get("in_channels") not in (channels, 2 * channels if channels else None):
        yield differs(
            transformer,
            "in_channels",
            "latent channels of the VAE (twice that for image to video):",
            channels,
            theirs,
            "vae",
        )
    if transformer.settings.get("out_channels") != channels:
        yield differs(transformer, "out_channels", "latent channels of the VAE:", channels, theirs, "vae")
    if transformer.settings.get("text_embed_dim") != text.settings.get("d_model"):
        width = text.settings.get("d_model")
        yield differs(
            transformer, "text_embed_dim", "width of the text encoder:", width, text.said("d_model"), "text_encoder"
        )
    ratio = vae.settings.get("temporal_compression_ratio")
    if not same(transformer.settings.get("temporal_compression_ratio"), ratio):
        said = vae.said("temporal_compression_ratio")
        yield differs(
            transformer, "temporal_compression_ratio", "frames per latent frame of the VAE:", ratio, said, "vae"
        )
    blocks = vae.settings.get("block_out_channels")
    if isinstance(blocks, list | tuple) and 2 ** (len(blocks) - 1) != SPATIAL:
        factor = 2 ** (len(blocks) - 1)
        yield Contradiction(
            "vae.spatial_compression", factor, vae.said("block_out_channels"), "pixels per latent pixel of every CogVideoX:", SPATIAL,
            "the facts of the family", "stage.vae=FOLDER of the VAE that the transformer was trained with",
        )  # fmt: skip


def _family(transformer: PipelineComponent, family: Family | None) -> Iterator[Contradiction]:
    settings = transformer.settings
    made = transformer.made.get("family")
    if family is not None and made in FAMILY and made != family.name:
        yield Contradiction(
            "transformer.family", made, _record(transformer), "model= says", family.name, "the command", f"model={made}"
        )  # fmt: skip
    evidence = {str(fact.get("fact")): fact for fact in transformer.made.get("facts") or []}
    wanted = (
        {key: (getattr(family, ARCHITECTURE[key]), f"the facts of {family.name}") for key in SILENT}
        if family is not None
        else {}
    )
    if (fact := evidence.get("position")) and fact.get("value") in POSITION.values():
        flags = next(flags for flags, name in POSITION.items() if name == fact["value"])
        wanted |= {
            key: (flag, f"{_record(transformer)}, which has it from {fact.get('from')}")
            for key, flag in zip(POSITIONS, flags, strict=True)
        }
    for key, (value, origin) in wanted.items():
        if not same(settings.get(key), value):
            yield differs(
                transformer,
                key,
                "its family has" if origin.startswith("the facts") else "the checkpoint has",
                value,
                origin,
            )


def differs(
    part: PipelineComponent, key: str, why: str, needed: Any, origin: str, other: str | None = None
) -> Contradiction:
    """``part``'s ``key`` against what is ``needed``. ``other``: the component to exchange where a value cannot be set, as of shapes."""
    if other is not None:
        override = (
            f"stage.{other}=FOLDER of the one that the transformer was trained with, or another stage.{part.name}"
        )
    else:
        override = f"stage.set.{part.name}.{key}={show(needed)}"
    return Contradiction(f"{part.name}.{key}", part.settings.get(key), part.said(key), why, needed, origin, override)


def _vocabulary(parts: Mapping[str, PipelineComponent]) -> list[str]:
    """Every token that the tokenizer can give must have an embedding."""
    tokenizer, size = parts["tokenizer"], parts["text_encoder"].settings.get("vocab_size")
    try:
        count = len(AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # noqa: BLE001 - a broken vocabulary raises anything, bare Exceptions of the Rust side included
        return [f"tokenizer: {tokenizer.folder} cannot be loaded: {error}"]
    return (
        [f"tokenizer has {count} tokens; text_encoder's vocab_size is {size}"] if size is None or count > size else []
    )


def same(one: Any, other: Any) -> bool:
    if (
        isinstance(one, int | float)
        and isinstance(other, int | float)
        and not isinstance(one, bool)
        and not isinstance(other, bool)
    ):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
