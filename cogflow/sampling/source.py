"""What ``stage.source`` can name: frames that are there already, or a model that makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cogflow.data.video import read_video
from cogflow.errors import DataError

VIDEOS = (".mp4", ".mov", ".webm", ".mkv")
PICTURES = (".png", ".jpg", ".jpeg")


def is_frames(place: Path) -> bool:
    """Whether ``place`` is a video, a folder of videos, or a folder of pictures."""
    if place.is_file():
        return place.suffix.lower() in VIDEOS
    return place.is_dir() and any(path.suffix.lower() in VIDEOS + PICTURES for path in place.iterdir() if path.name != "contact.png")


def read_clips(place: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, uint8 ``[frames, height, width, 3]``) of each clip at ``place``; a folder of pictures is one clip, in order of name.

    Raises :class:`DataError` for what cannot be read.
    """
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEOS]
    pictures = [path for path in files if path.suffix.lower() in PICTURES and path.name != "contact.png"]
    if not videos and not pictures:
        raise DataError(
            f"{place} holds neither videos nor pictures.", f"Videos end in {' '.join(VIDEOS)}, pictures in {' '.join(PICTURES)}."
        )
    for path in videos:
        try:
            frames, _ = read_video(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}", "Give videos that a player can play.") from error
        yield path.stem, frames
    if pictures and not videos:
        try:
            images = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
            yield place.name, torch.from_numpy(np.stack(images))
        except (OSError, ValueError) as error:
            raise DataError(f"The pictures in {place} are not one clip: {error}", "They must be readable and of one size.") from error
