"""Names of the video autoencoder: SAT's 3d VAE (``3d-vae.pt``, ``first_stage_model.*``) and diffusers' ``AutoencoderKLCogVideoX``.

Sources: the parameters of both. Every tensor is kept as it is; the decoder's levels are numbered from the other end. Names come
without ``first_stage_model.``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cogflow.errors import ConversionError
from cogflow.export.algebra import Operation, Rename, bound
from cogflow.export.recomputed_tensors import Drop

_KINDS = ("weight", "bias")
_CONVOLUTIONS = ("conv1.conv", "conv2.conv")
_NORMS = {
    "encoder": ("norm1", "norm2"),
    # the decoder's norms are scaled and shifted by two convolutions of the latent
    "decoder": tuple(f"norm{i}.{part}" for i in (1, 2) for part in ("norm_layer", "conv_y.conv", "conv_b.conv")),
}
_LAST_NORM = {
    "encoder": ("norm_out",),
    "decoder": ("norm_out.norm_layer", "norm_out.conv_y.conv", "norm_out.conv_b.conv"),
}


def table(config: Mapping[str, Any], names: Iterable[str] = ()) -> tuple[Operation, ...]:
    """SAT to diffusers for one VAE. ``config``: ``block_out_channels`` and ``layers_per_block`` of ``AutoencoderKLCogVideoX``.

    ``names``: the source's; those of the training loss (``loss.*``: discriminator, perceptual network) are dropped. Raises
    :class:`ConversionError` for a config that lacks one of the two keys.
    """
    try:
        channels, layers = list(config["block_out_channels"]), int(config["layers_per_block"])
    except KeyError as error:
        raise ConversionError(
            f"The VAE's config has no {error.args[0]}.", "Give the config that AutoencoderKLCogVideoX is built with."
        ) from error
    rows = [row for side in ("encoder", "decoder") for row in (*_ends(side), *_middle(side))]
    rows += [*_encoder(channels, layers), *_decoder(channels, layers)]
    losses = [Drop(name, "part of the training loss, not of the VAE") for name in names if name.startswith("loss.")]
    return (*rows, *losses)


def _pairs(sat: str, ours: str, inner: Iterable[str] = ("",)) -> Iterator[Operation]:
    for part in inner:
        for kind in _KINDS:
            yield Rename(f"{sat}{part}.{kind}", f"{ours}{part}.{kind}")


def _ends(side: str) -> Iterator[Operation]:
    for part in ("conv_in.conv", *_LAST_NORM[side], "conv_out.conv"):
        yield from _pairs(f"{side}.{part}", f"{side}.{part}")


def _block(side: str, sat: str, ours: str, shortcut: bool = False) -> Iterator[Operation]:
    """One residual block. ``shortcut``: it changes the number of channels."""
    yield from _pairs(f"{side}.{sat}.", f"{side}.{ours}.", (*_NORMS[side], *_CONVOLUTIONS))
    if shortcut:
        yield from _pairs(f"{side}.{sat}.nin_shortcut", f"{side}.{ours}.conv_shortcut")


def _middle(side: str) -> Iterator[Operation]:
    for block in range(2):
        yield from _block(side, f"mid.block_{block + 1}", f"mid_block.resnets.{block}")


def _encoder(channels: list[int], layers: int) -> Iterator[Operation]:
    for level, width in enumerate(channels):
        before = channels[max(level - 1, 0)]
        for block in range(layers):
            where = f"down.{level}.block.{block}", f"down_blocks.{level}.resnets.{block}"
            yield from _block("encoder", *where, shortcut=block == 0 and width != before)
        if level < len(channels) - 1:
            yield from _pairs(
                f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
            )


def _decoder(channels: list[int], layers: int) -> Iterator[Operation]:
    """diffusers counts the decoder's levels from the latent outwards, SAT from the pixels inwards; each has one block more."""
    last = len(channels) - 1
    for level, width in enumerate(channels):
        before = channels[min(level + 1, last)]
        row = tuple(
            operation
            for block in range(layers + 1)
            for operation in _block(
                "decoder",
                f"up.{{sat}}.block.{block}",
                f"up_blocks.{{ours}}.resnets.{block}",
                shortcut=block == 0 and width != before,
            )
        )
        if level > 0:
            row += tuple(_pairs("decoder.up.{sat}.upsample.conv", "decoder.up_blocks.{ours}.upsamplers.0.conv"))
        yield from bound(row, sat=level, ours=last - level)
