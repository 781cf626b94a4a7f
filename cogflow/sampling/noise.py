"""The initial noise of a sample: a function of seed and prompt id alone.

Not of the rank, the world size, the order of prompts, the batch, the step or the device: two samples of one prompt differ only by
what changed in the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def noise_for(seed: int, prompt_id: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal fp32 tensor of ``shape`` on the CPU."""
    digest = hashlib.sha256(f"cogflow:{seed}:{prompt_id}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
