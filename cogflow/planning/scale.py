"""What a training costs on 8, 64 and 512 GPUs: the quickest layout that fits, and the share of a step that waits for other GPUs.

``docs/scaling.md`` is this table; ``python -c "from cogflow.planning.scale import markdown; print(markdown())"`` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cogflow.config.compose import compose
from cogflow.planning import advice, flops, traffic
from cogflow.planning.plan import PEAKS, REACHED, USED, plan

GPUS = (8, 64, 512)
MEMORY = {80: PEAKS["H100"], 141: PEAKS["H200"]}
"""GB of a GPU, and the TFLOP/s of its data sheet."""

HOST = 2000
"""GB of one machine's memory."""

MODELS = ("cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b")
"""Image to video costs what text to video costs, to a thousandth."""


@dataclass(frozen=True)
class Row:
    """One training with one clip on each GPU. ``waiting``: share of a step; ``hours``: GPU hours for a thousand clips."""

    model: str
    gpus: int
    memory_gb: int
    layout: str
    peak_gb: float
    host_gb: float
    seconds: float
    waiting: float
    clips_per_second: float
    hours: float


def rows() -> Iterator[Row]:
    """Of every model, number of GPUs and size of memory."""
    for model in MODELS:
        for gpus in GPUS:
            yield from (row(model, gpus, memory) for memory in MEMORY)


def row(model: str, gpus: int, memory: int) -> Row:
    """The quickest layout that fits, by the formulas of a plan."""
    speed = MEMORY[memory] * REACHED * USED
    words = [f"stage.plan_gpus={gpus}", f"stage.plan_memory_gb={memory}", f"stage.plan_host_gb={HOST}", f"stage.plan_tflops={speed}"]
    asked = plan(compose(["stage=train", "stage.plan=true", f"model={model}", "data=folder", "stage.ema_decay=0.9999", *words]))
    best = advice.at(asked, gpus)[0]
    step = flops.step(asked.shape, asked.tokens, recomputed=best.setting.recomputed(asked.shape.layers))
    compute = step.total / (speed * 1e12)
    backward = (step.backward + step.recomputation) / (speed * 1e12)
    waiting = traffic.exposed(traffic.traffic(asked.shape, asked.tokens, best.setting), best.setting, backward=backward, compute=compute)
    seconds = compute + waiting
    changed = [word for word in best.words if "=" in word and "plan_gpus" not in word]
    return Row(
        model=model,
        gpus=gpus,
        memory_gb=memory,
        layout=" ".join(changed) or "as model= has it",
        peak_gb=best.gpu.peak / 1e9,
        host_gb=best.host.peak / 1e9,
        seconds=seconds,
        waiting=waiting / seconds,
        clips_per_second=gpus / seconds,
        hours=1000 * seconds / 3600,
    )


def markdown() -> str:
    """The table of :func:`rows`."""
    lines = [
        "| model | GPUs | GB each | quickest layout that fits | GB used | host GB a machine | s a step | waiting | clips a second | "
        "GPU hours for 1000 clips |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one.model} | {one.gpus} | {one.memory_gb} | {one.layout} | {one.peak_gb:.0f} | {one.host_gb:.0f} | {one.seconds:.2f} | "
        f"{one.waiting:.0%} | {one.clips_per_second:.1f} | {one.hours:.2f} |"
        for one in rows()
    ]
    return "\n".join(lines)
