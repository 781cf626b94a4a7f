"""The noise of a sample, as a function of the seed and the prompt id.

It does not depend on the rank, the world size, the order of prompts, the batch, the step or the device. Two samples of
one prompt differ only by the changes of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def noise_for(seed: int, prompt_id: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the initial noise: a standard normal fp32 tensor of ``shape`` on the CPU."""
    return torch.randn(tuple(shape), generator=_generator(f"cogflow:{seed}:{prompt_id}"), dtype=torch.float32)


def step_generator(seed: int, prompt_id: str) -> torch.Generator:
    """Return a new generator on the CPU for the noise that a stochastic sampler draws between steps."""
    return _generator(f"cogflow:steps:{seed}:{prompt_id}")


def latent_frames(frames: int, compression: int, patch_size_t: int | None) -> tuple[int, int]:
    """Return (latent frames of a clip of ``frames``, number of padding frames among them).

    A transformer that patches over time (1.5) takes whole patches only. SAT and diffusers both pad in front and drop
    the padding in the end.
    """
    needed = (frames - 1) // compression + 1
    padded = -needed % patch_size_t if patch_size_t else 0
    return needed + padded, padded


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
