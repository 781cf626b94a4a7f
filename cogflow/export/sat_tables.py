"""Which tensors of a SAT checkpoint belong to which component, and their names in SAT and in diffusers.

A SAT checkpoint holds the whole engine. :func:`split_components` separates it by prefixes. Each ``..._table``
function returns the operations that turn one component's tensors (names without prefix) into those of diffusers' or
transformers' class; the inverse table turns them back. The names are taken from the parameters of both
implementations: zai-org/CogVideo ``sat/`` (tag v1.0 for 1.0 models and the VAE, main for 1.5), diffusers and
transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from cogflow.errors import ConversionError
from cogflow.export.tensor_operations import (
    Alias,
    Drop,
    Operation,
    Rename,
    TensorFormula,
    TokenGrid,
    fill_names,
    regroup_rows,
    rotary_table,
    sincos_table,
    split_rows,
)
from cogflow.files.record_io import ForeignObject
from cogflow.weights.tensor_source import RenamedTensors, TensorSource

# Components of a checkpoint

TRANSFORMER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_ENCODER_PREFIX = "conditioner.embedders.0.transformer."

_PREFIXES = {"transformer": TRANSFORMER_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_ENCODER_PREFIX}
_FIRST_WORDS = {
    "transformer": (
        "mixins.",
        "transformer.layers.",
        "transformer.final_layernorm.",
        "transformer.position_embeddings.",
        "time_embed.",
        "ofs_embed.",
    ),
    "vae": ("encoder.", "decoder.", "loss."),
}


@dataclass(frozen=True)
class SatComponents:
    """Each component's tensors under names without prefix, ``None`` for absent ones. ``other``: names of no
    component."""

    transformer: RenamedTensors | None = None
    text_encoder: RenamedTensors | None = None
    vae: RenamedTensors | None = None
    other: list[str] = field(default_factory=list)


def split_components(tensors: TensorSource) -> SatComponents:
    """Separate a checkpoint's tensors by the engine's prefixes.

    A file with one component has no prefixes (``3d-vae.pt``, a transformer alone); there, the first words of the
    names decide.
    """
    names: dict[str, dict[str, str]] = {"transformer": {}, "text_encoder": {}, "vae": {}}
    other = []
    has_prefixes = any(name.startswith((TRANSFORMER_PREFIX, VAE_PREFIX, "conditioner.")) for name in tensors.tensors)
    for name in tensors.tensors:
        component = _component_of(name, has_prefixes)
        if component is None:
            other.append(name)
        else:
            names[component][name.removeprefix(_PREFIXES[component]) if has_prefixes else name] = name
    views = {component: RenamedTensors(tensors, mapping) if mapping else None for component, mapping in names.items()}
    return SatComponents(views["transformer"], views["text_encoder"], views["vae"], other)


def _component_of(name: str, has_prefixes: bool) -> str | None:
    starts: Mapping[str, str | tuple[str, ...]] = _PREFIXES if has_prefixes else _FIRST_WORDS
    return next((component for component, start in starts.items() if name.startswith(start)), None)


# Transformer: SAT's DiffusionTransformer and diffusers' CogVideoXTransformer3DModel. Both store the same numbers in
# the same order with two exceptions. SAT stacks query, key and value. SAT has one modulation of 12 chunks per block
# (shift, scale and gate of attention and of MLP for the video, then the same six for the text); diffusers has two
# modulations of six chunks.

MAX_SEQUENCE_LENGTH = 64
"""Rows of SAT's unused position embedding: ``transformer_args.max_sequence_length`` in every yaml of CogVideo."""

_KINDS = ("weight", "bias")

_TRANSFORMER_BLOCK = tuple(
    Rename(f"transformer.layers.{{layer}}.{sat}.{kind}", f"transformer_blocks.{{layer}}.{diffusers}.{kind}")
    for sat, diffusers in (
        ("input_layernorm", "norm1.norm"),
        ("post_attention_layernorm", "norm2.norm"),
        ("attention.dense", "attn1.to_out.0"),
        ("mlp.dense_h_to_4h", "ff.net.0.proj"),
        ("mlp.dense_4h_to_h", "ff.net.2"),
    )
    for kind in _KINDS
) + tuple(
    operation
    for kind in _KINDS
    for operation in (
        split_rows(
            f"transformer.layers.{{layer}}.attention.query_key_value.{kind}",
            *(f"transformer_blocks.{{layer}}.attn1.to_{part}.{kind}" for part in "qkv"),
        ),
        regroup_rows(
            f"mixins.adaln_layer.adaLN_modulations.{{layer}}.1.{kind}",
            {
                f"transformer_blocks.{{layer}}.norm1.linear.{kind}": (0, 1, 2, 6, 7, 8),
                f"transformer_blocks.{{layer}}.norm2.linear.{kind}": (3, 4, 5, 9, 10, 11),
            },
        ),
        Rename(
            f"mixins.adaln_layer.query_layernorm_list.{{layer}}.{kind}",
            f"transformer_blocks.{{layer}}.attn1.norm_q.{kind}",
        ),
        Rename(
            f"mixins.adaln_layer.key_layernorm_list.{{layer}}.{kind}",
            f"transformer_blocks.{{layer}}.attn1.norm_k.{kind}",
        ),
    )
)

_OUTSIDE_BLOCKS = {
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}
_OFS = {"ofs_embed.0": "ofs_embedding.linear_1", "ofs_embed.2": "ofs_embedding.linear_2"}


def transformer_table(config: ForeignObject, max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> tuple[Operation, ...]:
    """Return the operations from SAT to diffusers for a transformer with the given ``config.json`` of diffusers.

    ``max_sequence_length``: rows of SAT's unused position embedding, which the inverse writes as zeros. Raises
    :class:`ConversionError` for a config that lacks a key.
    """
    try:
        names = _OUTSIDE_BLOCKS | (_OFS if config.get("ofs_embed_dim") else {})
        linears = [Rename(f"{sat}.{kind}", f"{ours}.{kind}") for sat, ours in names.items() for kind in _KINDS]
        blocks = [
            operation
            for layer in range(config["num_layers"])
            for operation in fill_names(_TRANSFORMER_BLOCK, layer=layer)
        ]
        positions = _position_operations(config, max_sequence_length)
    except KeyError as error:
        raise _missing_key("transformer", error, "Give the config.json of CogVideoXTransformer3DModel.") from error
    return (*linears, *positions, *blocks)


def _position_operations(config: ForeignObject, max_sequence_length: int) -> list[Operation]:
    """Return the operations for the position tables that the model's kind stores.

    2B stores the sin-cos table. Rotary 1.0 models store both rotary tables; the image-to-video model also a learned
    table. 1.5 stores no table. Rotary models also store the position embedding of SAT's base class, which no forward
    reads.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    table_name = "mixins.pos_embed.pos_embedding"
    if not config.get("use_rotary_positional_embeddings", False):
        return [
            Drop(table_name, "sin-cos table, which diffusers computes from the config", _sincos_formula(config, width))
        ]
    operations: list[Operation] = []
    if config.get("use_learned_positional_embeddings", False):
        operations.append(Rename(table_name, "patch_embed.pos_embedding"))
    if config.get("patch_size_t") is None:
        reason = "rotary table, which diffusers computes from the grid"
        operations += [
            Drop(f"mixins.pos_embed.freqs_{name}", reason, _rotary_formula(config, index))
            for index, name in enumerate(("sin", "cos"))
        ]
    shape = (max_sequence_length, width)
    zeros = TensorFormula(
        shape, lambda: torch.zeros(shape), "zeros; SAT loads this tensor and never reads it", exact=False
    )
    operations.append(
        Drop("transformer.position_embeddings.weight", "unused; rotary positions replace this table", zeros)
    )
    return operations


def _native_grid(config: ForeignObject) -> TokenGrid:
    """Return the latent frames, token rows and token columns that the model was built for."""
    frames = (config["sample_frames"] - 1) // config.get("temporal_compression_ratio", 4) + 1
    patch = config["patch_size"]
    return TokenGrid(frames, config["sample_height"] // patch, config["sample_width"] // patch)


def _sincos_formula(config: ForeignObject, width: int) -> TensorFormula:
    grid = _native_grid(config)
    text = config["max_text_seq_length"]
    spatial = config["spatial_interpolation_scale"]
    temporal = config.get("temporal_interpolation_scale", 1.0)
    return TensorFormula(
        (1, text + grid.size, width),
        lambda: sincos_table(grid, width, text, spatial=spatial, temporal=temporal),
        f"sin-cos table of {grid} tokens, interpolation {spatial} and {temporal}",
    )


def _rotary_formula(config: ForeignObject, index: int) -> TensorFormula:
    grid = _native_grid(config)
    head_dim = config["attention_head_dim"]
    return TensorFormula(
        (grid.size, head_dim), lambda: rotary_table(grid, head_dim)[index], f"rotary table of {grid} tokens"
    )


def _missing_key(component: str, error: KeyError, hint: str) -> ConversionError:
    return ConversionError(f"The {component}'s config has no {error.args[0]}.", hint)


# VAE: SAT's 3d-vae.pt and diffusers' AutoencoderKLCogVideoX. Every tensor is kept. The decoder's levels are numbered
# from opposite ends.

_CONVOLUTIONS = ("conv1.conv", "conv2.conv")
_BLOCK_NORMS = {
    "encoder": ("norm1", "norm2"),
    # Two convolutions of the latent scale and shift the decoder's norms.
    "decoder": tuple(f"norm{i}.{part}" for i in (1, 2) for part in ("norm_layer", "conv_y.conv", "conv_b.conv")),
}
_LAST_NORM = {
    "encoder": ("norm_out",),
    "decoder": ("norm_out.norm_layer", "norm_out.conv_y.conv", "norm_out.conv_b.conv"),
}


def vae_table(config: ForeignObject, names: Iterable[str] = ()) -> tuple[Operation, ...]:
    """Return the operations from SAT to diffusers for a VAE. ``config``: ``block_out_channels`` and
    ``layers_per_block``.

    ``names``: the source's names; those of the training loss (``loss.*``: discriminator, perceptual network) are
    dropped. Raises :class:`ConversionError` for a config that lacks a key.
    """
    try:
        channels = list(config["block_out_channels"])
        layers = int(config["layers_per_block"])
    except KeyError as error:
        raise _missing_key("VAE", error, "Give the config.json of AutoencoderKLCogVideoX.") from error
    rows = [row for side in ("encoder", "decoder") for row in (*_vae_ends(side), *_vae_middle(side))]
    rows += [*_vae_encoder(channels, layers), *_vae_decoder(channels, layers)]
    losses = [Drop(name, "part of the training loss, not of the VAE") for name in names if name.startswith("loss.")]
    return (*rows, *losses)


def _renames(sat: str, diffusers: str, inner: Iterable[str] = ("",)) -> Iterator[Operation]:
    """Yield the renamings of weight and bias of each module in ``inner``."""
    for part in inner:
        for kind in _KINDS:
            yield Rename(f"{sat}{part}.{kind}", f"{diffusers}{part}.{kind}")


def _vae_ends(side: str) -> Iterator[Operation]:
    for part in ("conv_in.conv", *_LAST_NORM[side], "conv_out.conv"):
        yield from _renames(f"{side}.{part}", f"{side}.{part}")


def _residual_block(side: str, sat: str, diffusers: str, shortcut: bool = False) -> Iterator[Operation]:
    """Yield the operations of one residual block. ``shortcut``: the block changes the number of channels."""
    yield from _renames(f"{side}.{sat}.", f"{side}.{diffusers}.", (*_BLOCK_NORMS[side], *_CONVOLUTIONS))
    if shortcut:
        yield from _renames(f"{side}.{sat}.nin_shortcut", f"{side}.{diffusers}.conv_shortcut")


def _vae_middle(side: str) -> Iterator[Operation]:
    for block in range(2):
        yield from _residual_block(side, f"mid.block_{block + 1}", f"mid_block.resnets.{block}")


def _vae_encoder(channels: list[int], layers: int) -> Iterator[Operation]:
    for level, width in enumerate(channels):
        shortcut = width != channels[max(level - 1, 0)]
        for block in range(layers):
            names = (f"down.{level}.block.{block}", f"down_blocks.{level}.resnets.{block}")
            yield from _residual_block("encoder", *names, shortcut=block == 0 and shortcut)
        if level < len(channels) - 1:
            yield from _renames(
                f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
            )


def _vae_decoder(channels: list[int], layers: int) -> Iterator[Operation]:
    """Yield the decoder's operations. diffusers numbers its levels from the latent, SAT from the pixels.

    Each level has one block more than the encoder's.
    """
    last = len(channels) - 1
    for level, width in enumerate(channels):
        shortcut = width != channels[min(level + 1, last)]
        up_block = last - level
        for block in range(layers + 1):
            names = (f"up.{level}.block.{block}", f"up_blocks.{up_block}.resnets.{block}")
            yield from _residual_block("decoder", *names, shortcut=block == 0 and shortcut)
        if level > 0:
            yield from _renames(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{up_block}.upsamplers.0.conv")


# Text encoder: SAT's engine contains transformers' T5EncoderModel. SAT stores the token embedding under two names
# (one tensor); a saved T5EncoderModel stores it once.

SHARED_EMBEDDING = "shared.weight"
ENCODER_EMBEDDING = "encoder.embed_tokens.weight"

_T5_ATTENTION = (
    "layer.0.SelfAttention.q",
    "layer.0.SelfAttention.k",
    "layer.0.SelfAttention.v",
    "layer.0.SelfAttention.o",
    "layer.0.layer_norm",
)
_T5_GATED = (
    "layer.1.DenseReluDense.wi_0",
    "layer.1.DenseReluDense.wi_1",
    "layer.1.DenseReluDense.wo",
    "layer.1.layer_norm",
)
_T5_PLAIN = ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo", "layer.1.layer_norm")
_T5_OUTSIDE_BLOCKS = (
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.final_layer_norm.weight",
)


def text_encoder_table(
    config: ForeignObject, names: Collection[str] = (SHARED_EMBEDDING, ENCODER_EMBEDDING)
) -> tuple[Operation, ...]:
    """Return the operations from SAT to transformers for a T5. ``config``: ``num_layers`` and ``feed_forward_proj``.

    ``names``: the source's names. If it holds the embedding once, the embedding is renamed; if twice, both must be
    equal. Raises :class:`ConversionError` for a config that lacks a key.
    """
    try:
        layers = int(config["num_layers"])
        gated = str(config["feed_forward_proj"]).startswith("gated")
    except KeyError as error:
        raise _missing_key("text encoder", error, "Give the config.json of T5EncoderModel.") from error
    present = tuple(name for name in (SHARED_EMBEDDING, ENCODER_EMBEDDING) if name in names)
    embedding: Operation
    if len(present) == 2:
        embedding = Alias(present, SHARED_EMBEDDING)
    else:
        embedding = Rename(present[0] if present else SHARED_EMBEDDING, SHARED_EMBEDDING)
    modules = _T5_ATTENTION + (_T5_GATED if gated else _T5_PLAIN)
    in_blocks = [f"encoder.block.{layer}.{module}.weight" for layer in range(layers) for module in modules]
    return (embedding, *(Rename(name, name) for name in (*_T5_OUTSIDE_BLOCKS, *in_blocks)))
