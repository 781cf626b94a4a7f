"""Whether a config can work, as far as that shows without touching data or weights: ranges, choices, and keys that depend on
each other. All problems are reported at once."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cogflow.config.benchmarks import WHATS
from cogflow.config.build import show
from cogflow.config.deepspeed import KEEPS, deepspeed_problems
from cogflow.config.parallel import not_measured, shared
from cogflow.config.problems import Problem, did_you_mean, fail, nearest
from cogflow.config.schema import WORSE, AnyConfig, BenchmarkStage, FlowStage, PrepareStage, TrainStage

MODELS = ("tiny", "cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v", "auto")
DTYPES = ("auto", "fp32", "bf16", "fp16")
SAMPLERS = ("default", "dpm", "ddim", "sat_dpm", "sat_ddim")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "hexagon")
MOTIONS = ("left", "right", "up", "down")

Rule = Callable[[Any], str | None]


def check(config: AnyConfig) -> None:
    """Raise one :class:`ConfigError` that lists everything wrong with ``config``; return when nothing is."""
    fail(find_problems(config))


def find_problems(config: AnyConfig) -> list[Problem]:
    problems = [
        problem for field in dataclasses.fields(config) for problem in _ranges(getattr(config, field.name), field.name)
    ]
    bad = {key for problem in problems for key in problem.keys}
    return problems + [problem for problem in _between(config) if not bad & set(problem.keys)]


def at_least(low: float) -> Rule:
    return lambda value: None if value >= low else f"it should be {low} or more."


def above(low: float) -> Rule:
    return lambda value: None if value > low else f"it should be more than {low}."


def within(low: float, high: float) -> Rule:
    return lambda value: None if low <= value <= high else f"it should lie between {low} and {high}."


def below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else "it should be 0 or more, and less than 1."


def share(value: float) -> str | None:
    return None if 0 < value <= 1 else "it should be more than 0 and at most 1."


def one_of(*choices: str) -> Rule:
    return lambda value: (
        None
        if value in choices
        else f"it should be one of {', '.join(choices)}.{did_you_mean(nearest(value, choices))}"
    )


def each(rule: Rule) -> Rule:
    return lambda values: next((problem for value in values if (problem := rule(value))), None)


def multiple_of(step: int) -> Rule:
    def rule(value: int) -> str | None:
        nearest_good = max(step, round(value / step) * step)
        return (
            None if value > 0 and value % step == 0 else f"it should be a multiple of {step}, such as {nearest_good}."
        )

    return rule


def frames(value: int) -> str | None:
    return (
        None
        if value > 0 and value % 4 == 1
        else f"it should be 4k+1, such as {max(1, round((value - 1) / 4) * 4 + 1)}."
    )


def sizes(value: list[str]) -> str | None:
    for bucket in value:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", bucket, re.ASCII):
            return f"{bucket} should be frames x height x width, such as 49x480x720."
        count, *sides = map(int, bucket.split("x"))
        if wrong := frames(count) or each(multiple_of(16))(sides):
            return f"{bucket}: {wrong}"
    return "each bucket should be there once." if len(set(value)) < len(value) else None


def folder_name(value: str) -> str | None:
    return (
        None
        if re.fullmatch(r"[^./\s\x00][^/\x00]*", value)
        else "it should be a plain folder name without slashes or a leading dot."
    )


def filled(value: Any) -> str | None:
    return None if value else "it should not be empty."


def shard_size(value: str) -> str | None:
    return (
        None
        if re.fullmatch(r"[1-9]\d*(\.\d+)?\s?(KB|MB|GB|TB|KiB|MiB|GiB|TiB)", value)
        else "it should be a size, such as 5GB."
    )


def components(value: list[str]) -> str | None:
    known = ("transformer", "vae", "text_encoder")
    if not value or len(set(value)) < len(value):
        return f"it should be a list of {', '.join(known)}."
    return each(one_of(*known))(value)


def optional(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def two_betas(value: list[float]) -> str | None:
    return (
        None
        if len(value) == 2 and all(0 <= beta < 1 for beta in value)
        else "it should be two numbers below 1, such as [0.9,0.95]."
    )


def distinct(value: list[int]) -> str | None:
    return (
        None
        if value and len(set(value)) == len(value) and min(value) >= 0
        else "it should be different whole numbers from 0 up, such as [0]."
    )


def of_components(value: dict[str, Any]) -> str | None:
    names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    wrong = next((name for name in value if name not in names), None)
    return (
        f"{wrong} is no component; one of {', '.join(names)}, as stage.set.vae.scaling_factor=0.7." if wrong else None
    )


def repository(value: str) -> str | None:
    return None if re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII) else "it should be OWNER/NAME."


RULES: dict[str, dict[str, Rule]] = {
    "RunConfig": {"root": filled, "name": folder_name},
    "ModelConfig": {"name": one_of(*MODELS), "dtype": one_of(*DTYPES)},
    "DataConfig": {
        "name": one_of("shapes", "folder"), "frames": frames, "height": multiple_of(16), "width": multiple_of(16), "fps": above(0),
        "resize": one_of("cover", "stretch", "none"), "crop": one_of("center", "random"),
        "window": one_of("start", "center", "random"), "holdout": at_least(0), "max_bad_share": within(0, 1),
        "max_bad_in_a_row": at_least(1), "buckets": sizes, "image_variants": at_least(1),
        "seed": at_least(0), "clips": at_least(1), "colours": each(one_of(*COLOURS)),
        "shapes": each(one_of(*SHAPES)), "motions": each(one_of(*MOTIONS)),
    },
    "DeepSpeedConfig": {"zero_stage": within(0, 3), "reduce_bucket_size": at_least(1), "allgather_bucket_size": at_least(1), "checkpoint_every_block": at_least(0), "checkpoint_keep": one_of("auto", *KEEPS), "reduce_dtype": one_of("fp32", "model")},
    "ParallelConfig": {"sequence": at_least(1)},
    "SpeedConfig": {"attention": one_of("auto", "flash", "cudnn", "efficient", "math"), "compile": one_of("auto", "off", "blocks", "graphs"), "prefetch": at_least(1)},
    "SamplingConfig": {"sampler": one_of(*SAMPLERS), "steps": within(1, 1000), "guidance_scale": at_least(0), "seeds": distinct, "vae_dtype": one_of(*DTYPES), "roundtrip_clips": at_least(0)},
    "TrackingConfig": {"project": filled, "wandb": one_of("offline", "online", "disabled"), "log_every": at_least(1), "upload_mb": at_least(0)},
    "PrepareStage": {"batch_size": at_least(1), "shard_clips": at_least(1), "stall_minutes": at_least(0)},
    "TrainStage": {
        "steps": at_least(1), "batch_size": at_least(1), "gradient_accumulation": at_least(1), "learning_rate": at_least(0),
        "betas": two_betas, "eps": above(0), "weight_decay": at_least(0), "gradient_clipping": at_least(0),
        "warmup_steps": at_least(0), "schedule": one_of("constant", "linear", "cosine"), "min_lr_ratio": within(0, 1),
        "text_dropout": within(0, 1), "image_dropout": within(0, 1),
        "ema_decay": below_one, "seed": at_least(0), "resume": filled, "save_every": at_least(0),
        "sample_every": at_least(0), "evaluate_every": at_least(0), "keep_last": at_least(1),
        "keep_best": at_least(0), "keep_every": at_least(0), "weights_every": at_least(0),
        "on_blur": one_of("warn", "stop", "rollback"), "on_not_finite": one_of("stop", "skip", "rollback"),
        "on_spike": one_of("log", "skip"), "ema_every": at_least(1), "ema_device": one_of("auto", "cpu"), "stall_minutes": at_least(0),
        "plan_gpus": at_least(0), "plan_memory_gb": at_least(0), "plan_host_gb": at_least(0), "plan_tflops": at_least(0),
        "plan_disk_gb": above(0), "plan_mtbf_hours": above(0), "plan_restart_minutes": at_least(0),
    },
    "RollbackConfig": {"learning_rate_ratio": share, "most": at_least(1)},
    "SampleStage": {"fail_on": each(one_of(*WORSE, "over_sharpened"))},
    "ExportStage": {
        "weights": one_of("auto", "model", "ema"), "dtype": one_of(*DTYPES), "to": one_of("diffusers", "sat"),
        "max_shard_size": shard_size, "components": components, "masters": one_of("auto", "fp32", "bf16"),
        "lora": one_of("merge", "separate"), "verify": one_of("auto", "whole", "ends", "off"),
    },
    "FactsConfig": {
        name: optional(above(0))
        for name in (
            "heads", "head_dim", "patch_size_t", "latent_frames", "latent_height", "latent_width", "temporal_compression", "text_tokens",
            "scaling_factor", "snr_shift_scale", "spatial_interpolation", "temporal_interpolation", "lora_alpha",
        )
    }
    | {"dtype": optional(one_of(*DTYPES[1:]))},
    "AssembleStage": {
        "weights": one_of("auto", "model", "ema"), "dtype": one_of(*DTYPES), "link": one_of("auto", "hard", "copy"), "set": of_components,
        "push_to_hub": optional(repository),
    },
    "DiagnoseStage": {"prompts": at_least(1), "clips": at_least(1), "scaling_factors": each(above(0)), "snr_shift_scales": each(above(0))},
    "BenchmarkStage": {
        "what": one_of(*WHATS),
        "batch_size": at_least(1), "steps": at_least(1), "layers": optional(at_least(1)), "repeats": at_least(1),
        "contents": at_least(0), "clip_height": at_least(0),
    },
}  # fmt: skip
"""What each key must satisfy by itself, by the name of its dataclass."""


def _ranges(section: Any, path: str) -> Iterator[Problem]:
    rules = RULES.get(type(section).__name__, {})
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _ranges(value, key)
            continue
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield Problem(f"{key}={show(value)}: it should be finite.", (key,))
        elif field.name in rules and (wrong := rules[field.name](value)):
            yield Problem(f"{key}={show(value)}: {wrong}", (key,))


def _between(config: AnyConfig) -> Iterator[Problem]:
    """Keys that contradict each other."""
    model, data, stage = config.model, config.data, config.stage
    trains = isinstance(stage, PrepareStage | TrainStage | FlowStage)
    if model.name == "auto" and (trains or stage.name == "benchmark"):
        yield Problem(f"model=auto: stage={stage.name} must know its model: {', '.join(MODELS[:-1])}.", ("model.name",))
    planned = isinstance(stage, TrainStage) and stage.plan  # which needs neither weights nor clips
    if trains and not planned and model.name not in ("tiny", "auto") and model.path is None:
        yield Problem(
            f"model.path is missing: model={model.name} has no weights here; give the diffusers pipeline folder to start from.",
            ("model.name", "model.path"),
        )
    if trains and not planned and data.name == "folder" and data.path is None:
        yield Problem("data.path is missing: data=folder needs the folder of your clips.", ("data.name", "data.path"))
    if data.name == "shapes" and data.holdout >= data.clips:
        yield Problem(
            f"data.holdout={data.holdout}: no clip is left to train on; it should be less than data.clips={data.clips}.",
            ("data.holdout", "data.clips"),
        )
    step = 16 if model.name.startswith("cogvideox1.5") else 8
    asked = [("data.frames", show(data.frames), data.frames)]
    asked += [("data.buckets", bucket, int(bucket.split("x")[0])) for bucket in data.buckets if sizes([bucket]) is None]
    for key, shown, count in asked:
        if model.name.startswith("cogvideox") and count % step != 1:
            good = max(1, round((count - 1) / step)) * step + 1
            yield Problem(f"{key}={shown}: {model.name} takes {step}k+1 frames, such as {good}.", (key, "model.name"))
    sampling = config.sampling
    if sampling.sampler.startswith("sat_") and not 2 <= sampling.steps <= 999:
        yield Problem(
            f"sampling.steps={sampling.steps}: sampling.sampler={sampling.sampler} takes 2 to 999 steps, as SAT does.",
            ("sampling.steps", "sampling.sampler"),
        )
    yield from deepspeed_problems(config)
    if isinstance(stage, FlowStage) and stage.train.plan:
        yield Problem(
            "stage.train.plan=true: a plan trains nothing to go on with; use stage=train stage.plan=true.",
            ("stage.train.plan",),
        )
    train, path = (stage.train, "stage.train") if isinstance(stage, FlowStage) else (stage, "stage")
    if (
        isinstance(train, TrainStage)
        and train.resume not in ("auto", "never")
        and not Path(train.resume).expanduser().is_dir()
    ):
        guess = did_you_mean(nearest(train.resume, ("auto", "never")))
        yield Problem(
            f"{path}.resume={train.resume}: no such folder; auto, never, or a checkpoint's folder.{guess}",
            (f"{path}.resume",),
        )
    if isinstance(train, TrainStage):
        yield from _watched(train, path)
        yield from shared(config, train)
    elif isinstance(stage, BenchmarkStage) and config.parallel.sequence > 1:
        yield not_measured(config)


def _watched(train: TrainStage, path: str) -> Iterator[Problem]:
    """Policies that need samples to judge by, and checkpoints to go back to."""
    for key, wanted in (("on_blur", train.on_blur != "warn"), ("keep_best", train.keep_best > 0)):
        if wanted and not train.sample_every:
            yield Problem(
                f"{path}.{key}={getattr(train, key)}: without samples nothing shows blur; give {path}.sample_every, such as "
                f"{max(1, train.steps // 4)}.",
                (f"{path}.{key}", f"{path}.sample_every"),
            )
    for key in ("on_blur", "on_not_finite"):
        if getattr(train, key) == "rollback" and not train.save_every:
            yield Problem(
                f"{path}.{key}=rollback: there is no checkpoint to go back to; give {path}.save_every, such as "
                f"{max(1, train.sample_every or train.steps // 4)}.",
                (f"{path}.{key}", f"{path}.save_every"),
            )
