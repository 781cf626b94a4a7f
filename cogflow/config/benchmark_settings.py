"""Settings of the stage benchmark. docs/benchmarks.md describes each benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.config.setting import at_least, one_of, optional, setting

WHATS = ("all", "step", "train", "checkpoint", "validate", "prepare", "loader", "export", "assemble")
"""Values of ``stage.what``."""


@dataclass(frozen=True)
class BenchmarkStage:
    """``stage.*`` of stage=benchmark: speed and memory of cogflow."""

    name: str = setting("benchmark", help="Chosen by stage=benchmark.")
    what: str = setting("export", help="Benchmark to run. all: one after the other.", rule=one_of(*WHATS))
    layers: int | None = setting(
        None,
        help="export, assemble: layers of the model, to fit small machines. Default: all.",
        rule=optional(at_least(1)),
    )
    repeats: int = setting(1, help="Repetitions that count.", rule=at_least(1))
    folder: str | None = setting(
        None,
        help="Folder for the files made by the benchmark, about twice the size of a checkpoint. Default: "
        "<run>/benchmark.",
    )
    keep: bool = setting(False, help="Keep the files made by the benchmark.")
    clips: str | None = setting(None, help="prepare: folder of videos. Default: drawn clips.")
    contents: int = setting(
        0, help="prepare: number of clips. 0: all of stage.clips, or four drawn clips.", rule=at_least(0)
    )
    clip_height: int = setting(
        0, help="prepare: height of drawn 16:9 clips in pixels. 0: 1.5 times data.height.", rule=at_least(0)
    )
    batch_size: int = setting(1, help="step, train, loader: clips per step.", rule=at_least(1))
    steps: int = setting(
        5,
        help="step, train: steps per turn. The mean of a turn is one measurement; stage.repeats turns follow one "
        "warm-up "
        "turn.",
        rule=at_least(1),
    )
    profile: bool = setting(False, help="step, train: profile one more step and print its time by kind of kernel.")
    settings: list[str] = setting(
        [], help='train: settings to compare, such as "speed.compile=blocks speed.attention=flash".'
    )
