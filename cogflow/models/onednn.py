"""Convolutions of the autoencoder on a CPU by oneDNN, whatever their size: torch has it for large ones alone, and unfolds small ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _ByOneDNN:
    """Stands in for one convolution's own; gradients, other devices and other dtypes go the usual way."""

    def __init__(self, module: nn.Conv3d) -> None:
        self.module = module

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        module = self.module
        if input.device.type != "cpu" or {input.dtype, weight.dtype} != {torch.float32} or torch.is_grad_enabled():
            return nn.Conv3d._conv_forward(module, input, weight, bias)
        given = (list(sizes) for sizes in (module.padding, module.stride, module.dilation))
        return torch.ops.aten.mkldnn_convolution(input, weight, bias, *given, module.groups)


def by_onednn(vae: Any) -> Any:
    """``vae`` itself. The tiny one decodes a clip three times as fast; the published ones are large enough for torch to choose so by
    itself, and give the same as before."""
    if torch.backends.mkldnn.is_available():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
                module._conv_forward = _ByOneDNN(module)
    return vae
