"""A small transformer and checkpoints of it, as training saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogflow.files.publish import publish_folder, write_json

TRAINED_WITH = {
    "scaling_factor": 0.7,
    "snr_shift_scale": 1.0,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "invert_scale_latents": False,
    "dtype": "fp32",
    "max_sequence_length": 8,
}


def small_transformer(**changes: Any) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16, "time_embed_dim": 8, "text_embed_dim": 8,
        "num_layers": 2, "sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    return CogVideoXTransformer3DModel(**(settings | changes))


@pytest.fixture
def transformer() -> CogVideoXTransformer3DModel:
    return small_transformer()


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Publish ``<tmp>/run/checkpoints/step-...`` from models, and return it."""

    def save(
        step: int, model: CogVideoXTransformer3DModel, ema: CogVideoXTransformer3DModel | None = None, dtype: str = "fp32", shard: str = "5GB"
    ) -> Path:
        target = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        with publish_folder(target) as folder:
            model.save_pretrained(folder / "transformer", max_shard_size=shard)
            if ema is not None:
                ema.save_pretrained(folder / "ema")
            (folder / "deepspeed").mkdir()
            (folder / "deepspeed" / "states.pt").write_bytes(b"optimizer")
            write_json(folder / "trainer.json", {"step": step, "family": "small", "model": {"name": "small"}, "trained_with": TRAINED_WITH | {"dtype": dtype}})
        return target

    return save
