"""Print a plan as text and tables, and raise an error if the training cannot fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.train_settings import TrainStage
from cogflow.errors import ConfigError
from cogflow.planning import advice, step_time
from cogflow.planning.plan import Plan, plan
from cogflow.runtime.console import echo
from cogflow.training import gpu_memory
from cogflow.training.activation_memory import format_kept

EXPENSIVE = 0.1
"""Share of the training time since the last validation above which a validation is reported as expensive."""

FEWEST_STEPS = 10
"""Smallest number of denoising steps whose samples show blur and not noise."""


def show(config: Config[TrainStage]) -> None:
    """Print the plan of ``config``. Raise :class:`ConfigError` with settings that fit if the plan does not fit."""
    made = plan(config)
    echo(*lines(made))
    if misfits := made.misfits():
        raise ConfigError("This training does not fit:\n" + "\n".join(f"  - {line}" for line in misfits), hint(made))


def lines(plan: Plan) -> list[str]:
    """Return the lines of the printed plan."""
    sections = [
        _model(plan),
        _gpu(plan),
        _host(plan),
        _work(plan),
        _traffic(plan),
        _disk(plan),
        _data(plan),
        _validation(plan),
        _run(plan),
    ]
    text = [line for section in sections for line in (*section, "")]
    return [*text, *_verdict(plan)]


def hint(plan: Plan) -> str:
    """Return one line for each set of overrides that would fit, the best first."""
    found = [
        f"{' '.join(option.words) or 'as configured'}: {gb(option.gpu.peak)} per GPU, {gb(option.host.peak)} of host "
        f"memory per machine, {duration(option.pace.step)} per step"
        for option in advice.options(plan)
    ]
    found = [f"would fit: {line}" for line in found] or ["No way to shard the states fits on up to 64 such GPUs."]
    return "\n  ".join([*found, *advice.notes(plan)])


def _model(plan: Plan) -> list[str]:
    shape, data = plan.shape, plan.config.data
    return [
        f"model        {plan.config.model.name}: {shape.parameters:,} parameters, {shape.trained:,} trained, in "
        f"{plan.dtype} "
        f"({plan.model_source})",
        f"sequence     {plan.tokens.total:,} tokens: {plan.tokens.text} of text, {plan.tokens.video:,} of video "
        f"({_sizes(data)})",
        f"layout       {plan.layout.gpus} GPU{'s' if plan.layout.gpus > 1 else ''} on {plan.layout.nodes} "
        f"machine{'s' if plan.layout.nodes > 1 else ''}, ZeRO-{plan.layout.zero_stage}{_offloaded(plan)}, "
        "activation checkpointing "
        f"{_recomputed(plan)}, {plan.layout.batch} clip{'s' if plan.layout.batch > 1 else ''} x "
        f"{plan.layout.accumulation} micro step{'s' if plan.layout.accumulation > 1 else ''} "
        + (f"per {plan.layout.sequence} GPUs, which share its tokens" if plan.layout.sequence > 1 else "per GPU"),
    ]


def _sizes(data: DataConfig) -> str:
    if not data.buckets:
        return f"{data.frames} frames of {data.height} x {data.width}"
    return f"the largest of {len(data.buckets)} bucket{'s' if len(data.buckets) > 1 else ''}: {', '.join(data.buckets)}"


def _recomputed(plan: Plan) -> str:
    if not plan.layout.checkpointing:
        return "off"
    return f"on ({format_kept(plan.layout.kept(plan.shape.layers))})"


def _offloaded(plan: Plan) -> str:
    names = [
        name
        for name, is_on in (("optimizer", plan.layout.offload_optimizer), ("weights", plan.layout.offload_parameters))
        if is_on
    ]
    return f" ({' and '.join(names)} in host memory)" if names else ""


def _gpu(plan: Plan) -> list[str]:
    limit = f"{gb(plan.device.memory)} available ({plan.device.memory_source})"
    title = f"memory of each GPU: {gb(plan.gpu.peak)} at the peak; {limit}"
    return [title, *_columns(plan.gpu)]


def _host(plan: Plan) -> list[str]:
    limit = (
        f"{gb(plan.device.host)} available" if plan.device.host is not None else "give stage.plan_host_gb to check it"
    )
    return [f"host memory of each machine: {gb(plan.host.peak)} at the peak; {limit}", *_columns(plan.host)]


def _columns(memory: gpu_memory.Memory) -> list[str]:
    """Return the lines of the parts, then of the phases that use them."""
    rows = [f"  {name:<22}{gb(size):>12}" for name, size in _present(memory.parts).items()]
    return [*rows, "  " + "; ".join(f"{name} {gb(size)}" for name, size in memory.phases.items())]


def _present(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size > 0}


def _work(plan: Plan) -> list[str]:
    sample, forward = plan.sample, plan.forward
    floor, waiting = plan.seconds, plan.pace.waiting
    waits = f" and {duration(waiting)} ({waiting / plan.pace.step:.0%}) waiting for communication" if waiting else ""
    measured = "" if plan.stage.plan_tflops else "; a forecast until stage.plan_tflops gives a measured speed"
    return [
        f"operations of one clip: forward {peta(forward.total)} (linear layers {peta(forward.linear)}, attention "
        f"{peta(forward.attention)}), backward {peta(sample.backward)}, recomputation "
        f"{peta(sample.recomputation)}: {peta(sample.total)}",
        f"one step: {plan.clips_per_step} clip{'s' if plan.clips_per_step > 1 else ''}, {peta(plan.flops)} on "
        "each GPU, "
        f"{duration(floor)} at {plan.device.tflops:.0f} TFLOP/s ({plan.device.tflops_source}){waits}; "
        f"{plan.stage.steps} steps: {duration(plan.pace.step * plan.stage.steps)}{measured}",
    ]


def _traffic(plan: Plan) -> list[str]:
    sent = plan.traffic
    between = "none between GPUs"
    if plan.layout.gpus > 1:
        between = f"{gb(sent.between_gpus)} from each GPU (gradients {gb(sent.gradients)}, weights {gb(sent.weights)}"
        between += f", averages {gb(sent.averages)}" if sent.averages else ""
        between += f", tokens {gb(sent.tokens)})" if sent.tokens else ")"
    host = f", {gb(sent.host)} between GPU and host" if sent.host else ""
    lines = [f"communication of one step: {between}{host}; {duration(sent.seconds)} without overlap"]
    if plan.layout.gpus > 1:
        layouts = [replace(plan.layout, zero_stage=stage) for stage in range(4)]
        others = {one.zero_stage: step_time.traffic(plan.shape, plan.tokens, one).between_gpus for one in layouts}
        lines.append("  by ZeRO stage: " + ", ".join(f"{stage}: {gb(sent)}" for stage, sent in others.items()))
    return lines


def _disk(plan: Plan) -> list[str]:
    disk = plan.disk
    there = f"{gb(disk.free)} are free" if disk.free is not None else "the free space is unknown"
    averages = f", averages {gb(disk.averages)}" if disk.averages else ""
    alone = f" and {disk.alone} folders of weights only" if disk.alone else ""
    return [
        f"one checkpoint: {gb(disk.checkpoint)} (DeepSpeed's states {gb(disk.deepspeed)}, weights "
        f"{gb(disk.weights)}{averages}); "
        f"up to {disk.most} at once{alone}: {gb(disk.needed)}; {there}",
        *(
            ["  warning: they do not fit; set stage.keep_last=1 or stage.keep_best=0, or put run.root on a larger disk"]
            if disk.full
            else []
        ),
    ]


def _data(plan: Plan) -> list[str]:
    clips = plan.clips
    if clips.training is None:
        return [f"clips: unknown ({clips.source})"]
    epoch = clips.training / plan.clips_per_step
    text = f"clips: {clips.training} to train on, {clips.holdout} held out ({clips.source}); "
    text += f"an epoch is {epoch:.4g} steps, "
    text += (
        f"{plan.stage.steps} steps are {plan.stage.steps / epoch:.3g} epochs"
        if epoch
        else "there is no clip to train on"
    )
    return [
        text,
        *(["  they were prepared with other data settings: run stage=prepare again"] if clips.size_differs else []),
        *([f"  {clips.left_out}"] if clips.left_out else []),
    ]


def _validation(plan: Plan) -> list[str]:
    if plan.sampling is None:
        return ["validation: none (stage.sample_every=0)"]
    sampling, between = plan.config.sampling, min(plan.stage.sample_every, plan.stage.steps)
    share = plan.validation_seconds / (between * plan.pace.step)
    return [
        f"one validation: {plan.samples} videos ({plan.prompts} prompts x {len(sampling.seeds)} seeds; "
        f"{plan.prompts_source}) x "
        f"{sampling.steps} steps x {plan.passes} passes: {peta(plan.validation_flops)}, "
        f"{duration(plan.validation_seconds)} without "
        f"decoding; {share:.1%} of the {between} training steps before it",
        *_cheaper(share, sampling.steps, between),
    ]


def _cheaper(share: float, steps: int, between: int) -> list[str]:
    """Return the changes that reduce a validation to the share :data:`EXPENSIVE` of the training before it."""
    if share <= EXPENSIVE:
        return []
    every = math.ceil(between * share / EXPENSIVE / 10) * 10
    fewer = int(steps * EXPENSIVE / share)
    ways = [
        f"stage.sample_every={every}",
        *([f"sampling.steps={fewer}"] if fewer >= FEWEST_STEPS else []),
        "fewer prompts",
    ]
    return [f"  expensive: {', '.join(ways[:-1])} or {ways[-1]} would reduce it to {EXPENSIVE:.0%}"]


def _run(plan: Plan) -> list[str]:
    run, stage = plan.goodput, plan.stage
    every = f"saved every {stage.save_every} steps" if stage.save_every else "saved at the end only"
    return [
        f"one save: {duration(run.save)} at {stage.plan_disk_gb:g} GB/s per machine (stage.plan_disk_gb), during "
        "which training waits; "
        f"{every}: {run.saving_share:.2%} of the run; cheapest interval {duration(run.best_seconds)}, "
        f"stage.save_every={run.best_every} "
        "(Young, Daly)",
        f"interruptions: {run.a_week:.2g} per week, {run.interruptions:.2g} in this run (one in "
        f"{stage.plan_mtbf_hours:g} GPU hours: "
        f"stage.plan_mtbf_hours), each costs {duration(run.lost)}: half of the time between two "
        f"saves, and {duration(run.restart)} for the restart (stage.plan_restart_minutes)",
        f"goodput: {run.share:.1%} of {duration(run.seconds)} are training steps; validations "
        f"{run.validation_share:.1%}, saves "
        f"{run.saving_share:.1%}, interruptions {run.lost_share:.1%} ({run.interruptions * run.lost / 3600:.2g} hours)",
    ]


def _verdict(plan: Plan) -> list[str]:
    if plan.misfits():
        return []
    spare = plan.device.memory - plan.gpu.peak
    return [f"it fits: {gb(spare)} remain free on each GPU"]


def gb(bytes: float) -> str:
    """Format bytes as GB (10^9 bytes), with enough digits for a small model."""
    value = bytes / 1e9
    return f"{value:.1f} GB" if value >= 1 else f"{value * 1000:.1f} MB"


def peta(flops: float) -> str:
    return f"{flops / 1e15:.3g} PFLOP" if flops >= 1e13 else f"{flops / 1e12:.3g} TFLOP"


def duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, size in (("days", 172800), ("hours", 7200), ("minutes", 120)):
        if seconds >= size:
            return f"{seconds / (size / 2):.1f} {unit}"
    return f"{seconds:.3g} s"
