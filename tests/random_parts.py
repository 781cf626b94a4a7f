"""Components of a pipeline with random weights, each as small as its class allows.

Most have one block. They show that code loads, converts and samples; a model that makes sharp videos is
:mod:`cogflow.models.tiny`.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

WIDTH = 8
"""Width of the text embeddings."""


def new_transformer(**changes: Any) -> CogVideoXTransformer3DModel:
    """Return a transformer for videos of 5 frames of 32x32 and texts of 16 tokens. ``changes``: of its config."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": 1,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 5,
        "max_text_seq_length": 16,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**(settings | changes))


def new_vae(**changes: Any) -> AutoencoderKLCogVideoX:
    """Return a VAE of four levels with CogVideoX' compression. ``changes``: of its config."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 16,
    }
    return AutoencoderKLCogVideoX(**(settings | changes))


def new_text_encoder(vocab_size: int, **changes: Any) -> T5EncoderModel:
    """Return a T5 encoder of one layer, without dropout. ``changes``: of its config."""
    settings: dict[str, Any] = {
        "d_model": WIDTH,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    return T5EncoderModel(T5Config(vocab_size=vocab_size, **(settings | changes)))
