"""The tiny model: the classes of diffusers and transformers at small sizes, with the properties of CogVideoX-5B.

These are rotary positions, v-prediction, zero terminal SNR, SNR shift 1.0 and scaling factor 0.7. The package ships the
weights (:func:`folder`); ``python -m tools.pretrain_tiny`` makes them.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from cogflow.models.family import MODEL_SPECS

SPEC = MODEL_SPECS["tiny"]


def folder() -> Path:
    """Return the shipped pipeline folder."""
    return Path(__file__).resolve().parent.parent / "assets" / "tiny"


def new_vae() -> AutoencoderKLCogVideoX:
    """Return a VAE of 1.9 million random parameters."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=SPEC.latent_channels,
        sample_height=SPEC.height,
        sample_width=SPEC.width,
        scaling_factor=SPEC.scaling_factor,
    )


def new_transformer() -> CogVideoXTransformer3DModel:
    """Return a transformer of 3 million random parameters."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=SPEC.heads,
        attention_head_dim=SPEC.head_dim,
        in_channels=SPEC.in_channels,
        out_channels=SPEC.latent_channels,
        time_embed_dim=64,
        text_embed_dim=SPEC.text_width,
        num_layers=SPEC.layers,
        sample_width=SPEC.width // 8,
        sample_height=SPEC.height // 8,
        sample_frames=SPEC.frames,
        patch_size=SPEC.patch_size,
        max_text_seq_length=SPEC.text_tokens,
        use_rotary_positional_embeddings=True,
    )


def new_text_encoder(vocab_size: int) -> T5EncoderModel:
    """Return a T5 v1.1 encoder of two layers with random parameters."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=SPEC.text_width,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
            use_cache=False,
            is_encoder_decoder=False,
        )
    )


def new_scheduler() -> CogVideoXDDIMScheduler:
    """Return the DDIM scheduler with CogVideoX-5B's settings."""
    return CogVideoXDDIMScheduler(**SPEC.scheduler_config())
