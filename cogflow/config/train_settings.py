"""Settings of the stages prepare and train, and of the plan of a training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogflow.config.problems import Problem, did_you_mean, nearest
from cogflow.config.setting import (
    BELOW_ONE,
    NOT_EMPTY,
    SHARE,
    ValueRule,
    above,
    at_least,
    kind_setting,
    one_of,
    section,
    setting,
    within,
)

if TYPE_CHECKING:
    from cogflow.config.config import AnyConfig

BETAS = ValueRule(
    "two numbers, each below 1",
    lambda value: (
        None
        if len(value) == 2 and all(0 <= beta < 1 for beta in value)
        else "it should be two numbers below 1, such as [0.9,0.95]."
    ),
)


@dataclass(frozen=True)
class PrepareStage:
    """``stage.*`` of stage=prepare: clips and captions to cached latents and text embeddings."""

    name: str = setting("prepare", help="Chosen by stage=prepare.")
    batch_size: int = setting(4, help="Captions encoded per batch. Clips are encoded one by one.", rule=at_least(1))
    shard_clips: int = setting(64, help="Clips per safetensors shard of the cache.", rule=at_least(1))
    stall_minutes: float = setting(
        60.0,
        help="Minutes without progress after which the run stops and names the stalled rank. 0: never.",
        rule=at_least(0),
    )


@dataclass(frozen=True)
class RollbackConfig:
    """Changes that a training makes when it returns to the last sharp checkpoint."""

    learning_rate_ratio: float = setting(
        1.0,
        help="Factor on the learning rate after a rollback. 1: the run stops at the checkpoint for you to change "
        "settings.",
        rule=SHARE,
    )
    most: int = setting(2, help="Rollbacks per run. The next alarm stops the run.", rule=at_least(1))


@dataclass(frozen=True)
class TrainStage:
    """``stage.*`` of stage=train: full finetuning on DeepSpeed."""

    name: str = setting("train", help="Chosen by stage=train.")
    steps: int = setting(150, help="Optimizer steps.", rule=at_least(1))
    batch_size: int = setting(8, help="Clips per rank and micro step.", rule=at_least(1))
    gradient_accumulation: int = setting(1, help="Micro steps per optimizer step.", rule=at_least(1))
    learning_rate: float = setting(4e-4, help="Learning rate after the warm-up.", rule=at_least(0))
    betas: list[float] = setting([0.9, 0.95], help="Betas of AdamW.", rule=BETAS)
    eps: float = setting(1e-8, help="Epsilon of AdamW.", rule=above(0))
    weight_decay: float = setting(1e-4, help="Weight decay of AdamW.", rule=at_least(0))
    gradient_clipping: float = setting(1.0, help="Largest norm of the gradient. 0: no clipping.", rule=at_least(0))
    warmup_steps: int = setting(10, help="Steps in which the learning rate rises from zero.", rule=at_least(0))
    schedule: str = setting(
        "cosine", help="Learning rate after the warm-up.", rule=one_of("constant", "linear", "cosine")
    )
    min_lr_ratio: float = setting(
        0.1, help="Final learning rate of linear and cosine, as a share of stage.learning_rate.", rule=within(0, 1)
    )
    text_dropout: float = setting(0.1, help="Share of samples trained without their caption.", rule=within(0, 1))
    image_dropout: float = setting(
        0.05, help="Image to video: share of samples trained without their first frame.", rule=within(0, 1)
    )
    ema_decay: float = setting(0.0, help="Decay of the moving average of the weights (EMA). 0: no EMA.", rule=BELOW_ONE)
    ema_every: int = setting(
        1, help="Steps between EMA updates. stage.ema_decay is the decay per update.", rule=at_least(1)
    )
    ema_device: str = setting(
        "auto",
        help="Memory that holds each rank's shard of the EMA. auto: that of the model, cpu: host memory.",
        rule=one_of("auto", "cpu"),
    )
    ema_warmup: bool = setting(
        True, help="Let the EMA decay grow during the first updates, so that the EMA leaves the initial weights sooner."
    )
    seed: int = setting(0, help="Seed of sample order, noise, timesteps and dropped captions.", rule=at_least(0))
    resume: str = setting(
        "auto",
        help="auto: resume the run if it has a checkpoint. never: start again. PATH: resume this checkpoint folder.",
        rule=NOT_EMPTY,
    )
    save_every: int = setting(75, help="Steps between checkpoints. 0: only at the end.", rule=at_least(0))
    weights_every: int = setting(
        0, help="Steps between saves of the weights alone, for export, in <run>/weights. 0: never.", rule=at_least(0)
    )
    sample_every: int = setting(75, help="Steps between validations that sample videos. 0: never.", rule=at_least(0))
    evaluate_every: int = setting(
        25, help="Steps between computations of the held-out loss. 0: never.", rule=at_least(0)
    )
    keep_last: int = setting(
        2,
        help="Newest checkpoints to keep. The newest one that the quality watch rated sharp is kept, too.",
        rule=at_least(1),
    )
    keep_every: int = setting(
        0, help="Keep every checkpoint at a multiple of this many steps, too. 0: none.", rule=at_least(0)
    )
    keep_best: int = setting(
        0,
        help="Best checkpoints to keep, too, ranked by the quality watch, then by held-out loss.",
        rule=at_least(0),
    )
    changed_data: str = setting(
        "stop",
        help="Reaction to clips or captions that are not those prepared for this run. stop: exit code 2 with their "
        "names. use_prepared: train on the clips that were prepared for it.",
        rule=one_of("stop", "use_prepared"),
    )
    on_blur: str = setting(
        "warn",
        help="Reaction to an alarm of the quality watch. stop: exit code 3. rollback: return to the last sharp "
        "checkpoint.",
        rule=one_of("warn", "stop", "rollback"),
    )
    on_not_finite: str = setting(
        "stop",
        help="Reaction to a loss or gradient that is not finite. The step changes no weight in any case; skip: "
        "continue.",
        rule=one_of("stop", "skip", "rollback"),
    )
    on_spike: str = setting(
        "log",
        help="Reaction to a loss more than 6 deviations above the last 128 steps. skip: leave out the step.",
        rule=one_of("log", "skip"),
    )
    rollback: RollbackConfig = section(RollbackConfig, help="Used by on_blur=rollback and on_not_finite=rollback.")
    stall_minutes: float = setting(
        30.0,
        help="Minutes without progress after which the run stops and names the stalled rank. 0: never.",
        rule=at_least(0),
    )
    freeze: list[str] = setting([], help="Patterns of weight names that are not trained, such as [patch_embed.*].")
    start: str | None = setting(
        None,
        help="Initial weights: a run, a checkpoint, a SAT folder or a diffusers folder. Default: those of model.path.",
    )
    start_kind: str = kind_setting("stage.start")
    plan: bool = setting(
        False,
        help="Print the forecast of memory, time and disk, and train nothing. Needs neither weights nor clips.",
    )
    plan_gpus: int = setting(0, help="GPUs to plan for. 0: the number of processes.", rule=at_least(0))
    plan_memory_gb: float = setting(
        0.0, help="Memory of one GPU in 10^9 bytes. 0: that of the present GPU, else 80.", rule=at_least(0)
    )
    plan_host_gb: float = setting(
        0.0,
        help="Host memory of one machine of up to 8 GPUs, in 10^9 bytes. 0: that of this machine if it has a GPU, else "
        "not checked.",
        rule=at_least(0),
    )
    plan_tflops: float = setting(
        0.0,
        help="TFLOP/s that training reaches on one GPU. 0: estimated from the data sheet of the GPU, else of an H200.",
        rule=at_least(0),
    )
    plan_disk_gb: float = setting(2.0, help="GB/s at which one machine writes and reads checkpoints.", rule=above(0))
    plan_mtbf_hours: float = setting(
        50_000.0,
        help="GPU hours between interruptions. Llama 3 had 419 interruptions in 54 days on 16,384 H100s.",
        rule=above(0),
    )
    plan_restart_minutes: float = setting(
        10.0,
        help="Minutes from an interruption until training continues: detection, queue and loading.",
        rule=at_least(0),
    )


class Training(NamedTuple):
    """The settings of the training that a command runs, and their dotted prefix."""

    settings: TrainStage
    path: str


def training_of(config: AnyConfig) -> Training | None:
    """Return the training of stage=train or stage=flow, ``None`` for other stages."""
    if config.stage.name == "flow":
        return Training(config.stage.train, "stage.train")
    return Training(config.stage, "stage") if config.stage.name == "train" else None


def check_training(config: AnyConfig) -> Iterator[Problem]:
    """Yield contradictions within the settings of a training."""
    training = training_of(config)
    if training is None:
        return
    train, path = training
    if train.plan and config.stage.name == "flow":
        yield Problem(
            "stage.train.plan=true: a plan trains nothing that the flow could export; use stage=train stage.plan=true.",
            ("stage.train.plan",),
        )
    # A checkpoint may be gone when its command is repeated, which then continues the line that it began. So only a word
    # that is no path is a mistake here.
    if train.resume not in ("auto", "never") and "/" not in train.resume and not Path(train.resume).is_dir():
        guess = did_you_mean(nearest(train.resume, ("auto", "never")))
        yield Problem(
            f"{path}.resume={train.resume}: no such folder; it should be auto, never, or the folder of a "
            f"checkpoint.{guess}",
            (f"{path}.resume",),
        )
    yield from _policy_problems(train, path)


def _policy_problems(train: TrainStage, path: str) -> Iterator[Problem]:
    """Yield policies that need samples to decide by, or checkpoints to return to, that are never made."""
    for key, wanted in (("on_blur", train.on_blur != "warn"), ("keep_best", train.keep_best > 0)):
        if wanted and not train.sample_every:
            yield Problem(
                f"{path}.{key}={getattr(train, key)}: blur is measured on samples; set {path}.sample_every, such as "
                f"{max(1, train.steps // 4)}.",
                (f"{path}.{key}", f"{path}.sample_every"),
            )
    for key in ("on_blur", "on_not_finite"):
        if getattr(train, key) == "rollback" and not train.save_every:
            yield Problem(
                f"{path}.{key}=rollback: there is no checkpoint to return to; set {path}.save_every, such as "
                f"{max(1, train.sample_every or train.steps // 4)}.",
                (f"{path}.{key}", f"{path}.save_every"),
            )
