"""One hash for a set of weights, however they are stored: proves that two places hold the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of ``tensors``; their order does not matter. One tensor is held at a time."""
    lines = []
    for name, tensor in tensors:
        data = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
