"""Values that sources report for facts about a model, and how they are resolved into one value per fact.

Sources are the names and shapes of SAT's tensors, SAT's yaml files, the user (``stage.facts``) and the family table
(``model=``). This module has all of them but the yaml files, which :mod:`cogflow.export.facts_from_yaml` reads. No
value of a tensor is read. Tensor names come without ``model.diffusion_model.`` (transformer) and
``first_stage_model.`` (VAE).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from cogflow.errors import ConfigError
from cogflow.models.family import MODEL_SPECS, ModelSpec
from cogflow.weights.tensor_source import TensorInfo
from cogflow.weights.zero import missing_numbers

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


# Values of ``stage.facts`` and ``model=``


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


# Values that the names and shapes of SAT's tensors show. The functions append to ``problems`` what is inconsistent.

TensorInfos = Mapping[str, TensorInfo]

PATCH = "mixins.patch_embed.proj.weight"
TEXT = "mixins.patch_embed.text_proj.weight"
LAST = "mixins.final_layer.linear.weight"
POSITIONS = "mixins.pos_embed.pos_embedding"
ROTARY = "mixins.pos_embed.freqs_sin"
UNUSED_POSITIONS = "transformer.position_embeddings.weight"
DTYPE_FACTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def transformer_values_from_shapes(
    infos: TensorInfos, hints: Mapping[str, FactValue], problems: list[str]
) -> list[ReportedValue]:
    """Return the values that a SAT transformer's tensors show.

    ``hints``: patch_size, patch_size_t and ``patches`` (tokens of a clip), as far as other sources report them. 1.5's
    patch embedding is one matrix over flattened patches, whose width alone does not separate channels from patch
    size.
    """
    values = _layer_counts(infos, problems)
    values += _widths(infos)
    values += _patches(infos, hints, problems)
    values += _positions(infos, hints)
    values += _lora_rank(infos, problems)
    # A checkpoint may be stored in another dtype than it was trained in; a yaml decides if there is one.
    layers = [info for name, info in infos.items() if name.startswith("transformer.layers.")]
    return values + _stored_dtype(layers, "checkpoint: dtype of its layers")


def vae_values_from_shapes(infos: TensorInfos, problems: list[str]) -> list[ReportedValue]:
    """Return the values that a SAT VAE's tensors show. The compression in time does not show in shapes."""
    values: list[ReportedValue] = []
    for side, prefix, extra_blocks in (("encoder", "encoder.down", 0), ("decoder", "decoder.up", 1)):
        levels = numbered_children(infos, prefix)
        widths = [_conv_shape(infos, f"{prefix}.{level}.block.0.conv1.conv.weight") for level in levels]
        if not levels or not all(widths) or levels != list(range(len(levels))):
            continue
        channels = tuple(width[0] for width in widths if width)
        values.append(ReportedValue("block_out_channels", channels, f"checkpoint: {prefix}.0 to {levels[-1]}"))
        blocks = {len(numbered_children(infos, f"{prefix}.{level}.block")) - extra_blocks for level in levels}
        if len(blocks) > 1:
            counts = ", ".join(map(str, sorted(blocks)))
            problems.append(f"layers_per_block: levels of the {side} have {counts} blocks")
        values.append(ReportedValue("layers_per_block", min(blocks), f"checkpoint: {prefix}.0.block.*"))
    for key, name, dim, divisor in (
        ("vae_in_channels", "encoder.conv_in.conv.weight", 1, 1),
        ("latent_channels", "encoder.conv_out.conv.weight", 0, 2),  # mean and log-variance
        ("latent_channels", "decoder.conv_in.conv.weight", 1, 1),
        ("vae_out_channels", "decoder.conv_out.conv.weight", 0, 1),
    ):
        if _conv_shape(infos, name):
            values.append(ReportedValue(key, infos[name].shape[dim] // divisor, _checkpoint_source(infos[name])))
    return values + _stored_dtype(list(infos.values()), "checkpoint: dtype of its tensors")


def with_values(infos: TensorInfos) -> dict[str, TensorInfo]:
    """Return the tensors that have dimensions, none of them 0: the others show no fact of a model."""
    return {name: info for name, info in infos.items() if info.shape and all(info.shape)}


def rotary_table_rows(infos: TensorInfos) -> int | None:
    """Return the number of rows of the rotary table (tokens of one clip), which 1.0 models store."""
    return infos[ROTARY].shape[0] if ROTARY in infos and len(infos[ROTARY].shape) == 2 else None


def numbered_children(infos: TensorInfos, prefix: str) -> list[int]:
    """Return the numbers i of the names that begin with ``prefix.i.``, sorted."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,9})\.")
    return sorted({int(match[1]) for name in infos if (match := pattern.match(name))})


def _checkpoint_source(info: TensorInfo) -> str:
    return f"checkpoint: {info.name} {list(info.shape)}"


def _stored_dtype(infos: list[TensorInfo], source: str) -> list[ReportedValue]:
    dtypes = Counter(info.dtype for info in infos if info.dtype in DTYPE_FACTS)
    if not dtypes:
        return []
    return [ReportedValue("dtype", DTYPE_FACTS[dtypes.most_common(1)[0][0]], source, fills_gap=True)]


def _layer_counts(infos: TensorInfos, problems: list[str]) -> list[ReportedValue]:
    values = []
    for prefix in (
        "transformer.layers",
        "mixins.adaln_layer.adaLN_modulations",
        "mixins.adaln_layer.query_layernorm_list",
    ):
        numbers = numbered_children(infos, prefix)
        if not numbers:
            continue
        if gaps := missing_numbers(numbers):
            problems.append(f"layers: checkpoint has {prefix}.{numbers[-1]} but not {prefix}.{gaps[0]}")
            continue
        values.append(ReportedValue("layers", numbers[-1] + 1, f"checkpoint: {prefix}.0 to {numbers[-1]}"))
    return values


def _widths(infos: TensorInfos) -> list[ReportedValue]:
    """Return the facts that are one dimension of one tensor, and the number of heads."""
    dimensions = (
        ("hidden", TEXT, 0),
        ("hidden", PATCH, 0),
        ("hidden", "transformer.final_layernorm.weight", 0),
        ("text_width", TEXT, 1),
        ("head_dim", "mixins.adaln_layer.query_layernorm_list.0.weight", 0),
        ("head_dim", ROTARY, 1),
        ("time_embed_dim", "time_embed.2.weight", 0),
        ("ofs_embed_dim", "ofs_embed.0.weight", 1),
    )
    sizes: dict[str, int] = {}
    values = []
    for key, name, dim in dimensions:
        if name in infos and dim < len(infos[name].shape):
            sizes[key] = infos[name].shape[dim]
            values.append(ReportedValue(key, sizes[key], _checkpoint_source(infos[name])))
    if "ofs_embed_dim" not in sizes and "time_embed_dim" in sizes:
        values.append(ReportedValue("ofs_embed_dim", None, "checkpoint: no ofs_embed"))
    if "hidden" in sizes and "head_dim" in sizes and sizes["hidden"] % sizes["head_dim"] == 0:
        hidden, head_dim = sizes["hidden"], sizes["head_dim"]
        values.append(ReportedValue("heads", hidden // head_dim, f"checkpoint: {hidden} wide / {head_dim} per head"))
    return values


def _patches(infos: TensorInfos, hints: Mapping[str, FactValue], problems: list[str]) -> list[ReportedValue]:
    """Return patch size and channels. 1.0 has a convolution, 1.5 a matrix over flattened patches."""
    if PATCH not in infos:
        return []
    embed = infos[PATCH]
    patch, patch_t = hints.get("patch_size"), hints.get("patch_size_t")
    if len(embed.shape) == 4:
        patches = (embed.shape[2], embed.shape[3])
        values = [
            ReportedValue("in_channels", embed.shape[1], _checkpoint_source(embed)),
            ReportedValue("patch_size", embed.shape[2], _checkpoint_source(embed)),
            ReportedValue("patch_size_t", None, _checkpoint_source(embed)),
        ]
        values += _channels("out_channels", infos.get(LAST), 0, patches, problems)
    elif isinstance(patch, int) and isinstance(patch_t, int):
        values = _channels("in_channels", embed, 1, (patch_t, patch, patch), problems)
        values += _channels("out_channels", infos.get(LAST), 0, (patch_t, patch, patch), problems)
    else:
        if isinstance(patch, int) and "patch_size_t" in hints:
            problems.append(
                f"patch_size_t: none (yaml or model=) against patches over time ({_checkpoint_source(embed)}, a matrix)"
            )
        return []
    channels = {value.key: value.value for value in values}
    if isinstance(out := channels.get("out_channels"), int) and out:
        source = f"checkpoint: {channels.get('in_channels')} channels in, {out} out"
        values.append(ReportedValue("image_to_video", channels.get("in_channels") == 2 * out, source))
    return values


def _channels(
    key: str, info: TensorInfo | None, dim: int, patches: tuple[int, ...], problems: list[str]
) -> list[ReportedValue]:
    """Return a dimension of a linear layer over flattened patches, divided by the values of one patch."""
    if info is None or dim >= len(info.shape):
        return []
    area = math.prod(patches)
    sides = "x".join(map(str, patches))
    if area <= 0 or info.shape[dim] % area:
        problems.append(f"{key}: {_checkpoint_source(info)} does not divide by patches of {sides}")
        return []
    return [ReportedValue(key, info.shape[dim] // area, f"{_checkpoint_source(info)} over patches of {sides}")]


def _positions(infos: TensorInfos, hints: Mapping[str, FactValue]) -> list[ReportedValue]:
    table, learned = infos.get(ROTARY), infos.get(POSITIONS)
    values: list[ReportedValue] = []
    if table is not None:
        kind = "learned+rotary" if learned is not None else "rotary"
        source = _checkpoint_source(table) + (f" and {POSITIONS}" if learned is not None else "")
        values.append(ReportedValue("position", kind, source))
    elif learned is not None:
        # SAT's rotary mixin leaves the transformer's unused table in place; the sin-cos mixin deletes it.
        kind = "learned+rotary" if UNUSED_POSITIONS in infos else "sincos"
        values.append(ReportedValue("position", kind, _checkpoint_source(learned)))
    elif UNUSED_POSITIONS in infos:
        values.append(ReportedValue("position", "rotary", f"checkpoint: {UNUSED_POSITIONS} without {POSITIONS}"))
    if learned is not None and len(learned.shape) == 3:
        patches = table.shape[0] if table is not None else hints.get("patches")
        if isinstance(patches, int):
            source = f"{_checkpoint_source(learned)} less {patches} patches"
            values.append(ReportedValue("text_tokens", learned.shape[1] - patches, source))
    return values


def _lora_rank(infos: TensorInfos, problems: list[str]) -> list[ReportedValue]:
    """Return the rank of SAT's LoRA: ``matrix_A.i`` ``[rank, in]`` and ``matrix_B.i`` ``[out, rank]`` beside
    ``original``."""
    ranks = {
        info.shape[0] if ".matrix_A." in name else info.shape[1]
        for name, info in infos.items()
        if re.search(r"\.matrix_[AB]\.\d+$", name) and len(info.shape) == 2
    }
    if len(ranks) > 1:
        found = ", ".join(map(str, sorted(ranks)))
        problems.append(f"lora_rank: matrix_A and matrix_B of the checkpoint have ranks {found}")
    return [ReportedValue("lora_rank", rank, "checkpoint: matrix_A and matrix_B") for rank in sorted(ranks)[:1]]


def _conv_shape(infos: TensorInfos, name: str) -> tuple[int, ...] | None:
    """Return the shape of a 3D convolution's weight, ``None`` if there is none."""
    return infos[name].shape if name in infos and len(infos[name].shape) == 5 else None
