"""What a field of a config does to the picture when it is wrong: how sure it harms, and why. Sources: diffusers' schedulers and pipelines,
CogVideo's SAT code, and docs/design of the family's facts."""

from __future__ import annotations

IGNORED = {
    "_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "architectures", "dtype", "torch_dtype",
    "transformers_version",
    "model_type", "use_cache", "is_encoder_decoder", "is_decoder", "name_or_path", "added_tokens_decoder", "additional_special_tokens",
    "clean_up_tokenization_spaces", "sp_model_kwargs", "tokenizer_class", "backend", "is_local", "local_files_only", "extra_ids", "legacy",
    "add_prefix_space", "processor_class", "initializer_factor", "dropout_rate", "classifier_dropout", "dropout", "output_past",
    "n_positions", "task_specific_params", "return_dict", "chunk_size_feed_forward", "problem_type", "id2label", "label2id",
    "decoder_start_token_id", "bos_token_id", "sep_token_id", "cls_token_id", "tie_word_embeddings", "tie_encoder_decoder",
    "output_hidden_states", "output_attentions", "num_decoder_layers", "scale_decoder_outputs",
    "force_upcast", "sample_size",
}  # fmt: skip
"""Fields that decide nothing about a sample's picture: who wrote the file, what only training reads."""

SEVERITY: dict[tuple[str, str], tuple[float, str]] = {
    ("vae", "scaling_factor"): (
        0.97,
        "Latents reach the decoder at another scale than it knows: washed out below it, saturated and full of artefacts above.",
    ),
    ("vae", "invert_scale_latents"): (
        0.7,
        "Image latents are multiplied where they should be divided: the first frame is off.",
    ),
    ("vae", "shift_factor"): (0.9, "Latents reach the decoder shifted."),
    ("vae", "latents_mean"): (0.9, "Latents reach the decoder shifted."),
    ("vae", "latents_std"): (0.9, "Latents reach the decoder at another scale."),
    ("vae", "norm_eps"): (0.6, "Normalisations divide by another number: contrast of flat regions changes."),
    ("scheduler", "snr_shift_scale"): (
        0.95,
        "The sampler's noise levels are not those the weights were trained for: too little or too much is denoised.",
    ),
    ("scheduler", "prediction_type"): (0.97, "The network's output is taken for something else than it is."),
    ("scheduler", "rescale_betas_zero_snr"): (
        0.9,
        "The first step's noise level is not the one of training: brightness and contrast are off.",
    ),
    ("scheduler", "timestep_spacing"): (
        0.85,
        "Sampling visits other timesteps: with linspace or leading the last ones, which make fine detail, are elsewhere.",
    ),
    ("scheduler", "set_alpha_to_one"): (0.6, "The last step does not arrive at a clean picture."),
    ("scheduler", "clip_sample"): (0.85, "Predicted latents are cut to a range: contrast is lost."),
    ("scheduler", "clip_sample_range"): (0.3, "Read only with clip_sample."),
    ("scheduler", "thresholding"): (0.8, "Predicted latents are cut to a range: contrast is lost."),
    ("scheduler", "beta_start"): (0.9, "The noise schedule is another one."),
    ("scheduler", "beta_end"): (0.9, "The noise schedule is another one."),
    ("scheduler", "beta_schedule"): (0.9, "The noise schedule is another one."),
    ("scheduler", "trained_betas"): (0.9, "The noise schedule is another one."),
    ("scheduler", "num_train_timesteps"): (0.9, "The noise schedule is another one."),
    ("scheduler", "steps_offset"): (0.7, "Every timestep is off by so much."),
    ("scheduler", "_class_name"): (0.2, "Another sampler: other pictures, none of them wrong."),
    ("transformer", "use_rotary_positional_embeddings"): (0.97, "Attention does not know where a patch lies."),
    ("transformer", "use_learned_positional_embeddings"): (0.9, "Patches get another position, or none."),
    ("transformer", "norm_eps"): (0.7, "Normalisations divide by another number than in training."),
    ("transformer", "spatial_interpolation_scale"): (0.8, "Positions are stretched."),
    ("transformer", "temporal_interpolation_scale"): (0.8, "Positions are stretched in time."),
    ("transformer", "flip_sin_to_cos"): (0.9, "Timesteps are told in another code."),
    ("transformer", "freq_shift"): (0.8, "Timesteps are told in another code."),
    ("transformer", "timestep_activation_fn"): (0.9, "Timesteps are told in another code."),
    ("transformer", "activation_fn"): (0.9, "Every feed-forward layer computes something else."),
    ("transformer", "sample_height"): (
        0.8,
        "Rotary positions are read off another grid: patches believe to be elsewhere.",
    ),
    ("transformer", "sample_width"): (
        0.8,
        "Rotary positions are read off another grid: patches believe to be elsewhere.",
    ),
    ("transformer", "sample_frames"): (0.6, "Positions in time are those of clips of another length."),
    ("vae", "sample_height"): (0.2, "Read for tiles only."),
    ("vae", "sample_width"): (0.2, "Read for tiles only."),
    ("tokenizer", "pad_token"): (0.8, "CogVideoX encodes the padding, too: captions are followed by other tokens."),
    ("tokenizer", "padding_side"): (0.8, "CogVideoX encodes the padding, too: captions stand elsewhere."),
    ("tokenizer", "truncation_side"): (0.3, "Long captions lose their other end."),
    ("transformer", "max_text_seq_length"): (0.7, "Captions are padded or cut to another length than in training."),
    ("text_encoder", "layer_norm_epsilon"): (0.6, "Captions are encoded a little otherwise."),
    ("text_encoder", "relative_attention_max_distance"): (0.7, "Captions are encoded otherwise."),
    ("text_encoder", "relative_attention_num_buckets"): (0.8, "Captions are encoded otherwise."),
    ("text_encoder", "feed_forward_proj"): (0.9, "Captions are encoded otherwise."),
    ("text_encoder", "dense_act_fn"): (0.9, "Captions are encoded otherwise."),
    ("tokenizer", "model_max_length"): (
        0.55,
        "Captions are cut, or padded, to another length where a program relies on it.",
    ),
    ("sampling", "use_dynamic_cfg"): (
        0.8,
        "Guidance stays at its full scale in every step: colours run over, and detail is lost to it.",
    ),
    ("sampling", "guidance_scale"): (0.6, "Guidance is weaker or stronger."),
    ("sampling", "steps"): (0.4, "Fewer or more denoising steps."),
    ("sampling", "max_sequence_length"): (0.7, "Captions are padded or cut to another length than in training."),
}
OTHER = (0.5, "A setting that was another one in the reference.")
