"""Build the configs of diffusers' and transformers' classes from resolved facts.

Keys are those of the published CogVideoX pipelines. Keys that no fact of SAT's weights decides have the published
values:

* ``norm_eps`` is 1e-5. SAT's last norm (``final_layer.norm_final``) has 1e-6, but diffusers has one eps for all
  norms. This changes the forward by 1.5e-5. Another value would make the config differ from the published pipelines.
* The scheduler's class is ``CogVideoXDDIMScheduler`` for every member. CogVideo recommends ``CogVideoXDPMScheduler``
  for 5B models; each class reads the other's config.
* ``patch_bias`` is false for 1.5, where diffusers does not read it: the linear patch embedding always has a bias.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import diffusers
import transformers

from cogflow.errors import ConversionError
from cogflow.export.facts import TransformerFacts, VaeFacts
from cogflow.export.reported_values import TensorInfos, numbered_children
from cogflow.files.bounded_parsing import large_values
from cogflow.files.record_io import ForeignObject

DiffusersConfig: TypeAlias = dict[str, Any]
"""Content of a ``config.json`` of diffusers or transformers."""

SCHEDULER_CLASSES = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")

VAE_GROUPS = 32
"""Groups of every GroupNorm in SAT's VAE: a constant of its code, which shapes do not show."""


def transformer_config(facts: TransformerFacts) -> DiffusersConfig:
    """Return ``config.json`` of ``CogVideoXTransformer3DModel`` with every key, since class defaults fit only some
    models.

    ``sample_height`` and ``sample_width`` are SAT's ``latent_height`` and ``latent_width``. 1.5's yaml has 300 x 300
    there, the limits of its rotary table, not a video size: give the pipeline a height and a width when sampling.
    """
    kind = facts.position
    return _checked(
        {
            "_class_name": "CogVideoXTransformer3DModel",
            "_diffusers_version": diffusers.__version__,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": facts.head_dim,
            "dropout": 0.0,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": facts.in_channels,
            "max_text_seq_length": facts.text_tokens,
            "norm_elementwise_affine": True,
            "norm_eps": 1e-5,
            "num_attention_heads": facts.heads,
            "num_layers": facts.layers,
            "ofs_embed_dim": facts.ofs_embed_dim,
            "out_channels": facts.out_channels,
            "patch_bias": facts.patch_size_t is None,
            "patch_size": facts.patch_size,
            "patch_size_t": facts.patch_size_t,
            "sample_frames": (facts.latent_frames - 1) * facts.temporal_compression + 1,
            "sample_height": facts.latent_height,
            "sample_width": facts.latent_width,
            # These scale the sin-cos table. Rotary models never read them and have the class default.
            "spatial_interpolation_scale": facts.spatial_interpolation if kind == "sincos" else 1.875,
            "temporal_compression_ratio": facts.temporal_compression,
            "temporal_interpolation_scale": facts.temporal_interpolation if kind == "sincos" else 1.0,
            "text_embed_dim": facts.text_width,
            "time_embed_dim": facts.time_embed_dim,
            "timestep_activation_fn": "silu",
            "use_learned_positional_embeddings": kind == "learned+rotary",
            "use_rotary_positional_embeddings": kind != "sincos",
        }
    )


def _checked(config: DiffusersConfig) -> DiffusersConfig:
    """Return ``config``. Raises :class:`ConversionError` for numbers beyond all models, which a yaml may state."""
    if problems := large_values(config):
        raise ConversionError(f"The facts describe no model that is built: {'; '.join(problems[:5])}.")
    return config


def scheduler_config(facts: TransformerFacts, class_name: str = SCHEDULER_CLASSES[0]) -> DiffusersConfig:
    """Return ``scheduler_config.json`` of one of SCHEDULER_CLASSES with the published keys."""
    trained_with = facts.trained_with()
    return {
        "_class_name": class_name,
        "_diffusers_version": diffusers.__version__,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": trained_with.prediction_type,
        "timestep_spacing": trained_with.timestep_spacing,
        "rescale_betas_zero_snr": trained_with.rescale_betas_zero_snr,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": facts.snr_shift_scale,
        "steps_offset": 0,
        "trained_betas": None,
    }


def vae_config(facts: VaeFacts) -> DiffusersConfig:
    """Return ``config.json`` of ``AutoencoderKLCogVideoX``.

    ``sample_height`` and ``sample_width`` set only the tile size of a tiled decode; all members have the published
    values.
    """
    levels = len(facts.block_out_channels)
    return _checked(
        {
            "_class_name": "AutoencoderKLCogVideoX",
            "_diffusers_version": diffusers.__version__,
            "act_fn": "silu",
            "block_out_channels": list(facts.block_out_channels),
            "down_block_types": ["CogVideoXDownBlock3D"] * levels,
            "force_upcast": True,
            "in_channels": facts.vae_in_channels,
            "invert_scale_latents": facts.invert_scale_latents,
            "latent_channels": facts.latent_channels,
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": facts.layers_per_block,
            "norm_eps": 1e-6,
            "norm_num_groups": VAE_GROUPS,
            "out_channels": facts.vae_out_channels,
            "sample_height": 480,
            "sample_width": 720,
            "scaling_factor": facts.scaling_factor,
            "shift_factor": None,
            "temporal_compression_ratio": facts.temporal_compression,
            "up_block_types": ["CogVideoXUpBlock3D"] * levels,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        }
    )


def t5_config(infos: TensorInfos, dtype: str = "fp32") -> DiffusersConfig:
    """Return ``config.json`` of ``T5EncoderModel`` from the shapes of SAT's text encoder (names without prefix).

    A T5 v1.1 has a gated gelu with two inner matrices (wi_0, wi_1), a T5 of the first release has relu and one (wi).
    ``dtype``: fp32, bf16 or fp16. Raises :class:`ConversionError` naming the tensors that are missing or do not fit
    together.
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
            f"{wanted['query']} has {inner} rows, which do not divide into {heads} heads ({wanted['bias']})."
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
        "num_decoder_layers": len(numbered_children(infos, "encoder.block")),
        "num_heads": heads,
        "num_layers": len(numbered_children(infos, "encoder.block")),
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "tie_word_embeddings": False,
        "transformers_version": transformers.__version__,
        "use_cache": False,
        "vocab_size": vocabulary,
    }


def model_index_config(facts: TransformerFacts) -> DiffusersConfig:
    """Return ``model_index.json`` of the pipeline that the weights belong to: text-to-video or image-to-video."""
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if facts.image_to_video else "CogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", SCHEDULER_CLASSES[0]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def settings_of(config: ForeignObject) -> DiffusersConfig:
    """Return a config without the keys that describe the file (``_class_name``, ``_diffusers_version``)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
