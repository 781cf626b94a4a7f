"""Resolve every fact that an export needs from shapes, SAT's yaml files, the user's facts and ``model=``.

Nothing is guessed: sources that conflict stop the export, and a fact that no source reports must be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from cogflow.errors import ConfigError, ConversionError, format_list
from cogflow.export.facts_from_yaml import transformer_values_from_yaml, vae_values_from_yaml
from cogflow.export.reported_values import (
    FACT_TYPES,
    ROTARY,
    Fact,
    FactValue,
    ReportedValue,
    TensorInfos,
    family_member,
    family_values,
    format_fact,
    position_kind,
    resolve_values,
    rotary_table_rows,
    transformer_values_from_shapes,
    user_values,
    vae_values_from_shapes,
    values_agree,
    with_values,
)
from cogflow.files.record_io import ForeignObject
from cogflow.models.family import MODEL_SPECS, ModelSpec
from cogflow.records.training_records import TrainedWith

Yamls = Sequence[tuple[Path, ForeignObject]]
"""Path and content of each yaml file."""


@dataclass(frozen=True)
class TransformerFacts:
    """Facts of a SAT transformer and of its training.

    ``family``: the member that ``model=`` names, else the only member with the same architecture and schedule, else
    ``None``. ``sources``: fact to where its value is from; facts without an entry do not apply to the model.
    """

    layers: int
    heads: int
    head_dim: int
    hidden: int
    in_channels: int
    out_channels: int
    patch_size: int
    patch_size_t: int | None
    text_width: int
    time_embed_dim: int
    ofs_embed_dim: int | None
    position: str
    latent_height: int
    latent_width: int
    latent_frames: int
    temporal_compression: int
    text_tokens: int
    scaling_factor: float
    snr_shift_scale: float
    invert_scale_latents: bool
    dtype: str
    spatial_interpolation: float | None = None
    temporal_interpolation: float | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    family: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    OPTIONAL: ClassVar[tuple[str, ...]] = ("spatial_interpolation", "temporal_interpolation", "lora_rank", "lora_alpha")

    @property
    def image_to_video(self) -> bool:
        return self.in_channels != self.out_channels

    def values(self) -> dict[str, FactValue]:
        """Return the value of every fact that applies to the model."""
        return {key: getattr(self, key) for key in FACT_TYPES if key in self.sources}

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (fact, value, source) as text, for the console and export.json."""
        return [(key, format_fact(value), self.sources[key]) for key, value in self.values().items()]

    def trained_with(self) -> TrainedWith:
        """Return the settings of VAE, scheduler and text encoder that the weights depend on."""
        return TrainedWith(
            scaling_factor=self.scaling_factor,
            invert_scale_latents=self.invert_scale_latents,
            snr_shift_scale=self.snr_shift_scale,
            # Every CogVideoX has these: SAT's VideoScaling, its sampler's steps, ZeroSNRDDPMDiscretization. Yaml
            # files that say otherwise are refused.
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            dtype=self.dtype,
            max_sequence_length=self.text_tokens,
        )


@dataclass(frozen=True)
class VaeFacts:
    """Facts of a SAT VAE. ``sources``: fact to where its value is from."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    vae_in_channels: int
    vae_out_channels: int
    temporal_compression: int
    scaling_factor: float
    invert_scale_latents: bool
    dtype: str
    sources: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, FactValue]:
        """Return the value of every fact."""
        return {key: getattr(self, key) for key in self.sources}


def resolve_facts(
    infos: TensorInfos, yamls: Yamls, family: str = "auto", given: Mapping[str, FactValue] | None = None
) -> TransformerFacts:
    """Return the facts of a SAT transformer.

    ``infos``: its tensors, without ``model.diffusion_model.``. ``family``: auto or a key of MODEL_SPECS. ``given``: the
    user's facts; null means not given. Raises :class:`ConversionError` listing every conflict with all values and
    sources, and :class:`ConfigError` listing the facts that no source reports and how to give them.
    """
    infos = with_values(infos)
    if not any(name.startswith("transformer.layers.") for name in infos):
        raise ConversionError(
            f"These tensors are no SAT transformer: no name of {len(infos)} begins with transformer.layers.",
            f"First names: {_first_names(infos)}. Expected: transformer.layers.0.attention.query_key_value.weight",
        )
    problems: list[str] = []
    member = family_member(family)
    others = [value for path, data in yamls for value in transformer_values_from_yaml(path, data, problems)]
    others += user_values(given or {}) + family_values(member)
    reported, _ = resolve_values(others)
    hints = {key: fact.value for key, fact in reported.items()}
    hints["patches"] = _patch_count(hints)
    shapes = transformer_values_from_shapes(infos, hints, problems)
    facts, conflicts = resolve_values([*shapes, *others])
    _add_invert_scale_latents(facts)
    problems += conflicts + _grid_conflict(infos, facts) + _dtype_conflict(shapes, facts)
    needed = [key for key in FACT_TYPES if key not in TransformerFacts.OPTIONAL]
    if "position" in facts and facts["position"].value == "sincos":
        needed += ["spatial_interpolation", "temporal_interpolation"]
    if "lora_rank" in facts and any(".matrix_A." in name for name in infos):
        needed.append("lora_alpha")
    _refuse_problems(problems, [key for key in needed if key not in facts], family)
    return _transformer_facts(facts, member.name if member else _matching_member(facts))


def resolve_vae_facts(
    infos: TensorInfos, yamls: Yamls, family: str = "auto", given: Mapping[str, FactValue] | None = None
) -> VaeFacts:
    """Return the facts of a SAT VAE (``encoder.*``, ``decoder.*``). Raises the errors of :func:`resolve_facts`.

    Shapes show neither the model generation (1.0 or 1.5) nor the scaling factor, so a ``3d-vae.pt`` alone needs a yaml,
    ``family`` or ``given``.
    """
    infos = with_values(infos)
    if not any(name.startswith(("encoder.down.", "decoder.up.")) for name in infos):
        raise ConversionError(
            f"These tensors are no SAT autoencoder: no name of {len(infos)} begins with encoder.down. or decoder.up.",
            f"First names: {_first_names(infos)}.",
        )
    problems: list[str] = []
    values = vae_values_from_shapes(infos, problems)
    values += [value for path, data in yamls for value in vae_values_from_yaml(path, data, problems)]
    values += user_values(given or {}) + family_values(family_member(family))
    facts, conflicts = resolve_values(values)
    _add_invert_scale_latents(facts)
    needed = [one.name for one in fields(VaeFacts) if one.name != "sources"]
    problems += [line for line in conflicts if line.partition(":")[0] in (*needed, "patch_size_t")]
    _refuse_problems(problems, [key for key in needed if key not in facts], family)
    chosen: dict[str, Any] = {key: facts[key].value for key in needed}
    return VaeFacts(**chosen, sources={key: facts[key].source for key in needed})


def published_facts(name: str) -> TransformerFacts:
    """Return the facts of a family member at its published size, for weights without SAT's names.

    Raises :class:`ConfigError` for auto and for unknown names.
    """
    member = _member(name)
    facts, _ = resolve_values(family_values(member))
    source = f"model={name}"
    facts["hidden"] = Fact(member.heads * member.head_dim, source)
    # 512 in every yaml of SAT; the tiny model's is in models/tiny.py.
    facts["time_embed_dim"] = Fact(64 if name == "tiny" else 512, source)
    return _transformer_facts(facts, name)


def published_vae_facts(name: str) -> VaeFacts:
    """Return the facts of the VAE that is published with a family member.

    Raises :class:`ConfigError` for an unknown name.
    """
    member = _member(name)
    return VaeFacts(
        block_out_channels=(128, 256, 256, 512),
        layers_per_block=3,
        latent_channels=member.latent_channels,
        vae_in_channels=3,
        vae_out_channels=3,
        temporal_compression=4,
        scaling_factor=member.scaling_factor,
        invert_scale_latents=member.invert_scale_latents,
        dtype="fp32",
    )


def _member(name: str) -> ModelSpec:
    member = family_member(name)
    if member is None:
        raise ConfigError("model=auto is no member of the family.", f"Choose one of {', '.join(MODEL_SPECS)}.")
    return member


def _transformer_facts(facts: Mapping[str, Fact], family: str | None) -> TransformerFacts:
    present = [key for key in FACT_TYPES if key in facts]
    values: dict[str, Any] = {key: facts[key].value for key in present}  # every source checks the types of its values
    return TransformerFacts(**values, family=family, sources={key: facts[key].source for key in present})


def _first_names(infos: Iterable[str]) -> str:
    return ", ".join(list(infos)[:5]) or "none"


_ARCHITECTURE = (
    "layers",
    "heads",
    "head_dim",
    "in_channels",
    "patch_size",
    "patch_size_t",
    "ofs_embed_dim",
    "text_width",
    "snr_shift_scale",
)


def _matching_member(facts: Mapping[str, Fact]) -> str | None:
    """Return the only member with the same architecture and schedule. The name decides no fact."""

    def matches(member: ModelSpec) -> bool:
        return facts["position"].value == position_kind(member) and all(
            values_agree(facts[key].value, getattr(member, key)) for key in _ARCHITECTURE
        )

    names = [member.name for member in MODEL_SPECS.values() if matches(member)]
    return names[0] if len(names) == 1 else None


def _add_invert_scale_latents(facts: dict[str, Fact]) -> None:
    """Add ``invert_scale_latents``, a setting of diffusers that SAT's weights and yaml files do not have.

    It is true in the published 1.5 pipelines and false in 1.0's, and only image-to-video reads it. SAT's 1.5 code
    multiplies image latents by the scaling factor in training and not in sampling, so the user may set the fact
    otherwise.
    """
    if "patch_size_t" in facts and "invert_scale_latents" not in facts:
        is_1_5 = facts["patch_size_t"].value is not None
        generation = "1.5" if is_1_5 else "1.0"
        source = f"diffusers' {generation} models, by patch_size_t ({facts['patch_size_t'].source})"
        facts["invert_scale_latents"] = Fact(is_1_5, source)


def _patch_count(values: Mapping[str, FactValue]) -> int | None:
    """Return the video tokens of one clip of a 1.0 model: latent frames x rows x columns."""
    sizes = [values.get(key) for key in ("latent_frames", "latent_height", "latent_width", "patch_size")]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    if values.get("patch_size_t") is not None or len(known) < len(sizes):
        return None
    frames, height, width, patch = known
    return frames * (height // patch) * (width // patch)


def _grid_conflict(infos: TensorInfos, facts: Mapping[str, Fact]) -> list[str]:
    """Return a conflict between the latent grid and the length of the rotary tables, which 1.0 models store."""
    rows = rotary_table_rows(infos)
    expected = _patch_count({key: fact.value for key, fact in facts.items()})
    if rows is None or expected is None or rows == expected:
        return []
    keys = ("latent_frames", "latent_height", "latent_width")
    sizes = ", ".join(f"{key} {facts[key].value} ({facts[key].source})" for key in keys)
    return [f"latent grid: {expected} patches by {sizes} against {rows} rows of {ROTARY} (checkpoint)"]


def _dtype_conflict(shapes: Sequence[ReportedValue], facts: Mapping[str, Fact]) -> list[str]:
    """Return a conflict between bf16 and fp16. A checkpoint may be stored wider than trained, but not in the other
    half."""
    stored = next((value for value in shapes if value.key == "dtype"), None)
    if stored is None or {stored.value, facts["dtype"].value} != {"bf16", "fp16"}:
        return []
    if facts["dtype"].source.startswith("model="):
        return []
    return [f"dtype: {stored.value} ({stored.source}) against {facts['dtype'].value} ({facts['dtype'].source})"]


def _refuse_problems(problems: list[str], missing: list[str], family: str) -> None:
    lines = list(dict.fromkeys(problems))
    if lines:
        also = f"\nNo source reports: {', '.join(missing)}." if missing else ""
        raise ConversionError(
            f"The sources of facts contradict each other:\n{format_list(lines)}{also}",
            "Correct or remove the wrong yaml, or choose another model= or stage.facts.",
        )
    if missing:
        members = ", ".join(name for name in MODEL_SPECS if name != "tiny")
        by_model = "" if family != "auto" else f", or set model= to one of {members}"
        options = " ".join(f"stage.facts.{key}=..." if key in FACT_TYPES else f"{key}=..." for key in missing)
        raise ConfigError(
            f"Neither the checkpoint's shapes nor a yaml of SAT states: {', '.join(missing)}.",
            f"Put the yaml of the training beside the checkpoint{by_model}, or give {options}",
        )
