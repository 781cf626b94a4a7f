"""Every setting there is: one dataclass per Hydra group, one field per key, with its default and its meaning.

The yaml files under ``configs/`` choose values; :mod:`cogflow.config.build` and :mod:`cogflow.config.check` build and check them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast, get_args

from cogflow.config.benchmarks import BenchmarkStage


# fmt: off
@dataclass(frozen=True)
class RunConfig:
    root: str = "runs"  # folder of all runs
    name: str = "tiny-shapes"  # stable: the same command goes on in the same folder


@dataclass(frozen=True)
class ModelConfig:
    name: str = "tiny"  # key of cogflow.models.family.MODEL_SPECS, or auto (export and assemble)
    path: str | None = None  # diffusers pipeline folder to start from; tiny brings its own
    dtype: str = "auto"  # auto | fp32 | bf16 | fp16; auto: the family's on a GPU, fp32 on a CPU


@dataclass(frozen=True)
class DataConfig:
    name: str = "shapes"  # shapes (drawn) | folder (your own)
    path: str | None = None  # folder of clips; shapes: where to draw them, default <run>/data
    frames: int = 9  # 4k+1
    height: int = 64  # multiple of 16
    width: int = 96  # multiple of 16
    fps: float = 8.0  # clips are resampled to this rate
    resize: str = "cover"  # cover (fill, then crop) | stretch | none (crop only)
    crop: str = "center"  # center | random (seeded by the clip's content)
    buckets: list[str] = field(default_factory=list)  # sizes such as 49x480x720, of which each clip takes the best; empty: one size
    window: str = "start"  # which frames of a longer clip: start | center | random (seeded by the clip's content)
    soft_style: bool = False  # the clips are soft on purpose: that they look scaled up is told, and no alarm
    image_variants: int = 8  # image to video: noised first frames that are encoded of each clip, of which each step draws one
    holdout: int = 8  # clips kept away from training, for the held-out loss
    max_bad_share: float = 0.1  # more unreadable clips than this stop the run
    max_bad_in_a_row: int = 16  # so does this many, one after another, at the start
    seed: int = 0  # of the drawn clips, the held-out choice and the seeded crops and windows
    clips: int = 96  # shapes: how many to draw
    colours: list[str] = field(default_factory=list)  # shapes: colours to draw
    shapes: list[str] = field(default_factory=list)  # shapes: outlines to draw
    motions: list[str] = field(default_factory=list)  # shapes: directions of travel; the three lists have defaults of their own


@dataclass(frozen=True)
class DeepSpeedConfig:
    zero_stage: int = 2  # 0..3
    offload_optimizer: bool = False  # optimizer states in host memory
    offload_parameters: bool = False  # parameters in host memory (stage 3)
    reduce_bucket_size: int = 200_000  # elements; large models want 5e8
    allgather_bucket_size: int = 200_000  # elements; large models want 5e8
    overlap_comm: bool = False  # reduce gradients while the backward pass goes on
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    checkpoint_every_block: int = 1  # with activation_checkpointing: 1 all blocks, 2 every other one, 3 every third; 0: as few as fit
    checkpoint_keep: str = "auto"  # by recomputed blocks: nothing | attention | products (linear layers but the widest) | all | auto
    reduce_dtype: str = "fp32"  # gradients are summed over the ranks in: fp32 | model (its own: half the traffic, more rounding)


@dataclass(frozen=True)
class ParallelConfig:
    sequence: int = 1  # ranks that share each batch, every one with its part of the tokens: for clips too long for one GPU


@dataclass(frozen=True)
class SpeedConfig:
    """How the same numbers are computed faster; what a choice brings is measured by stage=benchmark stage.what=train."""

    attention: str = "auto"  # kernel of attention: auto (the quickest) | flash | cudnn | efficient | math (slow; holds all scores)
    compile: str = "auto"  # off | blocks (torch.compile, a minute at the start) | graphs (CUDA graphs besides) | auto: blocks on a GPU
    prefetch: int = 2  # micro batches that are made ahead, in pinned memory


@dataclass(frozen=True)
class SamplingConfig:
    sampler: str = "default"  # default (the pipeline's own scheduler) | dpm | ddim | sat_dpm | sat_ddim (as CogVideo's own code)
    steps: int = 20  # denoising steps
    guidance_scale: float = 6.0  # of classifier-free guidance; 1: off
    use_dynamic_cfg: bool = True  # let the guidance grow over the steps, as CogVideoX does
    seeds: list[int] = field(default_factory=lambda: [0])  # each prompt is sampled once per seed
    prompts: str | None = None  # .txt (one a line) or .jsonl (id, text); default: the data's own prompts
    clip_model: str | None = None  # folder of a CLIP model on disk: stage=sample adds its scores to the panel; nothing is fetched
    vae_dtype: str = "auto"  # that decodes: auto (as it was loaded: fp32) | fp32 | bf16 | fp16
    vae_tiling: bool = False  # decode tile by tile: less memory, and seams where tiles meet
    roundtrip_clips: int = 8  # prepared clips sent through the VAE and back, the ceiling of what samples can reach; 0: off


@dataclass(frozen=True)
class TrackingConfig:
    project: str = "cogflow"  # Weights & Biases project
    wandb: str = "offline"  # offline | online | disabled; the variable WANDB_MODE wins
    entity: str | None = None  # Weights & Biases team or user; default: the account's own
    log_every: int = 1  # steps between lines of metrics.jsonl
    videos: bool = True  # log sample videos, not only scalars
    upload_mb: float = 512.0  # a larger artifact is recorded in W&B by its paths, not copied there


@dataclass(frozen=True)
class PrepareStage:
    name: str = "prepare"  # chosen by stage=prepare
    batch_size: int = 4  # captions encoded at once; clips are encoded one by one
    shard_clips: int = 64  # clips per safetensors shard
    stall_minutes: float = 60.0  # when nothing has moved for so long, the rank at fault is named and the run ends; 0: never


@dataclass(frozen=True)
class RollbackConfig:
    """What is changed when a run goes back to the last sharp checkpoint."""

    learning_rate_ratio: float = 1.0  # the learning rate is multiplied by it; 1: nothing is changed, so the run stops there
    most: int = 2  # times a run goes back; the next alarm stops it


@dataclass(frozen=True)
class TrainStage:
    name: str = "train"  # chosen by stage=train
    steps: int = 150  # optimizer steps
    batch_size: int = 8  # clips per rank and micro step
    gradient_accumulation: int = 1  # micro steps per optimizer step
    learning_rate: float = 4e-4  # after the warm-up
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    gradient_clipping: float = 1.0  # largest norm of the gradient; 0: off
    warmup_steps: int = 10  # steps over which the learning rate rises from zero
    schedule: str = "cosine"  # constant | linear | cosine
    min_lr_ratio: float = 0.1  # where linear and cosine end, as a share of learning_rate
    text_dropout: float = 0.1  # share of samples trained without their caption
    image_dropout: float = 0.05  # image to video: share of samples trained without their first frame
    ema_decay: float = 0.0  # 0: off
    ema_every: int = 1  # steps between updates of the averages; the decay is that of so many steps
    ema_device: str = "auto"  # where each rank keeps its share of the averages: auto (beside the model) | cpu (in host memory)
    ema_warmup: bool = True  # let the decay grow in the first updates; without, slow averages stay at the start for long
    seed: int = 0  # of sample order, noise, timesteps and dropped captions
    resume: str = "auto"  # auto | never | PATH of a checkpoint folder
    save_every: int = 75  # 0: only at the end
    weights_every: int = 0  # weights alone, for export, into <run>/weights; 0: never
    sample_every: int = 75  # 0: never
    evaluate_every: int = 25  # held-out loss; 0: never
    keep_last: int = 2  # checkpoints kept; the newest that a quiet validation proved sharp is kept besides
    keep_every: int = 0  # checkpoints kept besides: those at a multiple of so many steps
    keep_best: int = 0  # checkpoints kept besides: the best by the watch over the samples, ties by held-out loss
    on_blur: str = "warn"  # on an alarm over the samples: warn | stop (exit code 3) | rollback (to the last sharp checkpoint)
    on_not_finite: str = "stop"  # a loss or gradient that is not finite changes no weight; then: stop | skip (go on) | rollback
    on_spike: str = "log"  # a loss over 6 deviations above its last 128 steps: log | skip (leave the step out)
    rollback: RollbackConfig = field(default_factory=RollbackConfig)  # of on_blur=rollback and on_not_finite=rollback
    stall_minutes: float = 30.0  # when nothing has moved for so long, the rank at fault is named and the run ends; 0: never
    freeze: list[str] = field(default_factory=list)  # names of weights that are not trained, as patterns: [patch_embed.*]
    start: str | None = None  # weights to start from: run, checkpoint, SAT or diffusers folder; default: those of model.path
    start_kind: str = "auto"  # what start is: auto (its content decides), run, checkpoint, pipeline, ...
    plan: bool = False  # print memory, time, disk and what would fit, and train nothing; needs neither weights nor clips
    plan_gpus: int = 0  # GPUs to plan for; 0: as many as there are processes
    plan_memory_gb: float = 0.0  # memory of one GPU, in 10^9 bytes; 0: of the one that is here, else 80
    plan_host_gb: float = 0.0  # memory of one machine of up to 8 GPUs; 0: of this one where it has a GPU, else not judged
    plan_tflops: float = 0.0  # TFLOP/s that training reaches on one GPU; 0: assumed from its data sheet, else from an H200's
    plan_disk_gb: float = 2.0  # GB/s at which one machine writes and reads checkpoints
    plan_mtbf_hours: float = 50_000.0  # GPU hours from one interruption to the next; 419 in 54 days of 16,384 H100s for Llama 3
    plan_restart_minutes: float = 10.0  # from an interruption until training goes on: noticing it, the queue, loading


WORSE = ("soft", "washed_out", "hazy", "smeared", "grainy", "saturated", "frozen", "identical", "black", "artefacts", "non_finite")
"""Kinds of finding by which a video is worse than its reference. Sharper is not worse."""


@dataclass(frozen=True)
class SampleStage:
    name: str = "sample"  # chosen by stage=sample
    source: str | None = None  # run, checkpoint, pipeline folder, video or folder of frames; default: this run
    source_kind: str = "auto"  # what source is: auto (its content decides), run, checkpoint, pipeline, ...
    reference: str | None = None  # videos or frames to compare the sharpness with
    reference_kind: str = "auto"  # what reference is: auto (its content decides), run, checkpoint, pipeline, ...
    prompts: str | None = None  # wins over sampling.prompts
    output: str | None = None  # default <run>/sampled
    fail_on: list[str] = field(default_factory=lambda: list(WORSE))  # kinds of finding that make the exit code 3


@dataclass(frozen=True)
class FactsConfig:
    """What no file tells of a SAT checkpoint; null: the files tell. A fact that contradicts them stops the export."""

    heads: int | None = None  # attention heads
    head_dim: int | None = None  # width of one head
    patch_size_t: int | None = None  # latent frames per token: 2 for 1.5, none for 1.0
    latent_frames: int | None = None  # latent frames the positions were made for
    latent_height: int | None = None  # latent rows the positions were made for
    latent_width: int | None = None  # latent columns the positions were made for
    temporal_compression: int | None = None  # frames per latent frame
    text_tokens: int | None = None  # length captions are padded to
    scaling_factor: float | None = None  # of the latents: 0.7 for 5B, 1.15258426 for 2B
    snr_shift_scale: float | None = None  # of the noise schedule: 1.0 for 5B, 3.0 for 2B
    spatial_interpolation: float | None = None  # of 2B's position table
    temporal_interpolation: float | None = None  # of 2B's position table
    invert_scale_latents: bool | None = None  # whether image latents are divided by the scaling factor
    dtype: str | None = None  # what it was trained in: fp32 | bf16 | fp16
    lora_alpha: float | None = None  # SAT scales a LoRA by alpha / rank; its own default is 1


@dataclass(frozen=True)
class ExportStage:
    name: str = "export"  # chosen by stage=export
    source: str | None = None  # run, checkpoint, SAT folder, .pt file, DeepSpeed or diffusers folder; default: this run
    source_kind: str = "auto"  # what source is: auto (its content decides), run, checkpoint, pipeline, ...
    output: str | None = None  # default <run>/export
    components: list[str] = field(default_factory=lambda: ["transformer"])  # of the source: transformer, vae, text_encoder
    weights: str = "auto"  # auto (EMA where there is one) | model | ema
    masters: str = "auto"  # of a DeepSpeed folder: auto (fp32 where there are) | fp32 | bf16
    lora: str = "merge"  # of a SAT LoRA: merge (into the weights) | separate (a diffusers LoRA file)
    config: list[str] = field(default_factory=list)  # SAT yaml files, or a diffusers config.json, beside those that are found
    facts: FactsConfig = field(default_factory=FactsConfig)  # what no file tells
    dtype: str = "auto"  # of the transformer: auto (that of training; fp32 when trained on a CPU) | fp32 | bf16 | fp16
    to: str = "diffusers"  # layout to write: diffusers | sat
    max_shard_size: str = "5GB"  # of one safetensors file
    verify: str = "auto"  # auto (whole when small, else first and last block) | whole | ends | off
    dry_run: bool = False  # print the plan and what was inferred from where, write nothing


@dataclass(frozen=True)
class AssembleStage:
    name: str = "assemble"  # chosen by stage=assemble
    output: str | None = None  # default <run>/pipeline
    base: str | None = None  # pipeline folder or run for every component that is not named; default: the model's own
    base_kind: str = "auto"  # what base is: auto (its content decides), run, checkpoint, pipeline, ...
    transformer: str | None = None  # component, pipeline, export, run, checkpoint, SAT folder or .pt file; default <run>/export
    transformer_kind: str = "auto"  # what transformer is: auto (its content decides), run, checkpoint, pipeline, ...
    vae: str | None = None  # the same; default: that of base, as for the next three
    vae_kind: str = "auto"  # what vae is: auto (its content decides), run, checkpoint, pipeline, ...
    text_encoder: str | None = None  # the same
    text_encoder_kind: str = "auto"  # what text_encoder is: auto (its content decides), run, checkpoint, pipeline, ...
    tokenizer: str | None = None  # folder of the component, pipeline or run
    tokenizer_kind: str = "auto"  # what tokenizer is: auto (its content decides), run, checkpoint, pipeline, ...
    scheduler: str | None = None  # folder of the component, pipeline or run; of a SAT checkpoint: the one it was trained with
    scheduler_kind: str = "auto"  # what scheduler is: auto (its content decides), run, checkpoint, pipeline, ...
    weights: str = "auto"  # of a run or checkpoint that is exported on the way: auto (EMA where there is one) | model | ema
    dtype: str = "auto"  # of a transformer that is exported on the way, as at stage=export
    config: list[str] = field(default_factory=list)  # SAT yaml files beside those that are found, as at stage=export
    facts: FactsConfig = field(default_factory=FactsConfig)  # what no file of a SAT checkpoint tells, as at stage=export
    set: dict[str, dict[str, Any]] = field(default_factory=dict)  # values set on the way: stage.set.vae.scaling_factor=0.7
    force: list[str] = field(default_factory=list)  # contradictions passed over and recorded: [vae.scaling_factor]
    link: str = "auto"  # how weights get there: auto (reflink, else hard link, else copy) | hard | copy
    rehash: bool = False  # read files again that are unchanged, by inode, size and time, since they were hashed before
    verify: bool = True  # load the folder in a fresh process and compare its samples with the run's
    push_to_hub: str | None = None  # OWNER/NAME at Hugging Face's hub to upload the finished folder to; default: nowhere
    hub_private: bool = True  # a repository that push_to_hub makes is seen by nobody else


@dataclass(frozen=True)
class DiagnoseStage:
    name: str = "diagnose"  # chosen by stage=diagnose
    candidate: str | None = None  # what to look at: a pipeline folder, a run, an export or a checkpoint; default: the run
    candidate_kind: str = "auto"  # what candidate is: auto (its content decides), run, checkpoint, pipeline, ...
    reference: str | None = None  # what is known to be right, of the same kinds; default: only what model= declares
    reference_kind: str = "auto"  # what reference is: auto (its content decides), run, checkpoint, pipeline, ...
    full: bool = False  # take every step, also when an early one explains all
    fix: bool = False  # write the mended folder, and prove that it healed
    output: str | None = None  # of stage.fix; default <run>/mended
    prompts: int = 2  # sampled for the swaps
    clips: int = 4  # looked at for the evidence in the weights
    data: str | None = None  # a run whose prepared clips are looked at; default: that of either side, else drawn clips
    scaling_factors: list[float] = field(default_factory=list)  # tried beside 0.7, 1.15258426 and 1/0.7
    snr_shift_scales: list[float] = field(default_factory=list)  # tried beside 1 and 3


@dataclass(frozen=True)
class FlowStage:
    name: str = "flow"  # chosen by stage=flow
    prepare: PrepareStage = field(default_factory=PrepareStage)  # as stage=prepare
    train: TrainStage = field(default_factory=TrainStage)  # as stage=train
    export: ExportStage = field(default_factory=ExportStage)  # as stage=export
    assemble: AssembleStage = field(default_factory=AssembleStage)  # as stage=assemble
    diagnose: DiagnoseStage = field(default_factory=DiagnoseStage)  # as stage=diagnose


StageConfig = (
    PrepareStage | TrainStage | SampleStage | ExportStage | AssembleStage | DiagnoseStage | FlowStage | BenchmarkStage
)

STAGES: dict[str, type] = {kind.name: kind for kind in get_args(StageConfig)}


StageT = TypeVar("StageT", covariant=True)
OtherT = TypeVar("OtherT")


@dataclass(frozen=True)
class Config(Generic[StageT]):
    """All settings of one command. The type parameter is the class of its stage's settings, as in ``Config[TrainStage]``."""

    stage: StageT
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def with_stage(self, stage: OtherT) -> Config[OtherT]:
        """Return the same settings for another stage."""
        return replace(cast("Config[Any]", self), stage=stage)


AnyConfig = Config[Any]
"""The settings of a command whose stage may be any."""
