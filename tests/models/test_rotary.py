"""``rotary_tables`` equals the tables of diffusers' pipeline, at native and other sizes, for 1.0 and 1.5."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogflow.models.transformer_inputs import rotary_tables


@pytest.mark.parametrize("patch_size_t", [None, 2])
@pytest.mark.parametrize("grid", [(3, 8, 12), (5, 6, 8), (2, 6, 6)])
def test_training_and_sampling_use_the_same_positions(patch_size_t: int | None, grid: tuple[int, int, int]) -> None:
    config = SimpleNamespace(
        use_rotary_positional_embeddings=True,
        patch_size=2,
        patch_size_t=patch_size_t,
        sample_width=12,
        sample_height=8,
        attention_head_dim=32,
    )
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=config), vae_scale_factor_spatial=8)
    frames, height, width = grid
    wanted = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, height=8 * height, width=8 * width, num_frames=frames, device=torch.device("cpu")
    )
    ours = rotary_tables(SimpleNamespace(config=config), frames, height, width, torch.device("cpu"))
    assert ours is not None and all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_sincos_models_have_no_rotary_tables() -> None:
    transformer = SimpleNamespace(config=SimpleNamespace(use_rotary_positional_embeddings=False))
    assert rotary_tables(transformer, 3, 8, 12, torch.device("cpu")) is None
