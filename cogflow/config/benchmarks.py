"""Settings of ``stage=benchmark``, part of :mod:`cogflow.config.schema`; docs/benchmarks.md says what each benchmark does."""

from __future__ import annotations

from dataclasses import dataclass, field

WHATS = (
    "all",
    "step",
    "train",
    "overhead",
    "checkpoint",
    "validate",
    "prepare",
    "loader",
    "export",
    "assemble",
    "panel",
    "indicator",
    "traffic",
    "separation",
    "watch",
)
"""What can be measured; each is told in docs/benchmarks.md."""


# fmt: off
@dataclass(frozen=True)
class BenchmarkStage:
    name: str = "benchmark"  # chosen by stage=benchmark
    what: str = "export"  # what is measured: stage.what=? lists it, docs/benchmarks.md tells it; all: nearly everything
    layers: int | None = None  # fewer layers than the model has, for small machines
    repeats: int = 1  # of everything, pair by pair
    vs: str | None = None  # export, train, prepare: a clone of CogVideo to run beside; prepare: or finetrainers; train: or bare, a revision
    vs_python: str | None = None  # the interpreter of the clone's own install; default: this one
    folder: str | None = None  # for the files it makes, twice the checkpoint's size; default <run>/benchmark
    keep: bool = False  # leave those files
    clips: str | None = None  # separation, prepare: a folder of videos (or frames); default: what is installed, else drawn clips
    contents: int = 0  # separation, prepare: at most so many of them; 0: all, and four of those that prepare writes
    clip_height: int = 0  # prepare: of the clips that it writes, 16:9; 0: half as high again as data.height
    variants: int = 3  # separation: takes of each content, other crops, zooms, brightnesses and times
    batch_size: int = 1  # step, train, loader: clips of a step
    steps: int = 5  # step, train: of one turn, whose mean counts once; stage.repeats turns after one that does not count
    profile: bool = False  # step, train: of one step more, by what its time goes to
    settings: list[str] = field(default_factory=list)  # train: what to compare, such as "speed.compile=blocks speed.attention=flash"
    share: float = 1.0  # watch: of the simulated validations; less is quicker and less sure
