"""Names of the text encoder: the T5 inside of a SAT engine and transformers' ``T5EncoderModel`` are the same class.

SAT keeps the token embedding under two names (``shared``, ``encoder.embed_tokens``: one tensor); a saved ``T5EncoderModel`` has
it once. Names come without ``conditioner.embedders.0.transformer.``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cogflow.errors import ConversionError
from cogflow.export.algebra import Alias, Operation, Rename, bound

SHARED, EMBEDDED = "shared.weight", "encoder.embed_tokens.weight"

_BLOCK = (
    "layer.0.SelfAttention.q",
    "layer.0.SelfAttention.k",
    "layer.0.SelfAttention.v",
    "layer.0.SelfAttention.o",
    "layer.0.layer_norm",
)
_GATED = (
    "layer.1.DenseReluDense.wi_0",
    "layer.1.DenseReluDense.wi_1",
    "layer.1.DenseReluDense.wo",
    "layer.1.layer_norm",
)
_PLAIN = ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo", "layer.1.layer_norm")


def table(config: Mapping[str, Any], names: Collection[str] = (SHARED, EMBEDDED)) -> tuple[Operation, ...]:
    """SAT to diffusers for one T5. ``config``: ``num_layers`` and ``feed_forward_proj`` of ``T5Config``.

    ``names``: the source's. Where it has the embedding once, it is renamed; where it has it twice, both must hold the same values.
    Raises :class:`ConversionError` for a config that lacks a key.
    """
    try:
        layers, gated = int(config["num_layers"]), str(config["feed_forward_proj"]).startswith("gated")
    except KeyError as error:
        raise ConversionError(
            f"The text encoder's config has no {error.args[0]}.", "Give the config.json of T5EncoderModel."
        ) from error
    present = tuple(name for name in (SHARED, EMBEDDED) if name in names)
    embedding: Operation = (
        Alias((SHARED, EMBEDDED), SHARED) if len(present) == 2 else Rename(present[0] if present else SHARED, SHARED)
    )
    names_in_block = (f"encoder.block.{{layer}}.{part}.weight" for part in _BLOCK + (_GATED if gated else _PLAIN))
    kept = tuple(Rename(name, name) for name in names_in_block)
    around = tuple(
        Rename(name, name)
        for name in (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.final_layer_norm.weight",
        )
    )
    return (embedding, *around, *(operation for layer in range(layers) for operation in bound(kept, layer=layer)))
