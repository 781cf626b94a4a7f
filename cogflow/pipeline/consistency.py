"""Do these components belong together? Facts of their configs against each other and against what the transformer was trained with.

Nothing here fails at loading: a scheduler or a VAE with another model's values loads, samples, and gives blurry videos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer

from cogflow.errors import PipelineError
from cogflow.models.family import FAMILY, Family
from cogflow.pipeline.parts import Part

TRAINED = {
    "scaling_factor": "vae",
    "invert_scale_latents": "vae",
    "snr_shift_scale": "scheduler",
    "prediction_type": "scheduler",
    "timestep_spacing": "scheduler",
    "rescale_betas_zero_snr": "scheduler",
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
SILENT = ("use_rotary_positional_embeddings", "use_learned_positional_embeddings", "patch_size_t", "ofs_embed_dim", "in_channels")
"""Those that an export must share with the family it names: wrong positions, for one, load without a word."""


def check_parts(parts: Mapping[str, Part], problems: list[str]) -> dict[str, Any]:
    """What training (or else the family table) says these components must be, when they are that.

    Raises one :class:`PipelineError` listing every contradiction, together with ``problems`` found before.
    """
    transformer = parts["transformer"]
    family = family_of(transformer)
    expected = expectations(transformer, family)
    found = list(problems)
    if not any(part.class_name == "" for part in parts.values()):
        found += _shapes(parts) + _family(transformer) + _trained(parts, expected, family)
        if not problems:
            found += _vocabulary(parts)
    if found:
        raise PipelineError(
            "These components do not make one pipeline:\n" + "\n".join(f"  {line}" for line in found),
            "Take each component from the model that was trained, or mend the config that is wrong.",
        )
    return expected


def family_of(transformer: Part) -> Family | None:
    """The member of the family whose architecture this is, or ``None``."""
    made = transformer.made.get("family")
    if made in FAMILY:
        return FAMILY[made]
    matches = [
        member
        for member in FAMILY.values()
        if all(transformer.settings.get(key) == getattr(member, name) for key, name in ARCHITECTURE.items())
    ]
    return matches[0] if len(matches) == 1 else None


def expectations(transformer: Part, family: Family | None) -> dict[str, Any]:
    """``trained_with`` of the export; for what it leaves open, the facts of the family where that is known."""
    expected: dict[str, Any] = {}
    if family is not None:
        scheduler = family.scheduler_config()
        expected = {key: scheduler[key] for key, part in TRAINED.items() if part == "scheduler"}
        expected |= {"scaling_factor": family.scaling_factor, "max_sequence_length": family.text_tokens}
        if family.image_to_video:
            # Read by the image-to-video pipeline alone.
            expected["invert_scale_latents"] = family.invert_scale_latents
    trained = transformer.made.get("trained_with") or {}
    return expected | {key: trained[key] for key in (*TRAINED, "max_sequence_length") if trained.get(key) is not None}


def _trained(parts: Mapping[str, Part], expected: Mapping[str, Any], family: Family | None) -> list[str]:
    trained = parts["transformer"].made.get("trained_with") or {}
    problems = []
    for key, name in TRAINED.items():
        if key in expected and not _same(parts[name].settings.get(key), expected[key]):
            by = "the transformer was trained with" if trained.get(key) is not None else f"{family.name if family else 'its family'} needs"
            problems.append(f"{parts[name].shown(key)}; {by} {expected[key]}")
    length, own = expected.get("max_sequence_length"), parts["transformer"].settings.get("max_text_seq_length")
    if length is not None and length != own:
        problems.append(f"transformer's max_text_seq_length is {own}; it was trained on {length} text tokens")
    return problems


def _shapes(parts: Mapping[str, Part]) -> list[str]:
    transformer, vae, text = (parts[name] for name in ("transformer", "vae", "text_encoder"))
    channels, width = vae.settings.get("latent_channels"), text.settings.get("d_model")
    problems = []
    if transformer.settings.get("in_channels") not in (channels, 2 * channels if channels else None):
        problems.append(f"{transformer.shown('in_channels')}; {vae.shown('latent_channels')} (twice that for image to video)")
    if transformer.settings.get("out_channels") != channels:
        problems.append(f"{transformer.shown('out_channels')}; {vae.shown('latent_channels')}")
    if transformer.settings.get("text_embed_dim") != width:
        problems.append(f"{transformer.shown('text_embed_dim')}; {text.shown('d_model')}")
    if not _same(transformer.settings.get("temporal_compression_ratio"), vae.settings.get("temporal_compression_ratio")):
        problems.append(f"{transformer.shown('temporal_compression_ratio')}; {vae.shown('temporal_compression_ratio')}")
    return problems


def _family(transformer: Part) -> list[str]:
    family = FAMILY.get(str(transformer.made.get("family")))
    if family is None:
        return []
    return [
        f"{transformer.shown(key)}; {family.name} has {getattr(family, ARCHITECTURE[key])}"
        for key in SILENT
        if transformer.settings.get(key) != getattr(family, ARCHITECTURE[key])
    ]


def _vocabulary(parts: Mapping[str, Part]) -> list[str]:
    """Every token that the tokenizer can give must have an embedding."""
    tokenizer, size = parts["tokenizer"], parts["text_encoder"].settings.get("vocab_size")
    try:
        count = len(AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # noqa: BLE001 - a broken vocabulary raises anything, bare Exceptions of the Rust side included
        return [f"tokenizer: {tokenizer.folder} cannot be loaded: {error}"]
    return [f"tokenizer has {count} tokens; text_encoder's vocab_size is {size}"] if size is None or count > size else []


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float) and not isinstance(one, bool) and not isinstance(other, bool):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
