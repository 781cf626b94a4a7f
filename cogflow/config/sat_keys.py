"""Tables of the keys of CogVideo's SAT recipes (``sat/configs/sft.yaml`` and the model's yaml beside it).

Every key of those files is in one of four tables: ``TAKEN`` (the value is taken unchanged), ``TRANSLATED`` (a
function of
:mod:`cogflow.config.sat_import` reads it), ``NO_SETTING`` (cogflow determines it in another way) or ``REQUIRED``
(only one value is supported). Any other key is reported as unknown."""

from __future__ import annotations

from typing import Any

TAKEN: dict[str, tuple[str, ...]] = {
    "args.train_iters": ("stage.steps",),
    "args.save_interval": ("stage.save_every",),
    "args.eval_interval": ("stage.evaluate_every", "stage.sample_every"),
    "args.log_interval": ("tracking.log_every",),
    "args.seed": ("stage.seed",),
    "args.checkpoint_activations": ("deepspeed.activation_checkpointing",),
    "args.experiment_name": ("run.name",),
    "data.params.fps": ("data.fps",),
    "data.params.max_num_frames": ("data.frames",),
    "deepspeed.train_micro_batch_size_per_gpu": ("stage.batch_size",),
    "deepspeed.gradient_accumulation_steps": ("stage.gradient_accumulation",),
    "deepspeed.gradient_clipping": ("stage.gradient_clipping",),
    "deepspeed.zero_optimization.stage": ("deepspeed.zero_stage",),
    "deepspeed.zero_optimization.cpu_offload": ("deepspeed.offload_optimizer",),
    "deepspeed.zero_optimization.overlap_comm": ("deepspeed.overlap_comm",),
    "deepspeed.zero_optimization.reduce_bucket_size": ("deepspeed.reduce_bucket_size",),
    "deepspeed.zero_optimization.allgather_bucket_size": ("deepspeed.allgather_bucket_size",),
    "deepspeed.optimizer.params.lr": ("stage.learning_rate",),
    "deepspeed.optimizer.params.betas": ("stage.betas",),
    "deepspeed.optimizer.params.eps": ("stage.eps",),
    "deepspeed.optimizer.params.weight_decay": ("stage.weight_decay",),
    "model.sampler_config.params.num_steps": ("sampling.steps",),
    "model.sampler_config.params.guider_config.params.scale": ("sampling.guidance_scale",),
}
"""Keys whose value is taken unchanged, and the settings that take it."""

TRANSLATED = (
    "args.train_data",
    "args.mode",
    "args.warmup",
    "args.lr_decay_style",
    "args.lr_decay_ratio",
    "data.params.video_size",
    "deepspeed.bf16.enabled",
    "deepspeed.fp16.enabled",
    "deepspeed.optimizer.type",
    "deepspeed.optimizer.params.ema_decay",
    "deepspeed.optimizer.params.use_num_upates",
    "model.conditioner_config.params.emb_models",
    "model.sampler_config.params.guider_config.target",
)
"""Keys that a function of :mod:`cogflow.config.sat_import` reads."""

DEFAULTS: dict[str, Any] = {"args.warmup": 0.01, "args.lr_decay_style": "linear", "args.lr_decay_ratio": 0.1}
"""SAT's defaults for keys that its yaml leaves out. With them the learning rate is not constant."""

EMA_DECAY = 0.9999
"""Decay of SAT's ``FusedEmaAdam``. It grows as (1 + n) / (10 + n) over n updates, as with ``stage.ema_warmup``, and
reaches 0.999 after 9,000 updates. SAT saves the averages beside the weights, as ``<iteration>-ema``."""

SLOW_STEPS = 100
"""Steps in which SAT's finetuning keeps the learning rate at one twentieth. cogflow's warm-up takes their place."""

NO_SETTING: dict[str, str] = {
    "args.load": "weights are loaded from model.path, a diffusers pipeline; stage=export converts a SAT "
    "checkpoint to one",
    "args.save": "all files of a run are in run.root/run.name",
    "args.no_load_rng": "noise is a function of seed and step",
    "args.eval_iters": "the held-out loss is computed on all held-out clips",
    "args.eval_batch_size": "stage.batch_size is used",
    "args.valid_data": "data.holdout excludes clips of data.path from training",
    "args.split": "data.holdout excludes clips of data.path from training",
    "args.num_workers": "clips are decoded before training, by stage=prepare",
    "args.force_train": "weights are always loaded strictly",
    "args.only_log_video_latents": "samples are always decoded, to measure their sharpness",
    "args.model_parallel_size": "cogflow has no model parallelism",
    "data.target": "the layout of the folder is recognised; SAT's videos/ and labels/ is supported",
    "data.params.skip_frms_num": "clips start with their first frame; data.window=center leaves out both ends",
    "deepspeed.steps_per_print": "tracking.log_every is used",
    "deepspeed.wall_clock_breakdown": "step times are always logged",
    "deepspeed.zero_allow_untested_optimizer": "cogflow does the same",
    "deepspeed.zero_optimization.contiguous_gradients": "always on; it changes no result",
    "deepspeed.zero_optimization.reduce_scatter": "always on; it changes no result",
    "deepspeed.zero_optimization.load_from_fp32_weights": "a resumed run loads the fp32 master weights",
    "deepspeed.loss_scale": "cogflow uses DeepSpeed's dynamic loss scale, too",
    "deepspeed.loss_scale_window": "cogflow uses DeepSpeed's default",
    "deepspeed.hysteresis": "cogflow uses DeepSpeed's default",
    "deepspeed.min_loss_scale": "cogflow uses DeepSpeed's default",
    "deepspeed.bf16": "model.dtype is used",
    "deepspeed.fp16": "model.dtype is used",
    "deepspeed.activation_checkpointing": "deepspeed.activation_checkpointing recomputes whole blocks",
    "model.scale_factor": "vae/config.json of model.path contains it",
    "model.disable_first_stage_autocast": "the VAE encodes in its own dtype",
    "model.latent_input": "stage=prepare encodes clips to latents",
    "model.log_keys": "prompts are logged with their samples",
    "model.noised_image_input": "model= selects image to video",
    "model.noised_image_all_concat": "model= selects image to video",
    "model.noised_image_dropout": "stage.image_dropout is used",
    "model.augmentation_dropout": "model= determines it",
    "model.denoiser_config": "scheduler/scheduler_config.json of model.path contains it",
    "model.network_config": "transformer/config.json of model.path contains it",
    "model.conditioner_config": "text_encoder/ and tokenizer/ of model.path contain it",
    "model.first_stage_config": "vae/ of model.path contains it",
    "model.loss_fn_config": "the loss is the one that the model was trained with",
    "model.sampler_config": "sampling.sampler=sat_dpm samples as SAT does",
}
"""Keys, and sections with all their keys, that correspond to no setting, and what determines them in cogflow."""

REQUIRED: dict[str, tuple[Any, str]] = {
    "args.mode": ("finetune", "cogflow finetunes; it does not train a model of this family from random weights"),
    "args.model_parallel_size": (1, "cogflow shards by ZeRO, not by model parallelism"),
    "model.lora_train": (False, "cogflow trains all weights, for which the learning rate of a LoRA is too high"),
    "model.not_trainable_prefixes": (
        ["first_stage_model", "conditioner"],
        "cogflow trains the whole transformer and nothing else",
    ),
    "model.loss_fn_config.params.offset_noise_level": (0, "cogflow adds no offset noise"),
    "model.loss_fn_config.params.fixed_frames": (0, "cogflow has no fixed frames"),
    "model.loss_fn_config.params.sigma_sampler_config.params.uniform_sampling": (
        True,
        "cogflow draws timesteps uniformly",
    ),
    "model.loss_fn_config.params.sigma_sampler_config.params.num_idx": (1000, "cogflow trains on 1000 timesteps"),
    "model.denoiser_config.params.num_idx": (1000, "cogflow trains on 1000 timesteps"),
    "model.denoiser_config.params.quantize_c_noise": (False, "cogflow does not round the noise level"),
}
"""Keys of which only one value is supported: the value and the reason."""

LORA = "model.network_config.params.modules.lora_config"
"""A section that is only present when SAT trains a LoRA."""

FACTS = {
    "layers": "model.network_config.params.num_layers",
    "heads": "model.network_config.params.num_attention_heads",
    "width": "model.network_config.params.hidden_size",
    "in_channels": "model.network_config.params.in_channels",
    "patch": "model.network_config.params.patch_size",
    "text_tokens": "model.network_config.params.modules.pos_embed_config.params.text_length",
    "scaling_factor": "model.scale_factor",
    "snr_shift_scale": "model.denoiser_config.params.discretization_config.params.shift_scale",
}
"""Facts that distinguish the members of the family, and their keys in the model's yaml."""

_5B: dict[str, Any] = {
    "layers": 42,
    "heads": 48,
    "width": 3072,
    "in_channels": 16,
    "patch": 2,
    "text_tokens": 226,
    "scaling_factor": 0.7,
    "snr_shift_scale": 1.0,
}

MODELS: dict[str, dict[str, Any]] = {
    "cogvideox-2b": {
        **_5B,
        "layers": 30,
        "heads": 30,
        "width": 1920,
        "scaling_factor": 1.15258426,
        "snr_shift_scale": 3.0,
    },
    "cogvideox-5b": _5B,
    "cogvideox-5b-i2v": {**_5B, "in_channels": 32},
    "cogvideox1.5-5b": {**_5B, "patch": [2, 2, 2], "text_tokens": 224},
    "cogvideox1.5-5b-i2v": {**_5B, "patch": [2, 2, 2], "text_tokens": 224, "in_channels": 32},
}
"""The same facts of each member. A test compares them with :mod:`cogflow.models.family`, which this package may not
import."""
