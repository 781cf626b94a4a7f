"""Settings of ``stage=benchmark``, part of :mod:`cogflow.config.schema`. docs/benchmarks.md describes each benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field

WHATS = ("all", "step", "train", "checkpoint", "validate", "prepare", "loader", "export", "assemble")
"""Values of ``stage.what``."""


# fmt: off
@dataclass(frozen=True)
class BenchmarkStage:
    name: str = "benchmark"  # chosen by stage=benchmark
    what: str = "export"  # what is measured; stage.what=? lists the choices; all: one after the other
    layers: int | None = None  # export, assemble: fewer layers than the model has, for small machines
    repeats: int = 1  # repetitions that count
    folder: str | None = None  # for files that are made, twice the checkpoint's size; default <run>/benchmark
    keep: bool = False  # keep those files
    clips: str | None = None  # prepare: a folder of videos; default: drawn clips
    contents: int = 0  # prepare: number of clips; 0: all of stage.clips, four drawn ones
    clip_height: int = 0  # prepare: height of drawn clips, 16:9; 0: one and a half times data.height
    batch_size: int = 1  # step, train, loader: clips of a step
    steps: int = 5  # step, train: steps of one turn, whose mean counts once; one turn before stage.repeats turns does not count
    profile: bool = False  # step, train: profile one more step and print its time by kind of kernel
    settings: list[str] = field(default_factory=list)  # train: what to compare, such as "speed.compile=blocks speed.attention=flash"
