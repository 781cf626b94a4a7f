"""Forecast the cost of a training on 8, 64 and 512 GPUs: the fastest layout that fits, the share of a step that waits
for other GPUs, and the goodput of a run.

``docs/scaling.md`` shows both tables; ``python -m cogflow.planning.scale`` prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from cogflow.config.compose import compose
from cogflow.planning import advice, run_size
from cogflow.planning.goodput import Goodput
from cogflow.planning.plan import PEAKS, REACHED, USED, plan

GPUS = (8, 64, 512)
MEMORY = {80: PEAKS["H100"], 141: PEAKS["H200"]}
"""Memory of a GPU in GB, and the TFLOP/s of its data sheet."""

HOST = 2000
"""Memory of one machine in GB."""

EVERY = 500
"""Steps between saves and between validations: the save interval of the recipe ``experiment=cogvideox_5b_sft``."""

MODELS = ("cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b")
"""The cost of image to video differs from that of text to video by less than a thousandth."""


@dataclass(frozen=True)
class Row:
    """One training with one clip on each GPU. ``waiting``: share of a step; ``hours``: GPU hours per thousand clips;
    ``run``: goodput of a long run with saves and validations every ``EVERY`` steps."""

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
    checkpoint_gb: float
    run: Goodput

    @property
    def cheapest(self) -> Goodput:
        """The run with the cheapest save interval."""
        return replace(self.run, every=self.run.best_every)


def rows() -> Iterator[Row]:
    """Yield the row of each model, number of GPUs and size of memory."""
    for model in MODELS:
        for gpus in GPUS:
            yield from (row(model, gpus, memory) for memory in MEMORY)


@lru_cache
def row(model: str, gpus: int, memory: int) -> Row:
    """Return the row of the fastest layout that fits."""
    speed = MEMORY[memory] * REACHED * USED
    words = [
        f"stage.plan_gpus={gpus}",
        f"stage.plan_memory_gb={memory}",
        f"stage.plan_host_gb={HOST}",
        f"stage.plan_tflops={speed}",
    ]
    words += ["stage.steps=1000000", f"stage.save_every={EVERY}", f"stage.sample_every={EVERY}"]
    asked = plan(
        compose(["stage=train", "stage.plan=true", f"model={model}", "data=folder", "stage.ema_decay=0.9999", *words])
    )
    best = advice.at(asked, gpus)[0]
    seconds, waiting = best.pace.step, best.pace.waiting
    states, weights, averages = run_size.checkpoint(asked.shape, best.layout)
    chosen = replace(
        asked, layout=best.layout, disk=replace(asked.disk, deepspeed=states, weights=weights, averages=averages)
    )
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
        checkpoint_gb=chosen.disk.checkpoint / 1e9,
        run=chosen.goodput,
    )


def markdown() -> str:
    """Return the table of steps, from :func:`rows`."""
    lines = [
        "| model | GPUs | GB each | quickest layout that fits | GB used | host GB a machine | s a step | waiting "
        "| clips a second | "
        "GPU hours for 1000 clips |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one.model} | {one.gpus} | {one.memory_gb} | {one.layout} | {one.peak_gb:.0f} | {one.host_gb:.0f} | "
        f"{one.seconds:.2f} | "
        f"{one.waiting:.0%} | {one.clips_per_second:.1f} | {one.hours:.2f} |"
        for one in rows()
    ]
    return "\n".join(lines)


def runs_markdown() -> str:
    """Return the table of runs, from :func:`rows`, for the layouts of :func:`markdown`."""
    lines = [
        "| model | GPUs | GB each | checkpoint GB | s a save | cheapest interval | in steps | interruptions a "
        "week | hours lost a week | "
        "validations | saves | goodput | at the cheapest interval |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one.model} | {one.gpus} | {one.memory_gb} | {one.checkpoint_gb:.0f} | {one.run.save:.0f} | "
        f"{one.run.best_seconds / 3600:.1f} h | {one.run.best_every} | {one.run.a_week:.2f} | "
        f"{one.run.a_week * one.run.lost / 3600:.2f} | "
        f"{one.run.validation_share:.1%} | {one.run.saving_share:.1%} | {one.run.share:.1%} | "
        f"{one.cheapest.share:.1%} |"
        for one in rows()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), runs_markdown(), sep="\n\n")
