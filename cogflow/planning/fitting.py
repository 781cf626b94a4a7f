"""How much blocks may keep of their activations, so that a step fits and as little as possible is computed twice: with
``deepspeed.checkpoint_every_block=0`` and ``deepspeed.checkpoint_keep=auto``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

from cogflow.config.deepspeed_section import EVERYTHING, KEEPS, SHARDED_KEEPS
from cogflow.planning import flops, memory
from cogflow.planning.gpu_layout import GpuLayout
from cogflow.planning.memory import Sampling
from cogflow.planning.transformer_size import Tokens, TransformerSize

FILLED = 0.95
"""Share of a GPU's memory that a plan may fill: it is a prediction, and an hour of training lost to it costs more than a block."""


def asked(setting: GpuLayout) -> bool:
    """Whether the settings leave something to the memory there is."""
    return setting.checkpointing and (setting.checkpoint_every == 0 or setting.keep == "auto")


def fitted(
    shape: TransformerSize,
    tokens: Tokens,
    setting: GpuLayout,
    sampling: Sampling | None,
    bytes_: float,
    *,
    encoder: float,
) -> GpuLayout:
    """``setting`` with the least recomputation that fits into ``bytes_`` of a GPU; with all of it, when nothing fits."""

    def again(kept: Mapping[str, int]) -> tuple[float, int]:
        """Operations that are done twice, then blocks whose norms and activations are."""
        return flops.step(shape, tokens, kept).recomputation, shape.layers - kept.get(EVERYTHING, 0)

    ways = sorted(_ways(setting, shape.layers), key=again)
    for kept in ways:
        layout = replace(setting, fitted=kept)
        if memory.gpu(shape, tokens, layout, sampling, encoder=encoder).peak <= FILLED * bytes_:
            return layout
    return replace(setting, fitted=ways[-1])


def _ways(setting: GpuLayout, layers: int) -> Iterator[Mapping[str, int]]:
    """All that the settings allow: no block is further from another than one kind, of which the first keeps less."""
    fixed = len(range(0, layers, setting.checkpoint_every)) if setting.checkpoint_every else None
    keeps = [setting.keep] if setting.keep != "auto" else SHARDED_KEEPS if setting.zero_stage == 3 else KEEPS
    kinds = [*keeps, EVERYTHING]
    if fixed is not None:
        yield from ({kind: fixed, EVERYTHING: layers - fixed} for kind in kinds if kind != EVERYTHING)
        return
    for less, more in pairwise(kinds):
        yield from ({less: count, more: layers - count} for count in range(layers + 1))
