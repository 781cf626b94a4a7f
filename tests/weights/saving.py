"""Build a small transformer of random weights; TRAINED_WITH is what its checkpoint states about training."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from tests.random_parts import new_transformer

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
    return new_transformer(**({"num_layers": 2, "max_text_seq_length": 8} | changes))
