"""What ``stage.source`` can name: frames that are there already, or a model that makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from cogflow.artifacts.run_layout import SAMPLES_RECORD
from cogflow.data.video import read_video
from cogflow.errors import DataError
from cogflow.sampling import gallery

VIDEOS = (".mp4", ".mov", ".webm", ".mkv")
PICTURES = (".png", ".jpg", ".jpeg")
MOST_BYTES = 2 * 10**9  # of one clip's frames; what comes after is not read


@dataclass(frozen=True)
class ReadClip:
    """``frames``: uint8 ``[T, H, W, 3]``; ``fps``: frames a second, 0 when nothing says; ``raw``: never through a codec."""

    name: str
    frames: torch.Tensor
    fps: float
    raw: bool


def frames_of(place: Path) -> Path | None:
    """Where the frames of ``place`` lie: there, or in the newest samples of the run that it is; ``None`` when it has none."""
    return place if is_frames(place) else gallery.newest(place / "samples") if place.is_dir() else None


def is_frames(place: Path) -> bool:
    """Whether ``place`` is a video, a folder of videos, or a folder of pictures."""
    if place.is_file():
        return place.suffix.lower() in VIDEOS
    return place.is_dir() and any(
        path.suffix.lower() in VIDEOS + PICTURES for path in place.iterdir() if path.name != "contact.png"
    )


def read_clips(place: Path) -> Iterator[ReadClip]:
    """The clips at ``place``, one at a time; a folder of pictures is one clip, in order of name.

    Where the raw frames of cogflow's own samples are kept, those are read and not the videos. Raises :class:`DataError` for what cannot
    be read.
    """
    raw = place / gallery.FRAMES
    if raw.is_file():
        fps = float(gallery.read_record(place).get("fps", 0)) if (place / SAMPLES_RECORD).is_file() else 0.0
        for name, frames in load_file(raw).items():
            yield ReadClip(name, frames, fps, raw=True)
        return
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEOS]
    pictures = [path for path in files if path.suffix.lower() in PICTURES and path.name != "contact.png"]
    if not videos and not pictures:
        raise DataError(
            f"{place} holds neither videos nor pictures.",
            f"Videos end in {' '.join(VIDEOS)}, pictures in {' '.join(PICTURES)}.",
        )
    for path in videos:
        try:
            frames, fps = read_video(path, most_bytes=MOST_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}", "Give videos that a player can play.") from error
        yield ReadClip(path.stem, frames, fps, raw=False)
    if pictures and not videos:
        try:
            images = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
            frames = torch.from_numpy(np.stack(images))
        except (OSError, ValueError) as error:
            raise DataError(
                f"The pictures in {place} are not one clip: {error}", "They must be readable and of one size."
            ) from error
        yield ReadClip(place.name, frames, 0.0, raw=all(path.suffix.lower() == ".png" for path in pictures))
