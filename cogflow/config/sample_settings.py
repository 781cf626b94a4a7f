"""Settings of the stage sample."""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.config.setting import each, kind_setting, one_of, setting

WORSE = (
    "soft",
    "washed_out",
    "hazy",
    "smeared",
    "grainy",
    "saturated",
    "frozen",
    "identical",
    "black",
    "artefacts",
    "non_finite",
)
"""Defects that make a video worse than its reference. A sharper video is not worse."""


@dataclass(frozen=True)
class SampleStage:
    """``stage.*`` of stage=sample: videos of a run, a checkpoint or a pipeline folder, with their sharpness."""

    name: str = setting("sample", help="Chosen by stage=sample.")
    source: str | None = setting(
        None,
        help="What to sample or measure: a run, a checkpoint, a pipeline folder, a video or a folder of frames. "
        "Default: this run.",
    )
    source_kind: str = kind_setting("stage.source")
    reference: str | None = setting(None, help="Videos or frames to compare the sharpness with.")
    reference_kind: str = kind_setting("stage.reference")
    prompts: str | None = setting(None, help="File of prompts. Takes precedence over sampling.prompts.")
    output: str | None = setting(None, help="Output folder. Default: <run>/sampled.")
    fail_on: list[str] = setting(
        list(WORSE), help="Defects that end the stage with exit code 3.", rule=each(one_of(*WORSE, "over_sharpened"))
    )
