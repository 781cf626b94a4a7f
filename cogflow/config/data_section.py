"""Settings of the clips and of how they are decoded, resized and split: ``data.*``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogflow.config.model_section import TRAINING_STAGES, is_planned
from cogflow.config.problems import Problem, format_value
from cogflow.config.setting import ValueRule, above, at_least, each, multiple_of, one_of, optional, setting, within

if TYPE_CHECKING:
    from cogflow.config.config import AnyConfig

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "hexagon")
MOTIONS = ("left", "right", "up", "down")


def _frames_problem(value: int) -> str | None:
    if value > 0 and value % 4 == 1:
        return None
    return f"it should be 4k+1, such as {max(1, round((value - 1) / 4) * 4 + 1)}."


def _buckets_problem(value: list[str]) -> str | None:
    for bucket in value:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", bucket, re.ASCII):
            return f"{bucket} should be frames x height x width, such as 49x480x720."
        frames, *sides = map(int, bucket.split("x"))
        if wrong := _frames_problem(frames) or each(multiple_of(16)).problem(sides):
            return f"{bucket}: {wrong}"
    return "it should contain each bucket only once." if len(set(value)) < len(value) else None


FRAMES = ValueRule("4k+1", _frames_problem)
BUCKETS = ValueRule("each FRAMESxHEIGHTxWIDTH", _buckets_problem)


@dataclass(frozen=True)
class DataConfig:
    """``data.*``"""

    name: str = setting(
        "shapes",
        help="Source of the clips. shapes: synthetic clips, drawn by cogflow. folder: your clips in data.path.",
        rule=one_of("shapes", "folder"),
    )
    path: str | None = setting(
        None, help="Folder of the clips. Default for shapes: <run>/data, where the clips are drawn."
    )
    frames: int = setting(9, help="Frames per clip.", rule=FRAMES)
    height: int = setting(64, help="Height of a clip in pixels.", rule=multiple_of(16))
    width: int = setting(96, help="Width of a clip in pixels.", rule=multiple_of(16))
    fps: float = setting(8.0, help="Frames per second that clips are resampled to.", rule=above(0))
    resize: str = setting(
        "cover",
        help="Resizing before the crop. cover: keep the aspect ratio and fill the size. stretch: ignore the aspect "
        "ratio. none: crop only.",
        rule=one_of("cover", "stretch", "none"),
    )
    crop: str = setting(
        "center",
        help="Position of the crop. random is seeded by the content of the clip.",
        rule=one_of("center", "random"),
    )
    buckets: list[str] = setting(
        [],
        help="Sizes such as 49x480x720; each clip takes the size that fits it best. Empty: one size for all.",
        rule=BUCKETS,
    )
    window: str = setting(
        "start",
        help="Frames that are taken of a longer clip. random is seeded by the content of the clip.",
        rule=one_of("start", "center", "random"),
    )
    soft_style: bool = setting(
        False, help="Declare soft clips as intended: clips that look upscaled are then reported without a warning."
    )
    image_variants: int = setting(
        8,
        help="Image to video: first frames with different noise encoded per clip; each step draws one of them.",
        rule=at_least(1),
    )
    holdout: int | None = setting(
        None,
        help="Clips excluded from training, for the held-out loss. Default: a tenth of the clips, at least 1 and at "
        "most 8.",
        rule=optional(at_least(0)),
    )
    max_bad_share: float = setting(
        0.1, help="Largest share of unreadable clips; a larger share stops the run.", rule=within(0, 1)
    )
    max_bad_in_a_row: int = setting(
        16, help="Consecutive unreadable clips from the first clip on that stop the run.", rule=at_least(1)
    )
    seed: int = setting(
        0, help="Seed of drawn clips, of the held-out split and of random crops and windows.", rule=at_least(0)
    )
    clips: int = setting(96, help="shapes: number of clips to draw.", rule=at_least(1))
    colours: list[str] = setting([], help="shapes: colours to draw. Empty: a default set.", rule=each(one_of(*COLOURS)))
    shapes: list[str] = setting([], help="shapes: outlines to draw. Empty: a default set.", rule=each(one_of(*SHAPES)))
    motions: list[str] = setting(
        [], help="shapes: directions of motion. Empty: a default set.", rule=each(one_of(*MOTIONS))
    )


def check_data(config: AnyConfig) -> Iterator[Problem]:
    """Yield contradictions within ``data.*``, and between ``data.*`` and the model."""
    data, model = config.data, config.model.name
    if config.stage.name in TRAINING_STAGES and not is_planned(config) and data.name == "folder" and data.path is None:
        yield Problem("data.path is missing: data=folder needs the folder of your clips.", ("data.name", "data.path"))
    if data.name == "shapes" and data.holdout is not None and data.holdout >= data.clips:
        yield Problem(
            f"data.holdout={data.holdout}: no clip is left to train on; it should be less than "
            f"data.clips={data.clips}.",
            ("data.holdout", "data.clips"),
        )
    if not model.startswith("cogvideox"):
        return
    step = 16 if model.startswith("cogvideox1.5") else 8
    counts = [("data.frames", format_value(data.frames), data.frames)]
    if BUCKETS.problem(data.buckets) is None:
        counts += [("data.buckets", bucket, int(bucket.split("x")[0])) for bucket in data.buckets]
    for key, typed, frames in counts:
        if frames % step != 1:
            good = max(1, round((frames - 1) / step)) * step + 1
            yield Problem(f"{key}={typed}: {model} takes {step}k+1 frames, such as {good}.", (key, "model.name"))
