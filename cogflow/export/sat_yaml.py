"""Build the files that SAT needs beside its weights: the per-model yaml, training_config.yaml and model_config.json.

Source of the layout: zai-org/CogVideo, ``sat/configs`` at v1.0 (1.0 models) and main (1.5 models).
"""

from __future__ import annotations

from typing import Any, TypeAlias

from cogflow.errors import ConversionError
from cogflow.files.record_io import ForeignObject

SatYaml: TypeAlias = dict[str, Any]
"""Content of a yaml file of SAT, or of a section of one."""

_DIFFUSION = "sgm.modules.diffusionmodules"
MAX_SEQUENCE_LENGTH = 64
"""Rows of the position table that SAT's transformer builds and CogVideoX never reads; 64 in every yaml of CogVideo."""


def model_yaml(transformer: ForeignObject, scheduler: ForeignObject, vae: ForeignObject) -> SatYaml:
    """Return ``{"model": ...}``, SAT's per-model yaml for the diffusers configs of a pipeline.

    ``transformer``: every key that :func:`~cogflow.export.diffusers_configs.transformer_config` writes. The user sets
    the paths in the yaml (``t5-v1_1-xxl``, ``vae/3d-vae.pt``). Raises :class:`ConversionError` for a setting that SAT
    does not have.
    """
    _refuse_inexpressible(transformer, scheduler)
    steps = _schedule(float(scheduler["snr_shift_scale"]))
    image = transformer["in_channels"] != transformer["out_channels"]
    is_1_5 = transformer["patch_size_t"] is not None
    # 1.5's denoiser asks for an ofs whenever the network has that embedding.
    fixed = {"fixed_frames": 0} if image else {}
    model: SatYaml = {"scale_factor": vae["scaling_factor"], "disable_first_stage_autocast": True}
    if image:
        model |= {"latent_input": False, "noised_image_input": True, "noised_image_dropout": 0.05}
    elif is_1_5:
        model |= {"latent_input": True}
    return {
        "model": model
        | {
            "log_keys": ["txt"],
            "denoiser_config": {
                "target": f"{_DIFFUSION}.denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": 1000,
                    "quantize_c_noise": False,
                    "weighting_config": {"target": f"{_DIFFUSION}.denoiser_weighting.EpsWeighting"},
                    "scaling_config": {"target": f"{_DIFFUSION}.denoiser_scaling.VideoScaling"},
                    "discretization_config": steps,
                },
            },
            "network_config": {"target": "dit_video_concat.DiffusionTransformer", "params": _network(transformer)},
            "conditioner_config": _conditioner(int(transformer["max_text_seq_length"])),
            "first_stage_config": _first_stage(vae),
            "loss_fn_config": {
                "target": f"{_DIFFUSION}.loss.VideoDiffusionLoss",
                "params": {
                    **fixed,
                    "offset_noise_level": 0,
                    "sigma_sampler_config": {
                        "target": f"{_DIFFUSION}.sigma_sampling.DiscreteSampling",
                        "params": {"uniform_sampling": True, "num_idx": 1000, "discretization_config": steps},
                    },
                },
            },
            "sampler_config": {
                "target": f"{_DIFFUSION}.sampling.VPSDEDPMPP2MSampler",
                "params": {
                    **fixed,
                    "num_steps": 50,
                    "verbose": True,
                    "discretization_config": steps,
                    "guider_config": {
                        "target": f"{_DIFFUSION}.guiders.DynamicCFG",
                        "params": {"scale": 6, "exp": 5, "num_steps": 50},
                    },
                },
            },
        }
    }


def training_config(model: ForeignObject, dtype: str) -> SatYaml:
    """Return a merged ``training_config.yaml``: the result of :func:`model_yaml` and the dtype, fp32, bf16 or fp16."""
    return {
        **model,
        "args": {"checkpoint_activations": True, "model_parallel_size": 1, "mode": "finetune", "no_load_rng": True},
        "deepspeed": {"bf16": {"enabled": dtype == "bf16"}, "fp16": {"enabled": dtype == "fp16"}},
    }


def model_config(transformer: ForeignObject) -> SatYaml:
    """Return ``model_config.json`` as SAT's save_checkpoint writes it."""
    return {
        "model_class": "SATVideoDiffusionEngine",
        "num_layers": transformer["num_layers"],
        "hidden_size": transformer["num_attention_heads"] * transformer["attention_head_dim"],
        "num_attention_heads": transformer["num_attention_heads"],
        "vocab_size": 1,
        "layernorm_order": "pre",
        "model_parallel_size": 1,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }


def _refuse_inexpressible(transformer: ForeignObject, scheduler: ForeignObject) -> None:
    wanted: tuple[tuple[ForeignObject, str, Any], ...] = (
        (scheduler, "prediction_type", "v_prediction"),
        (scheduler, "rescale_betas_zero_snr", True),
        (scheduler, "num_train_timesteps", 1000),
        (scheduler, "beta_schedule", "scaled_linear"),
        (scheduler, "beta_start", 0.00085),
        (scheduler, "beta_end", 0.012),
        (transformer, "activation_fn", "gelu-approximate"),
        (transformer, "flip_sin_to_cos", True),
        (transformer, "freq_shift", 0),
    )
    wrong = [
        f"{key} is {config.get(key)}, SAT's is {value}" for config, key, value in wanted if config.get(key) != value
    ]
    if wrong:
        raise ConversionError(
            "SAT cannot express these settings: " + "; ".join(wrong) + ".", "Give the configs of a CogVideoX pipeline."
        )


def _schedule(shift: float) -> SatYaml:
    return {"target": f"{_DIFFUSION}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": shift}}


def _network(config: ForeignObject) -> SatYaml:
    heads = config["num_attention_heads"]
    head_dim = config["attention_head_dim"]
    patch = config["patch_size"]
    patch_t = config["patch_size_t"]
    return {
        # Only main has this key: v1.0 passes unknown keys to SAT's transformer.
        **({"ofs_embed_dim": config["ofs_embed_dim"]} if config["ofs_embed_dim"] is not None else {}),
        "time_embed_dim": config["time_embed_dim"],
        "elementwise_affine": True,
        "num_frames": config["sample_frames"],
        "time_compressed_rate": config["temporal_compression_ratio"],
        "latent_width": config["sample_width"],
        "latent_height": config["sample_height"],
        "num_layers": config["num_layers"],
        "patch_size": patch if patch_t is None else [patch_t, patch, patch],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "hidden_size": heads * head_dim,
        "adm_in_channels": 256,
        "num_attention_heads": heads,
        "transformer_args": {
            "checkpoint_activations": True,
            "vocab_size": 1,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "layernorm_order": "pre",
            "skip_init": False,
            "model_parallel_size": 1,
            "is_decoder": False,
        },
        "modules": {
            "pos_embed_config": _positions(config, head_dim),
            "patch_embed_config": {
                "target": "dit_video_concat.ImagePatchEmbeddingMixin",
                "params": {"text_hidden_size": config["text_embed_dim"]},
            },
            "adaln_layer_config": {"target": "dit_video_concat.AdaLNMixin", "params": {"qk_ln": True}},
            "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
        },
    }


def _positions(config: ForeignObject, head_dim: int) -> SatYaml:
    params: SatYaml = {"text_length": config["max_text_seq_length"]}
    if not config["use_rotary_positional_embeddings"]:
        spatial, temporal = config["spatial_interpolation_scale"], config["temporal_interpolation_scale"]
        params |= {"height_interpolation": spatial, "width_interpolation": spatial}
        # 1.0 is SAT's default, which CogVideo's yaml leaves out.
        params |= {"time_interpolation": temporal} if temporal != 1.0 else {}
        return {"target": "dit_video_concat.Basic3DPositionEmbeddingMixin", "params": params}
    params |= {"hidden_size_head": head_dim}
    params |= {"learnable_pos_embed": True} if config["use_learned_positional_embeddings"] else {}
    return {"target": "dit_video_concat.Rotary3DPositionEmbeddingMixin", "params": params}


def _conditioner(length: int) -> SatYaml:
    embedder = {
        "is_trainable": False,
        "input_key": "txt",
        "ucg_rate": 0.1,
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": "t5-v1_1-xxl", "max_length": length},
    }
    return {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [embedder]}}


def _first_stage(vae: ForeignObject) -> SatYaml:
    channels = list(vae["block_out_channels"])
    if any(width % channels[0] for width in channels):
        raise ConversionError(f"SAT's VAE needs multiples of its first width; block_out_channels are {channels}.")
    coder = {
        "double_z": True,
        "z_channels": vae["latent_channels"],
        "resolution": 256,
        "in_channels": vae["in_channels"],
        "out_ch": vae["out_channels"],
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "attn_resolutions": [],
        "num_res_blocks": vae["layers_per_block"],
        "dropout": 0.0,
        "temporal_compress_times": int(vae["temporal_compression_ratio"]),
    }
    return {
        "target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
        "params": {
            "cp_size": 1,
            "ckpt_path": "vae/3d-vae.pt",
            "ignore_keys": ["loss"],
            "loss_config": {"target": "torch.nn.Identity"},
            "regularizer_config": {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
            "encoder_config": {
                "target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D",
                "params": coder | {"gather_norm": True},
            },
            "decoder_config": {
                "target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D",
                "params": coder | {"gather_norm": False},
            },
        },
    }
