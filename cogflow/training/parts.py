"""Which of a transformer's weights are trained, and whose activations are computed twice."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cogflow.config.problems import did_you_mean, nearest
from cogflow.config.schema import DeepSpeedConfig
from cogflow.errors import ConfigError


def freeze(transformer: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Have the parameters whose names match one of ``patterns`` (as file names match) stay as they are.

    Raises :class:`ConfigError` for a pattern that matches nothing, or when nothing is left to train.
    """
    names = [name for name, _ in transformer.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            tops = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"stage.freeze: {pattern} matches no weight.{did_you_mean(nearest(pattern, names))}",
                f"Names begin with {', '.join(tops)}; patterns are such as patch_embed.* or transformer_blocks.0.*",
            )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in transformer.parameters()):
        raise ConfigError(f"stage.freeze={list(patterns)} freezes every weight.", "Leave something to train.")


def recompute(transformer: Any, deepspeed: DeepSpeedConfig, count: int | None = None) -> None:
    """Drop the activations of all blocks, of every ``checkpoint_every_block``-th, or of ``count`` that are spread evenly, and compute them
    again in the backward pass."""
    if not deepspeed.activation_checkpointing:
        return
    blocks = list(transformer.transformer_blocks)
    if count is None:
        dropped = blocks[:: deepspeed.checkpoint_every_block]
    else:
        dropped = [blocks[place * len(blocks) // count] for place in range(count)]
    chosen = {id(block) for block in dropped}

    def selective(module: Any, *arguments: Any) -> Any:
        if id(module) not in chosen:
            return module(*arguments)
        return checkpoint(module.__call__, *arguments, use_reentrant=False)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=selective)
