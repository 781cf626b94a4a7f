"""Find settings that fit when the given settings do not: compute the plan of each way to shard the states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.planning.plan import Plan
from cogflow.planning.step_time import Pace, pace
from cogflow.training import gpu_memory
from cogflow.training.activation_memory import TrainingSize, fit
from cogflow.training.gpu_layout import NODE, GpuLayout

WORLDS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCES = (2, 4, 8)
TILING = "sampling.vae_tiling=true"
PRESETS: dict[str, dict[str, bool | int]] = {
    "zero2": {"zero_stage": 2, "offload_optimizer": False, "offload_parameters": False},
    "zero3": {"zero_stage": 3, "offload_optimizer": False, "offload_parameters": False},
    "zero2_offload": {"zero_stage": 2, "offload_optimizer": True, "offload_parameters": False},
    "zero3_offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
"""Files of ``configs/deepspeed`` that a large model trains with, the fastest first."""


@dataclass(frozen=True)
class Option:
    """One layout that fits. ``words``: changes on the command line; ``pace``: seconds of one step."""

    gpus: int
    words: tuple[str, ...]
    layout: GpuLayout
    gpu: gpu_memory.Memory
    host: gpu_memory.Memory
    pace: Pace


def options(plan: Plan) -> list[Option]:
    """Return at most six options that fit: up to two on the given number of GPUs, then the fastest on each other
    number."""
    found = []
    for gpus in dict.fromkeys((plan.layout.gpus, *WORLDS)):
        found += at(plan, gpus)[: 2 if gpus == plan.layout.gpus else 1]
    return found[:6]


def at(plan: Plan, gpus: int) -> list[Option]:
    """Return the options that fit on ``gpus`` GPUs, the fastest first.

    Options within 2 % of each other are sorted by their number of changes. More GPUs share a sequence only if nothing
    fits otherwise.
    """
    return next((found for sequence in _sequences(plan, gpus) if (found := _sharing(plan, gpus, sequence))), [])


def _sequences(plan: Plan, gpus: int) -> list[int]:
    """Return the numbers of GPUs that may share a sequence: the given number and larger ones."""
    asked = plan.layout.sequence
    sizes = [asked, *(one for one in SEQUENCES if one > asked and one % asked == 0)]
    return [one for one in sizes if gpus % one == 0 and plan.shape.heads % one == 0]


def _sharing(plan: Plan, gpus: int, sequence: int) -> list[Option]:
    fitting = [option for option in _at(plan, gpus, sequence) if _fits(plan, option)]
    # Drop options with tiling that also fit without it.
    known = {option.words for option in fitting}
    fitting = [
        one
        for one in fitting
        if TILING not in one.words or tuple(word for word in one.words if word != TILING) not in known
    ]
    quickest = min((option.pace.step for option in fitting), default=1.0)
    return sorted(
        fitting, key=lambda option: (round(50 * option.pace.step / quickest), len(option.words), option.pace.step)
    )


def _at(plan: Plan, gpus: int, sequence: int) -> Iterator[Option]:
    times = sequence // plan.layout.sequence
    tilings = (
        [plan.sampling]
        if plan.sampling is None or plan.sampling.tiled
        else [plan.sampling, replace(plan.sampling, tiled=True)]
    )
    for name in PRESETS:
        for checkpointing in (False, True):
            for sampling in tilings:
                layout = replace(
                    of_preset(plan.layout, name, gpus),
                    checkpointing=checkpointing,
                    sequence=sequence,
                    accumulation=times * plan.layout.accumulation,
                )
                words = [f"deepspeed={name}"] if _differs(plan.config.deepspeed, name) else []
                if checkpointing != plan.layout.checkpointing:
                    words.append(f"deepspeed.activation_checkpointing={str(checkpointing).lower()}")
                if times > 1:  # keep the number of clips per step
                    words += [f"parallel.sequence={sequence}", f"stage.gradient_accumulation={layout.accumulation}"]
                if sampling is not plan.sampling:
                    words.append(TILING)
                yield _option(plan, layout, sampling, words)


def of_preset(layout: GpuLayout, name: str, gpus: int) -> GpuLayout:
    """Return ``layout`` with the states sharded over ``gpus`` GPUs as in the preset ``name``."""
    preset = PRESETS[name]
    return replace(
        layout,
        gpus=gpus,
        fitted=None,
        keep="nothing" if preset["zero_stage"] == 3 else layout.keep,
        local=layout.local if gpus == layout.gpus else min(gpus, max(layout.local, NODE)),
        zero_stage=int(preset["zero_stage"]),
        offload_optimizer=bool(preset["offload_optimizer"]),
        offload_parameters=bool(preset["offload_parameters"]),
    )


def _differs(deepspeed: DeepSpeedConfig, name: str) -> bool:
    return any(getattr(deepspeed, key) != value for key, value in PRESETS[name].items())


def _option(plan: Plan, layout: GpuLayout, sampling: gpu_memory.Sampling | None, words: list[str]) -> Option:
    if layout.gpus != plan.layout.gpus:
        words = [f"{layout.gpus} GPU{'s' if layout.gpus > 1 else ''} (stage.plan_gpus={layout.gpus})", *words]
    encoder = plan.encoder
    size = TrainingSize(plan.shape, plan.model_source, plan.dtype, plan.tokens, layout, sampling, encoder)
    layout = fit(size, plan.device.memory)
    return Option(
        gpus=layout.gpus,
        words=tuple(words),
        layout=layout,
        gpu=gpu_memory.gpu(plan.shape, plan.tokens, layout, sampling, encoder=encoder),
        host=gpu_memory.host(plan.shape, layout, validates=sampling is not None, encoder=encoder),
        pace=pace(plan.shape, plan.tokens, layout, plan.device.tflops),
    )


def _fits(plan: Plan, option: Option) -> bool:
    on_host = plan.device.host is None or option.host.peak <= plan.device.host
    return option.gpu.peak <= plan.device.memory and on_host


def notes(plan: Plan) -> list[str]:
    """Return single changes that save memory and that no preset makes."""
    lines = []
    if plan.gpu.peak > plan.device.memory:
        if plan.layout.batch > 1:
            words = f"stage.batch_size=1 stage.gradient_accumulation={plan.layout.batch * plan.layout.accumulation}"
            lines.append(f"{words}: the same number of clips per step with less memory")
        if plan.gpu.parts["EMA"]:
            freed = plan.gpu.parts["EMA"] / 1e9
            lines.append(f"stage.ema_device=cpu saves {freed:.0f} GB on each GPU and costs one copy per step")
        lines.append("smaller data.frames, data.height or data.width: activations shrink with the number of tokens")
    if plan.device.host is not None and plan.host.peak > plan.device.host and plan.layout.ema:
        freed = (plan.host.parts["EMA"] + plan.host.parts["weights set aside"]) / 1e9
        lines.append(f"stage.ema_decay=0 saves {freed:.0f} GB on each machine")
    return lines
