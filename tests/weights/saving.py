"""Build a small transformer of random weights; TRAINED_WITH is what its checkpoint states about training."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

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
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 8,
        "text_embed_dim": 8,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 5,
        "max_text_seq_length": 8,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**(settings | changes))
