"""Which settings fit where the asked ones do not: every way of sharing the states, tried by the same formulas."""

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
"""Files of ``configs/deepspeed`` that a large model trains with, the quicker first."""


@dataclass(frozen=True)
class Option:
    """One way that fits. ``words``: what to change on the command line; ``pace``: of one step."""

    gpus: int
    words: tuple[str, ...]
    setting: GpuLayout
    gpu: gpu_memory.Memory
    host: gpu_memory.Memory
    pace: Pace


def options(plan: Plan) -> list[Option]:
    """Ways that fit, those on as many GPUs as asked for first, then the quickest on each other number of them; no more than six."""
    found = []
    for gpus in dict.fromkeys((plan.setting.gpus, *WORLDS)):
        found += at(plan, gpus)[: 2 if gpus == plan.setting.gpus else 1]
    return found[:6]


def at(plan: Plan, gpus: int) -> list[Option]:
    """Ways that fit on ``gpus`` GPUs, the quickest first; of those within two hundredths, the one that changes least. More GPUs
    share a sequence only where nothing fits without."""
    return next((found for sequence in _sequences(plan, gpus) if (found := _sharing(plan, gpus, sequence))), [])


def _sequences(plan: Plan, gpus: int) -> list[int]:
    """GPUs of one machine that may share a sequence, as many as asked for or more."""
    asked = plan.setting.sequence
    sizes = [asked, *(one for one in SEQUENCES if one > asked and one % asked == 0)]
    return [one for one in sizes if gpus % one == 0 and plan.shape.heads % one == 0]


def _sharing(plan: Plan, gpus: int, sequence: int) -> list[Option]:
    fitting = [option for option in _at(plan, gpus, sequence) if _fits(plan, option)]
    # What fits as it samples now need not sample otherwise.
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
    times = sequence // plan.setting.sequence
    tilings = (
        [plan.sampling]
        if plan.sampling is None or plan.sampling.tiled
        else [plan.sampling, replace(plan.sampling, tiled=True)]
    )
    for name in PRESETS:
        for checkpointing in (False, True):
            for sampling in tilings:
                layout = replace(
                    of_preset(plan.setting, name, gpus),
                    checkpointing=checkpointing,
                    sequence=sequence,
                    accumulation=times * plan.setting.accumulation,
                )
                words = [f"deepspeed={name}"] if _differs(plan.config.deepspeed, name) else []
                if checkpointing != plan.setting.checkpointing:
                    words.append(f"deepspeed.activation_checkpointing={str(checkpointing).lower()}")
                if times > 1:  # as many clips a step
                    words += [f"parallel.sequence={sequence}", f"stage.gradient_accumulation={layout.accumulation}"]
                if sampling is not plan.sampling:
                    words.append(TILING)
                yield _option(plan, layout, sampling, words)


def of_preset(setting: GpuLayout, name: str, gpus: int) -> GpuLayout:
    """``setting`` with the states shared as the preset ``name`` does, over ``gpus`` GPUs."""
    preset = PRESETS[name]
    return replace(
        setting,
        gpus=gpus,
        fitted=None,
        keep="nothing" if preset["zero_stage"] == 3 else setting.keep,
        local=setting.local if gpus == setting.gpus else min(gpus, max(setting.local, NODE)),
        zero_stage=int(preset["zero_stage"]),
        offload_optimizer=bool(preset["offload_optimizer"]),
        offload_parameters=bool(preset["offload_parameters"]),
    )


def _differs(deepspeed: DeepSpeedConfig, name: str) -> bool:
    return any(getattr(deepspeed, key) != value for key, value in PRESETS[name].items())


def _option(plan: Plan, layout: GpuLayout, sampling: gpu_memory.Sampling | None, words: list[str]) -> Option:
    if layout.gpus != plan.setting.gpus:
        words = [f"{layout.gpus} GPU{'s' if layout.gpus > 1 else ''} (stage.plan_gpus={layout.gpus})", *words]
    encoder = plan.encoder
    size = TrainingSize(plan.shape, plan.model_source, plan.dtype, plan.tokens, layout, sampling, encoder)
    layout = fit(size, plan.device.memory)
    return Option(
        gpus=layout.gpus,
        words=tuple(words),
        setting=layout,
        gpu=gpu_memory.gpu(plan.shape, plan.tokens, layout, sampling, encoder=encoder),
        host=gpu_memory.host(plan.shape, layout, validates=sampling is not None, encoder=encoder),
        pace=pace(plan.shape, plan.tokens, layout, plan.device.tflops),
    )


def _fits(plan: Plan, option: Option) -> bool:
    on_host = plan.device.host is None or option.host.peak <= plan.device.host
    return option.gpu.peak <= plan.device.memory and on_host


def notes(plan: Plan) -> list[str]:
    """Single changes that help, where no way of sharing the states does, and for what sharing does not change."""
    lines = []
    if plan.gpu.peak > plan.device.memory:
        if plan.setting.batch > 1:
            words = f"stage.batch_size=1 stage.gradient_accumulation={plan.setting.batch * plan.setting.accumulation}"
            lines.append(f"{words}: as many clips a step with less memory")
        if plan.gpu.parts["EMA"]:
            lines.append(
                f"stage.ema_device=cpu takes {plan.gpu.parts['EMA'] / 1e9:.0f} GB off each GPU, at the price of a copy a step"
            )
        lines.append("data.frames, data.height and data.width smaller: activations shrink with the tokens")
    if plan.device.host is not None and plan.host.peak > plan.device.host and plan.setting.ema:
        lines.append(
            f"stage.ema_decay=0 takes {(plan.host.parts['EMA'] + plan.host.parts['weights set aside']) / 1e9:.0f} GB off each machine"
        )
    return lines
