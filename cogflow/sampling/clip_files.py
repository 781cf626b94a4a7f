"""Read existing clips: a video, a folder of videos, a folder of frames, or the samples of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from cogflow.artifacts.identify import CONTACT_SHEET, PICTURE_SUFFIXES, VIDEO_SUFFIXES, Artifact, ArtifactKind
from cogflow.artifacts.run_layout import SAMPLES_RECORD, RunLayout
from cogflow.data.media import open_picture
from cogflow.data.media_bytes import ClipError
from cogflow.data.video import MOST_BYTES, read_video
from cogflow.errors import DataError
from cogflow.sampling.sample_record import FRAMES_FILE, newest_samples, read_sample_record

MEDIA = (ArtifactKind.VIDEOS, ArtifactKind.FRAMES)
"""Kinds of artifact that are clips themselves."""


@dataclass(frozen=True)
class ReadClip:
    """One clip.

    ``frames``: uint8 ``[T, H, W, 3]``; ``fps``: frames per second, 0 when unknown; ``raw``: whether no codec changed
    the frames.
    """

    name: str
    frames: torch.Tensor
    fps: float
    raw: bool


@dataclass(frozen=True)
class ClipSource:
    """Path of existing clips. ``kind``: the kind that the user states, ``None`` to decide by the folder's content."""

    path: Path
    kind: ArtifactKind | None = None


def clips_of(artifact: Artifact, kind: ArtifactKind | None = None) -> ClipSource | None:
    """Return the artifact's clips: its own, or a run's newest samples. ``kind``: the kind that the user states.

    Return ``None`` for an artifact without clips.
    """
    if artifact.kind in MEDIA:
        return ClipSource(artifact.root, kind)
    samples = newest_samples(RunLayout(artifact.root).samples) if artifact.kind is ArtifactKind.RUN else None
    return None if samples is None else ClipSource(samples)


def read_clips(place: Path, kind: ArtifactKind | None = None) -> Iterator[ReadClip]:
    """Yield the clips at ``place``. A folder of pictures is one clip, its frames in order of file name.

    Where cogflow kept the raw frames of its own samples, those are read and not the videos. ``kind``: FRAMES reads the
    pictures of a folder that holds raw frames or videos, too. Raise :class:`DataError` for files that cannot be read.
    """
    raw = place / FRAMES_FILE
    if raw.is_file() and kind is not ArtifactKind.FRAMES:
        fps = read_sample_record(place).fps if (place / SAMPLES_RECORD).is_file() else 0.0
        for name, frames in load_file(raw).items():
            yield ReadClip(name, frames, fps, raw=True)
        return
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES and kind is not ArtifactKind.FRAMES]
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES and path.name != CONTACT_SHEET]
    if not videos and not pictures:
        raise DataError(
            f"{place} holds neither videos nor pictures.",
            f"Videos end in {' '.join(VIDEO_SUFFIXES)}, pictures in {' '.join(PICTURE_SUFFIXES)}.",
        )
    for path in videos:
        try:
            frames, fps = read_video(path)
        except ClipError as error:
            raise DataError(f"{path} cannot be read: {error.reason}", "Give videos that a player can play.") from error
        yield ReadClip(path.stem, frames, fps, raw=False)
    if not videos:
        yield _read_pictures(place, pictures)


def _read_pictures(place: Path, pictures: list[Path]) -> ReadClip:
    images: list[np.ndarray] = []
    try:
        for path in pictures:
            with open_picture(path) as picture:
                images.append(np.asarray(picture.convert("RGB")))
            if len(images) * images[0].nbytes > MOST_BYTES:
                images.pop()
                break
        frames = torch.from_numpy(np.stack(images))
    except (ClipError, OSError, ValueError) as error:
        raise DataError(
            f"The pictures in {place} are not one clip: {error}", "They must be readable and of one size."
        ) from error
    return ReadClip(place.name, frames, 0.0, raw=all(path.suffix.lower() == ".png" for path in pictures))
