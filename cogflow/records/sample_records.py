"""``samples.json``: what a folder of samples holds and how it was sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cogflow.files.record_io import OMIT_NONE, Measured, Record

ClipMetrics = dict[str, Measured]
"""Sharpness metrics of one clip, by name (:data:`cogflow.sharpness.metrics.METRICS`)."""


@dataclass(frozen=True)
class SamplingRecord:
    """Settings that samples were made with. ``unconditional``: the replacement of the caption in guidance."""

    sampler: str
    scheduler: str
    unconditional: str
    steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    vae_dtype: str
    vae_tiling: bool


@dataclass(frozen=True)
class SampleRecord:
    """One sample.

    ``video`` and ``image`` (the first frame, for image to video) are names of files in the same folder.
    """

    name: str
    id: str
    text: str
    seed: int
    video: str
    sharpness: ClipMetrics
    image: Annotated[str | None, OMIT_NONE] = None


@dataclass(frozen=True)
class SampledWeights:
    """The weights that were sampled: their hash over names and values, and where they come from.

    ``weights``: model or ema, at ``step`` of a training run. ``source``: the path that ``stage=sample`` was given.
    """

    weights_sha256: str
    step: int | None = None
    weights: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class SamplesRecord(Record):
    """``samples.json``.

    ``step`` is None for samples that no training step made; ``source`` names their weights then.
    """

    file_name: ClassVar[str] = "samples.json"
    advice: ClassVar[str] = "Sample again."

    step: int | None
    weights_sha256: str
    sampling: SamplingRecord
    height: int
    width: int
    frames: int
    fps: float
    max_sequence_length: int
    dtype: str
    device: str
    samples: list[SampleRecord]
    weights: Annotated[str | None, OMIT_NONE] = None
    source: Annotated[str | None, OMIT_NONE] = None

    def metrics(self) -> dict[str, ClipMetrics]:
        """Return the sharpness metrics of each sample by the sample's name."""
        return {sample.name: sample.sharpness for sample in self.samples}
