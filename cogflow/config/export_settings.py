"""Settings of the stages export and assemble, and the facts about a SAT checkpoint that both take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cogflow.config.model_section import DTYPES
from cogflow.config.setting import ValueRule, above, each, kind_setting, matching, one_of, optional, section, setting

COMPONENTS = ("transformer", "vae", "text_encoder")
PIPELINE_COMPONENTS = (*COMPONENTS, "tokenizer", "scheduler")


def _components_problem(value: list[str]) -> str | None:
    if not value or len(set(value)) < len(value):
        return f"it should be a list of {', '.join(COMPONENTS)}."
    return each(one_of(*COMPONENTS)).problem(value)


def _config_values_problem(value: dict[str, Any]) -> str | None:
    wrong = next((name for name in value if name not in PIPELINE_COMPONENTS), None)
    if wrong is None:
        return None
    return f"{wrong} is no component; one of {', '.join(PIPELINE_COMPONENTS)}, as stage.set.vae.scaling_factor=0.7."


POSITIVE = optional(above(0))
WEIGHTS = one_of("auto", "model", "ema")
SHARD_SIZE = matching(
    r"[1-9][0-9]*(\.[0-9]+)?\s?(KB|MB|GB|TB|KiB|MiB|GiB|TiB)", "a size such as 5GB", "a size, such as 5GB"
)


@dataclass(frozen=True)
class FactsConfig:
    """Facts about a SAT checkpoint that none of its files state. null: taken from the files. A contradiction stops
    the export."""

    heads: int | None = setting(None, help="Attention heads.", rule=POSITIVE)
    head_dim: int | None = setting(None, help="Width of one attention head.", rule=POSITIVE)
    patch_size_t: int | None = setting(
        None, help="Latent frames per token: 2 for CogVideoX 1.5, none for 1.0.", rule=POSITIVE
    )
    latent_frames: int | None = setting(None, help="Latent frames of the position table.", rule=POSITIVE)
    latent_height: int | None = setting(None, help="Latent rows of the position table.", rule=POSITIVE)
    latent_width: int | None = setting(None, help="Latent columns of the position table.", rule=POSITIVE)
    temporal_compression: int | None = setting(None, help="Video frames per latent frame.", rule=POSITIVE)
    text_tokens: int | None = setting(None, help="Tokens that captions are padded to.", rule=POSITIVE)
    scaling_factor: float | None = setting(
        None, help="Scaling factor of the latents: 0.7 for 5B, 1.15258426 for 2B.", rule=POSITIVE
    )
    snr_shift_scale: float | None = setting(
        None, help="SNR shift of the noise schedule: 1.0 for 5B, 3.0 for 2B.", rule=POSITIVE
    )
    spatial_interpolation: float | None = setting(
        None, help="Spatial interpolation scale of the position table of 2B.", rule=POSITIVE
    )
    temporal_interpolation: float | None = setting(
        None, help="Temporal interpolation scale of the position table of 2B.", rule=POSITIVE
    )
    invert_scale_latents: bool | None = setting(None, help="Whether image latents are divided by the scaling factor.")
    dtype: str | None = setting(None, help="Dtype of the training.", rule=optional(one_of(*DTYPES[1:])))
    lora_alpha: float | None = setting(
        None, help="Alpha of a LoRA, which SAT scales by alpha / rank. SAT's default is 1.", rule=POSITIVE
    )


@dataclass(frozen=True)
class ExportStage:
    """``stage.*`` of stage=export: SAT, DeepSpeed or cogflow weights to diffusers components, and back to SAT."""

    name: str = setting("export", help="Chosen by stage=export.")
    source: str | None = setting(
        None,
        help="What to export: a run, a checkpoint, a SAT folder, a .pt file, a DeepSpeed folder or a diffusers folder. "
        "Default: this run.",
    )
    source_kind: str = kind_setting("stage.source")
    output: str | None = setting(None, help="Output folder. Default: <run>/export.")
    components: list[str] = setting(
        ["transformer"],
        help="Components to export.",
        rule=ValueRule(f"of {', '.join(COMPONENTS)}", _components_problem),
    )
    weights: str = setting("auto", help="Weights to export. auto: the EMA if there is one.", rule=WEIGHTS)
    masters: str = setting(
        "auto",
        help="Weights of a DeepSpeed folder to export. auto: the fp32 master weights if there are any.",
        rule=one_of("auto", "fp32", "bf16"),
    )
    lora: str = setting(
        "merge",
        help="SAT LoRA. merge: add it to the weights. separate: write a diffusers LoRA file.",
        rule=one_of("merge", "separate"),
    )
    config: list[str] = setting(
        [], help="SAT yaml files or a diffusers config.json, in addition to those found beside the weights."
    )
    facts: FactsConfig = section(FactsConfig, help="Facts that no file of the source states.")
    dtype: str = setting(
        "auto",
        help="Dtype of the exported transformer. auto: that of the training; fp32 when trained on a CPU.",
        rule=one_of(*DTYPES),
    )
    to: str = setting("diffusers", help="Layout to write.", rule=one_of("diffusers", "sat"))
    max_shard_size: str = setting("5GB", help="Largest safetensors file.", rule=SHARD_SIZE)
    verify: str = setting(
        "auto",
        help="Comparison of the export with a SAT reference model. whole: all blocks. ends: first and last block. "
        "auto: whole for small models, else ends.",
        rule=one_of("auto", "whole", "ends", "off"),
    )
    dry_run: bool = setting(False, help="Print the plan and the source of each inferred fact, and write nothing.")


@dataclass(frozen=True)
class AssembleStage:
    """``stage.*`` of stage=assemble: components from different places to one checked pipeline folder."""

    name: str = setting("assemble", help="Chosen by stage=assemble.")
    output: str | None = setting(None, help="Output folder. Default: <run>/pipeline.")
    base: str | None = setting(
        None, help="Pipeline folder or run that provides every component not named below. Default: model.path."
    )
    base_kind: str = kind_setting("stage.base")
    transformer: str | None = setting(
        None,
        help="Component folder, pipeline, export, run, checkpoint, SAT folder or .pt file. Default: <run>/export.",
    )
    transformer_kind: str = kind_setting("stage.transformer")
    vae: str | None = setting(None, help="Source of the VAE, as for stage.transformer. Default: stage.base.")
    vae_kind: str = kind_setting("stage.vae")
    text_encoder: str | None = setting(
        None, help="Source of the text encoder, as for stage.transformer. Default: stage.base."
    )
    text_encoder_kind: str = kind_setting("stage.text_encoder")
    tokenizer: str | None = setting(
        None, help="Component folder, pipeline or run of the tokenizer. Default: stage.base."
    )
    tokenizer_kind: str = kind_setting("stage.tokenizer")
    scheduler: str | None = setting(
        None,
        help="Component folder, pipeline or run of the scheduler; a SAT checkpoint: the schedule it was trained with. "
        "Default: stage.base.",
    )
    scheduler_kind: str = kind_setting("stage.scheduler")
    weights: str = setting(
        "auto",
        help="Weights of a run or checkpoint that is exported on the way. auto: the EMA if there is one.",
        rule=WEIGHTS,
    )
    dtype: str = setting(
        "auto", help="Dtype of a transformer that is exported on the way, as for stage=export.", rule=one_of(*DTYPES)
    )
    config: list[str] = setting([], help="SAT yaml files in addition to those found, as for stage=export.")
    facts: FactsConfig = section(
        FactsConfig, help="Facts that no file of a SAT checkpoint states, as for stage=export."
    )
    set: dict[str, dict[str, Any]] = setting(
        {},
        help="Values to set in the configs of components, such as stage.set.vae.scaling_factor=0.7.",
        rule=ValueRule(f"below {', '.join(PIPELINE_COMPONENTS)}", _config_values_problem),
    )
    force: list[str] = setting([], help="Contradictions to accept; they are recorded, such as [vae.scaling_factor].")
    link: str = setting(
        "auto",
        help="How weights are placed. auto: reflink, else hard link (read-only), else copy.",
        rule=one_of("auto", "hard", "copy"),
    )
    rehash: bool = setting(
        False, help="Hash files again whose inode, size and time have not changed since they were hashed."
    )
    verify: bool = setting(
        True, help="Load the folder in a fresh process and compare its samples with those of the run."
    )
    push_to_hub: str | None = setting(
        None,
        help="OWNER/NAME of a Hugging Face repository to upload the finished folder to. Default: no upload.",
        rule=optional(matching(r"(?a)[\w.-]+/[\w.-]+", "OWNER/NAME", "OWNER/NAME")),
    )
    hub_private: bool = setting(True, help="Make a repository private that push_to_hub creates.")
