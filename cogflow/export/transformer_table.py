"""Names of the video transformer: SAT's ``DiffusionTransformer`` and diffusers' ``CogVideoXTransformer3DModel``.

Sources: the parameters of both classes. SAT names come without ``model.diffusion_model.``. The two keep the same numbers in the
same order but for two things: SAT stacks query, key and value; and one modulation of 12 chunks per block
(shift, scale, gate of attention and of MLP for the video, the same six for the text) serves what diffusers keeps as two of six.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cogflow.errors import ConversionError
from cogflow.export import positions
from cogflow.export.algebra import Operation, Rename, Shape, bound, regroup, split
from cogflow.export.recomputed_tensors import Drop, Recipe

MAX_SEQUENCE_LENGTH = 64
"""Rows of SAT's unused position embedding: ``transformer_args.max_sequence_length`` in every yaml that CogVideo ships."""

_BLOCK = tuple(
    Rename(f"transformer.layers.{{layer}}.{sat}.{kind}", f"transformer_blocks.{{layer}}.{ours}.{kind}")
    for sat, ours in (
        ("input_layernorm", "norm1.norm"),
        ("post_attention_layernorm", "norm2.norm"),
        ("attention.dense", "attn1.to_out.0"),
        ("mlp.dense_h_to_4h", "ff.net.0.proj"),
        ("mlp.dense_4h_to_h", "ff.net.2"),
    )
    for kind in ("weight", "bias")
) + tuple(
    operation
    for kind in ("weight", "bias")
    for operation in (
        split(
            f"transformer.layers.{{layer}}.attention.query_key_value.{kind}",
            *(f"transformer_blocks.{{layer}}.attn1.to_{part}.{kind}" for part in "qkv"),
        ),
        regroup(
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

_AROUND = {
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


def table(config: Mapping[str, Any], max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> tuple[Operation, ...]:
    """SAT to diffusers for one model. ``config``: keyword arguments of ``CogVideoXTransformer3DModel``.

    ``max_sequence_length``: rows of the unused embedding that the way back writes. Raises :class:`ConversionError` for a config
    that lacks a key.
    """
    try:
        around = _AROUND | (_OFS if config.get("ofs_embed_dim") else {})
        blocks = [operation for layer in range(config["num_layers"]) for operation in bound(_BLOCK, layer=layer)]
        return (*_linears(around), *_positions(config, max_sequence_length), *blocks)
    except KeyError as error:
        raise ConversionError(
            f"The transformer's config has no {error.args[0]}.",
            "Give the config that CogVideoXTransformer3DModel is built with.",
        ) from error


def _linears(names: Mapping[str, str]) -> list[Operation]:
    return [Rename(f"{sat}.{kind}", f"{ours}.{kind}") for sat, ours in names.items() for kind in ("weight", "bias")]


def _positions(config: Mapping[str, Any], max_sequence_length: int) -> list[Operation]:
    """What each kind of model stores of its positions.

    2B: the sin-cos table. 1.0 with rotary: both rotary tables, with a learned table beside them for I2V. 1.5: no table. With
    rotary positions also the base class's own position embedding, which no forward reads.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    rotary, learned = (
        config.get("use_rotary_positional_embeddings", False),
        config.get("use_learned_positional_embeddings", False),
    )
    if not rotary:
        return [
            Drop(
                "mixins.pos_embed.pos_embedding",
                "sin-cos table, which diffusers computes from the config",
                _sincos(config, width),
            )
        ]
    found: list[Operation] = []
    if learned:
        found.append(Rename("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding"))
    if config.get("patch_size_t") is None:
        for index, name in enumerate(("sin", "cos")):
            recipe = _rotary(config, index)
            found.append(
                Drop(f"mixins.pos_embed.freqs_{name}", "rotary table, which diffusers computes from the grid", recipe)
            )
    shape = (max_sequence_length, width)
    zeros = Recipe(shape, lambda: torch.zeros(shape), "zeros: SAT loads this tensor and never reads it", exact=False)
    found.append(Drop("transformer.position_embeddings.weight", "unused: rotary positions take its place", zeros))
    return found


def grid(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(latent frames, token rows, token columns) that the model was built for."""
    frames = (config["sample_frames"] - 1) // config.get("temporal_compression_ratio", 4) + 1
    return frames, config["sample_height"] // config["patch_size"], config["sample_width"] // config["patch_size"]


def _sincos(config: Mapping[str, Any], width: int) -> Recipe:
    frames, rows, columns = grid(config)
    text = config["max_text_seq_length"]
    spatial, temporal = config["spatial_interpolation_scale"], config.get("temporal_interpolation_scale", 1.0)
    shape: Shape = (1, text + frames * rows * columns, width)
    return Recipe(
        shape,
        lambda: positions.sincos(frames, rows, columns, width, text, spatial, temporal),
        f"sin-cos table of {frames} x {rows} x {columns} tokens, interpolation {spatial} and {temporal}",
    )


def _rotary(config: Mapping[str, Any], index: int) -> Recipe:
    frames, rows, columns = grid(config)
    head_dim = config["attention_head_dim"]
    return Recipe(
        (frames * rows * columns, head_dim),
        lambda: positions.rotary(frames, rows, columns, head_dim)[index],
        f"rotary table of {frames} x {rows} x {columns} tokens",
    )
