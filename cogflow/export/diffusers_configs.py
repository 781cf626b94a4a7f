"""Configs of diffusers' and transformers' classes, written from settled facts.

Keys are those of the published CogVideoX pipelines. Where a key is no fact of SAT's weights, the value is the published one:

* ``norm_eps`` 1e-5. SAT's last norm (``final_layer.norm_final``) has 1e-6 where diffusers has one eps for all of them; the
  forward differs by 1.5e-5 for it. A pipeline with another config than its siblings' would surprise more than that does.
* The scheduler's class is ``CogVideoXDDIMScheduler``, for every member; CogVideo recommends ``CogVideoXDPMScheduler`` for the
  5B ones, and either class reads the other's config.
* ``patch_bias`` is false for 1.5, where diffusers does not read it: the linear patch embedding has its bias all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import transformers

from cogflow.errors import ConversionError
from cogflow.export.facts import SCHEDULER, Facts
from cogflow.export.shape_claims import Infos, indices

SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
VAE_GROUPS = 32
"""Groups of every GroupNorm in SAT's autoencoder; a constant of its code, which shapes do not show."""


def transformer_config(facts: Facts) -> dict[str, Any]:
    """config.json of ``CogVideoXTransformer3DModel``, every key spelled out: a class default is another model's at times.

    ``sample_height`` and ``sample_width`` are SAT's ``latent_height`` and ``latent_width``. 1.5's yaml has 300 x 300 there, the
    bounds of its rotary table and no picture's size: give the pipeline a height and a width when sampling.
    """
    kind, over_time = facts["position"], facts["patch_size_t"] is not None
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": diffusers.__version__,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": facts["head_dim"],
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": facts["in_channels"],
        "max_text_seq_length": facts["text_tokens"],
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "num_attention_heads": facts["heads"],
        "num_layers": facts["layers"],
        "ofs_embed_dim": facts["ofs_embed_dim"],
        "out_channels": facts["out_channels"],
        "patch_bias": not over_time,
        "patch_size": facts["patch_size"],
        "patch_size_t": facts["patch_size_t"],
        "sample_frames": (facts["latent_frames"] - 1) * facts["temporal_compression"] + 1,
        "sample_height": facts["latent_height"],
        "sample_width": facts["latent_width"],
        # Scale the sin-cos table; rotary models hold their class default and never read it.
        "spatial_interpolation_scale": facts["spatial_interpolation"] if kind == "sincos" else 1.875,
        "temporal_compression_ratio": facts["temporal_compression"],
        "temporal_interpolation_scale": facts["temporal_interpolation"] if kind == "sincos" else 1.0,
        "text_embed_dim": facts["text_width"],
        "time_embed_dim": facts["time_embed_dim"],
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": kind == "learned+rotary",
        "use_rotary_positional_embeddings": kind != "sincos",
    }


def scheduler_config(facts: Facts, class_name: str = SCHEDULERS[0]) -> dict[str, Any]:
    """scheduler_config.json of one of ``SCHEDULERS``, with the published keys."""
    return {
        "_class_name": class_name,
        "_diffusers_version": diffusers.__version__,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        **SCHEDULER,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": facts["snr_shift_scale"],
        "steps_offset": 0,
        "trained_betas": None,
    }


def vae_config(facts: Facts) -> dict[str, Any]:
    """config.json of ``AutoencoderKLCogVideoX`` from :func:`~cogflow.export.facts.gather_vae`'s facts.

    ``sample_height`` and ``sample_width`` size the tiles of a tiled decode alone; the published values stand for every member.
    """
    levels = len(facts["block_out_channels"])
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "_diffusers_version": diffusers.__version__,
        "act_fn": "silu",
        "block_out_channels": list(facts["block_out_channels"]),
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "force_upcast": True,
        "in_channels": facts["vae_in_channels"],
        "invert_scale_latents": facts["invert_scale_latents"],
        "latent_channels": facts["latent_channels"],
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": facts["layers_per_block"],
        "norm_eps": 1e-6,
        "norm_num_groups": VAE_GROUPS,
        "out_channels": facts["vae_out_channels"],
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": facts["scaling_factor"],
        "shift_factor": None,
        "temporal_compression_ratio": facts["temporal_compression"],
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def t5_config(infos: Infos, dtype: str = "fp32") -> dict[str, Any]:
    """config.json of ``T5EncoderModel`` from the shapes of SAT's ``conditioner.embedders.0.transformer.*`` (prefix stripped).

    SAT holds a T5 v1.1 (gated gelu, two inner matrices); a T5 of the first release (relu, one matrix) is told by its tensors.
    Raises :class:`ConversionError` naming the tensors that are missing or do not fit together.
    """
    block = "encoder.block.0.layer"
    gated = f"{block}.1.DenseReluDense.wi.weight" not in infos
    wanted = {
        "shared": "shared.weight",
        "query": f"{block}.0.SelfAttention.q.weight",
        "bias": f"{block}.0.SelfAttention.relative_attention_bias.weight",
        "inner": f"{block}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight",
    }
    missing = [name for name in wanted.values() if name not in infos or len(infos[name].shape) != 2]
    if missing:
        raise ConversionError(
            f"This is no T5 encoder: {', '.join(missing)} missing.", "CogVideoX's text encoder is t5-v1_1-xxl."
        )
    (vocabulary, width), (inner, _), (buckets, heads), (feed, _) = (infos[name].shape for name in wanted.values())
    if inner % heads:
        raise ConversionError(
            f"{wanted['query']} has {inner} rows, which {heads} heads ({wanted['bias']}) do not divide."
        )
    return {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": feed,
        "d_kv": inner // heads,
        "d_model": width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new" if gated else "relu",
        "dropout_rate": 0.1,
        "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": False,
        "is_gated_act": gated,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_decoder_layers": len(indices(infos, "encoder.block")),
        "num_heads": heads,
        "num_layers": len(indices(infos, "encoder.block")),
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "tie_word_embeddings": False,
        "transformers_version": transformers.__version__,
        "use_cache": False,
        "vocab_size": vocabulary,
    }


def model_index(facts: Facts, scheduler: str = SCHEDULERS[0], tokenizer: str = "T5Tokenizer") -> dict[str, Any]:
    """model_index.json of the pipeline these weights belong to: text to video, or image to video by the channels."""
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if facts.image_to_video else "CogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's settings without the keys that say where it came from (``_class_name``, ``_diffusers_version``)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
