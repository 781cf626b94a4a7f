"""Step 1, facts: compare every config field, and report what a wrong value does to the samples. No weights are loaded.

Sources of the effects: the schedulers and pipelines of diffusers, the SAT code of CogVideo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from cogflow.assemble.components import STEMS, PipelineComponent
from cogflow.assemble.expectations import ARCHITECTURE, TRAINED, same_value
from cogflow.config.command import options
from cogflow.config.problems import format_value
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.errors import CogflowError
from cogflow.files.hashing import hash_file
from cogflow.files.record_io import JsonValue
from cogflow.models.code_check import CONFIGS
from cogflow.models.family import ModelSpec
from cogflow.weights.tensor_source import WeightsFolder

CALL_ARGUMENTS = ("use_dynamic_cfg", "guidance_scale", "steps", "max_sequence_length")
"""Fields of :class:`cogflow.records.pipeline_records.PipelineSampling` that are compared."""

VOCABULARY = {
    "spiece.model": 0.8,
    "tokenizer.json": 0.8,
    "added_tokens.json": 0.3,
    "special_tokens_map.json": 0.3,
}
"""File of a tokenizer -> confidence that another file gives other tokens."""

IGNORED = frozenset(
    {
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "_use_default_values",
        "add_prefix_space",
        "added_tokens_decoder",
        "additional_special_tokens",
        "architectures",
        "backend",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "clean_up_tokenization_spaces",
        "cls_token_id",
        "decoder_start_token_id",
        "dropout",
        "dropout_rate",
        "dtype",
        "extra_ids",
        "force_upcast",
        "id2label",
        "initializer_factor",
        "is_decoder",
        "is_encoder_decoder",
        "is_local",
        "label2id",
        "legacy",
        "local_files_only",
        "model_type",
        "n_positions",
        "name_or_path",
        "num_decoder_layers",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "problem_type",
        "processor_class",
        "return_dict",
        "sample_size",
        "scale_decoder_outputs",
        "sep_token_id",
        "sp_model_kwargs",
        "task_specific_params",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields without an effect on the samples: metadata of the file, and options that only training reads."""

SEVERITY: dict[tuple[str, str], tuple[float, str]] = {
    ("vae", "scaling_factor"): (
        0.97,
        "The decoder gets latents at another scale: washed out when too small, full of artefacts when too large.",
    ),
    ("vae", "invert_scale_latents"): (
        0.7,
        "Image latents are multiplied where they should be divided: the first frame is wrong.",
    ),
    ("vae", "shift_factor"): (0.9, "The decoder gets shifted latents."),
    ("vae", "latents_mean"): (0.9, "The decoder gets shifted latents."),
    ("vae", "latents_std"): (0.9, "The decoder gets latents at another scale."),
    ("vae", "norm_eps"): (0.6, "Normalisations divide by another number: the contrast of flat regions changes."),
    ("scheduler", "snr_shift_scale"): (
        0.95,
        "The sampler's noise levels are not those of training: it removes too little or too much noise.",
    ),
    ("scheduler", "prediction_type"): (0.97, "The sampler interprets the network's output as another quantity."),
    ("scheduler", "rescale_betas_zero_snr"): (
        0.9,
        "The noise level of the first step is not that of training: brightness and contrast are wrong.",
    ),
    ("scheduler", "timestep_spacing"): (
        0.85,
        "Sampling uses other timesteps: linspace and leading move the last steps, which make fine detail.",
    ),
    ("scheduler", "set_alpha_to_one"): (0.6, "The last step does not end at a clean image."),
    ("scheduler", "clip_sample"): (0.85, "Predicted latents are clipped to a range: contrast is lost."),
    ("scheduler", "clip_sample_range"): (0.3, "It is read only with clip_sample."),
    ("scheduler", "thresholding"): (0.8, "Predicted latents are clipped to a range: contrast is lost."),
    ("scheduler", "beta_start"): (0.9, "The noise schedule is another one."),
    ("scheduler", "beta_end"): (0.9, "The noise schedule is another one."),
    ("scheduler", "beta_schedule"): (0.9, "The noise schedule is another one."),
    ("scheduler", "trained_betas"): (0.9, "The noise schedule is another one."),
    ("scheduler", "num_train_timesteps"): (0.9, "The noise schedule is another one."),
    ("scheduler", "steps_offset"): (0.7, "Every timestep is shifted by this number."),
    ("scheduler", "_class_name"): (0.2, "Another sampler gives other samples, none of them wrong."),
    ("transformer", "use_rotary_positional_embeddings"): (0.97, "Attention does not know the positions of patches."),
    ("transformer", "use_learned_positional_embeddings"): (0.9, "Patches get another position, or none."),
    ("transformer", "norm_eps"): (0.7, "Normalisations divide by another number than in training."),
    ("transformer", "spatial_interpolation_scale"): (0.8, "Spatial positions are stretched."),
    ("transformer", "temporal_interpolation_scale"): (0.8, "Temporal positions are stretched."),
    ("transformer", "flip_sin_to_cos"): (0.9, "Timesteps are embedded in another way."),
    ("transformer", "freq_shift"): (0.8, "Timesteps are embedded in another way."),
    ("transformer", "timestep_activation_fn"): (0.9, "Timesteps are embedded in another way."),
    ("transformer", "activation_fn"): (0.9, "Every feed-forward layer computes another function."),
    ("transformer", "sample_height"): (0.8, "Rotary positions are computed for another grid."),
    ("transformer", "sample_width"): (0.8, "Rotary positions are computed for another grid."),
    ("transformer", "sample_frames"): (0.6, "Temporal positions are those of clips of another length."),
    ("vae", "sample_height"): (0.2, "It is read for tiling only."),
    ("vae", "sample_width"): (0.2, "It is read for tiling only."),
    ("tokenizer", "pad_token"): (0.8, "CogVideoX also encodes the padding: captions are followed by other tokens."),
    ("tokenizer", "padding_side"): (0.8, "CogVideoX also encodes the padding: captions are at another position."),
    ("tokenizer", "truncation_side"): (0.3, "Long captions lose the other end."),
    ("transformer", "max_text_seq_length"): (0.7, "Captions are padded or cut to another length than in training."),
    ("text_encoder", "layer_norm_epsilon"): (0.6, "Captions are encoded slightly differently."),
    ("text_encoder", "relative_attention_max_distance"): (0.7, "Captions are encoded differently."),
    ("text_encoder", "relative_attention_num_buckets"): (0.8, "Captions are encoded differently."),
    ("text_encoder", "feed_forward_proj"): (0.9, "Captions are encoded differently."),
    ("text_encoder", "dense_act_fn"): (0.9, "Captions are encoded differently."),
    ("tokenizer", "model_max_length"): (
        0.55,
        "Captions are cut or padded to another length where a program relies on it.",
    ),
    ("sampling", "use_dynamic_cfg"): (
        0.8,
        "Guidance stays at its full scale in every step: colours are oversaturated and detail is lost.",
    ),
    ("sampling", "guidance_scale"): (0.6, "Guidance is weaker or stronger."),
    ("sampling", "steps"): (0.4, "There are fewer or more denoising steps."),
    ("sampling", "max_sequence_length"): (0.7, "Captions are padded or cut to another length than in training."),
}
"""(component, field) -> the confidence that another value degrades the samples, and how."""

UNKNOWN_SEVERITY = (0.5, "The reference has another value.")
ARCHITECTURE_SEVERITY = (0.8, "The architecture is not that of the family.")
FP16_SEVERITY = (
    0.6,
    "fp16 ends at 65504 and loses small weights: values that bf16 and fp32 hold become infinite or zero.",
)


def compare_configs(candidate: DiagnosisInput, reference: DiagnosisInput) -> StepResult:
    """Compare the fields of ``candidate`` with those of ``reference``, and with what its transformer was trained with.

    A ``reference`` without files is what the candidate is declared to be.
    """
    found = list(candidate.problems)
    if reference.parts:
        found += _different_fields(candidate, reference)
    found += _unexpected_fields(candidate, reference, {finding.location for finding in found})
    found += _different_arguments(candidate, reference)
    found += _fp16_weights(candidate, reference)
    found.sort(key=lambda finding: -finding.confidence)
    lines = [finding.line() for finding in found] or ["no field differs"]
    against = "files" if reference.parts else "declared"
    return StepResult("facts", found, lines, {"compared": sorted(candidate.parts), "against": against})


def _finding(
    component: str,
    key: str,
    candidate: JsonValue,
    reference: JsonValue,
    rung: int,
    fix: str = "",
    default: tuple[float, str] = UNKNOWN_SEVERITY,
) -> DiagnosisFinding:
    """Return the finding of a field, with its entry of :data:`SEVERITY` or else ``default``."""
    confidence, why = SEVERITY.get((component, key), default)
    return DiagnosisFinding(
        step="facts",
        component=component,
        kind="config",
        name=key,
        candidate=candidate,
        reference=reference,
        rung=rung,
        confidence=confidence,
        why=why,
        fix=fix,
    )


def _set_option(component: str, key: str, value: JsonValue) -> str:
    """Return the option of stage=assemble that sets a field."""
    option = f"stage.set.{component}.{key}"
    return options({option: value}) if isinstance(value, str) else f"{option}={format_value(value)}"


def _different_fields(candidate: DiagnosisInput, reference: DiagnosisInput) -> Iterator[DiagnosisFinding]:
    """Yield the fields of both configs that differ."""
    for name in CONFIGS:
        ours, theirs = candidate.parts.get(name), reference.parts.get(name)
        if ours is None or theirs is None or not ours.class_name or not theirs.class_name:
            continue
        keys = sorted(key for key in (ours.settings.keys() | theirs.settings.keys()) - IGNORED if key[:1] != "_")
        values = {key: (_content(ours.settings.get(key)), _content(theirs.settings.get(key))) for key in keys}
        if name == "scheduler":
            values = {"_class_name": (ours.class_name, theirs.class_name), **values}
        for key, (own, other) in values.items():
            if not same_value(own, other):
                yield _finding(name, key, own, other, candidate.rung, _set_option(name, key, other))
        if name == "tokenizer":
            yield from _different_vocabulary(candidate.rung, ours, theirs)


def _content(value: JsonValue) -> JsonValue:
    """Return a special token as text, whether the file has it as text or as an object with flags."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _different_vocabulary(rung: int, ours: PipelineComponent, theirs: PipelineComponent) -> Iterator[DiagnosisFinding]:
    for name, confidence in VOCABULARY.items():
        own, other = ours.files.get(name), theirs.files.get(name)
        if own is not None and other is not None and hash_file(own) != hash_file(other):
            yield DiagnosisFinding(
                step="facts",
                component="tokenizer",
                kind="config",
                name=name,
                candidate="another file",
                reference="",
                rung=rung,
                confidence=confidence,
                why="Captions become other tokens.",
            )


def _unexpected_fields(
    candidate: DiagnosisInput, reference: DiagnosisInput, known: set[str]
) -> Iterator[DiagnosisFinding]:
    """Yield fields that differ from the training record or from the family, without those in ``known``."""
    declared = reference if not reference.parts else candidate
    for key, component in TRAINED.items():
        part, wanted = candidate.parts.get(component), declared.expected.get(key)
        if part is None or not part.class_name or wanted is None or f"{component}.{key}" in known:
            continue
        own = part.settings.get(key)
        if not same_value(own, wanted.value):
            fix = _set_option(component, key, wanted.value)
            yield _finding(component, key, own, wanted.value, candidate.rung, fix)
    transformer = candidate.parts.get("transformer")
    if transformer is None or not transformer.class_name:
        return
    length, own_length = declared.expected.get("max_sequence_length"), transformer.settings.get("max_text_seq_length")
    if length is not None and own_length != length.value and "transformer.max_text_seq_length" not in known:
        yield _finding("transformer", "max_text_seq_length", own_length, length.value, candidate.rung)
    if declared.family is not None:
        yield from _other_architecture(candidate.rung, transformer, declared.family, known)


def _other_architecture(
    rung: int, transformer: PipelineComponent, family: ModelSpec, known: set[str]
) -> Iterator[DiagnosisFinding]:
    for key, fact in ARCHITECTURE.items():
        own, wanted = transformer.settings.get(key), getattr(family, fact)
        if own != wanted and f"transformer.{key}" not in known:
            yield _finding("transformer", key, own, wanted, rung, default=ARCHITECTURE_SEVERITY)


def _different_arguments(candidate: DiagnosisInput, reference: DiagnosisInput) -> Iterator[DiagnosisFinding]:
    """Yield arguments of the call that differ where both inputs record them."""
    for key in CALL_ARGUMENTS if candidate.sampling is not None and reference.sampling is not None else ():
        own, other = getattr(candidate.sampling, key), getattr(reference.sampling, key)
        if own is not None and other is not None and not same_value(own, other):
            option = key if key == "max_sequence_length" else f"sampling.{key}"
            yield _finding("sampling", key, own, other, candidate.rung, f"{option}={other}")


def _fp16_weights(candidate: DiagnosisInput, reference: DiagnosisInput) -> Iterator[DiagnosisFinding]:
    """Yield components stored in fp16 where the training or the reference has the range of bf16 or fp32."""
    family = candidate.family or reference.family
    if family is not None and family.dtype == "fp16":
        return
    for name in STEMS:
        own, other = dtype_of(candidate.parts.get(name)), dtype_of(reference.parts.get(name))
        if own != "float16" or other == "float16":
            continue
        wanted = other or "float32"
        confidence, why = FP16_SEVERITY
        yield DiagnosisFinding(
            step="facts",
            component=name,
            kind="dtype",
            name="dtype",
            candidate=own,
            reference=wanted,
            rung=candidate.rung,
            confidence=confidence,
            why=why,
            fix=f"stage.dtype={'fp32' if wanted == 'float32' else 'bf16'}",
        )


def dtype_of(component: PipelineComponent | None) -> str | None:
    """Return torch's name of the dtype that most values are stored in; ``None`` where it cannot be read."""
    if component is None or not component.class_name:
        return None
    try:
        tensors = WeightsFolder(component.folder, STEMS[component.name]).tensors.values()
    except CogflowError:  # reported by the step that reads the weights
        return None
    counts: dict[str, int] = {}
    for tensor in tensors:
        key = str(tensor.dtype).removeprefix("torch.")
        counts[key] = counts.get(key, 0) + math.prod(tensor.shape)
    return max(counts, key=lambda key: counts[key], default=None)
