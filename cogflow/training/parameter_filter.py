"""Which of a transformer's weights are trained."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch

from cogflow.config.problems import did_you_mean, nearest
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
