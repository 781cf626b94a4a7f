"""How many blocks must compute their activations twice, so that a step fits: with ``deepspeed.checkpoint_every_block=0``."""

from __future__ import annotations

from dataclasses import replace

from cogflow.planning import memory
from cogflow.planning.memory import Sampling
from cogflow.planning.setting import Setting
from cogflow.planning.shape import Shape, Tokens

FILLED = 0.95
"""Share of a GPU's memory that a plan may fill: it is a prediction, and an hour of training lost to it costs more than a block."""


def asked(setting: Setting) -> bool:
    """Whether the settings leave the number to the memory there is."""
    return setting.checkpointing and setting.checkpoint_every == 0


def fitted(shape: Shape, tokens: Tokens, setting: Setting, sampling: Sampling | None, bytes_: float, *, encoder: float) -> Setting:
    """``setting`` with the fewest recomputed blocks that fit into ``bytes_`` of a GPU; all of them, when nothing fits."""
    for count in range(shape.layers):
        layout = replace(setting, blocks=count)
        if memory.gpu(shape, tokens, layout, sampling, encoder=encoder).peak <= FILLED * bytes_:
            return layout
    return replace(setting, blocks=shape.layers)
