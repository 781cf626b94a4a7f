"""Draw clips: textured shapes that move over a soft background, with captions that name the content.

The shipped tiny model is trained on some of these concepts, the demo finetunes it on others, and the tests measure blur
on them. Each property makes a measurement possible:

* shapes are saturated and backgrounds are grey, so that a mask, a colour, a shape and a direction can be read back from
  any sample (:mod:`tools.recognise_shapes`);
* edges are one pixel wide at the drawn size, and both the shape and the ground carry a fine texture, so that a Gaussian
  blur of one pixel shows in any sharpness metric;
* everything depends on the scene alone: not on global random state, on the size or on the number of frames.

Lengths are in units of the frame's height, times run from 0 to 1 over the clip.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cogflow.config.data_section import DataConfig
from cogflow.data.video import write_video
from cogflow.errors import DataError
from cogflow.files.bounded_parsing import parse_json, read_json_file, read_json_object
from cogflow.files.contained_files import is_file_below, read_regular
from cogflow.files.publish import publish_folder

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.12, 0.66, 0.18),
    "blue": (0.13, 0.25, 0.88),
    "yellow": (0.93, 0.83, 0.10),
    "purple": (0.62, 0.14, 0.80),
    "orange": (0.96, 0.50, 0.07),
    "cyan": (0.10, 0.78, 0.82),
    "pink": (0.96, 0.35, 0.62),
}
"""sRGB values in 0..1. The first four are known to the shipped model, the rest are left for finetuning."""

MOTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
"""Direction of travel as (x, y), y pointing down as in an image."""

GROUNDS: dict[str, tuple[float, float]] = {"dark": (0.10, 0.28), "light": (0.72, 0.90)}
"""Range of the background's grey level. Neither end meets a shape's luma, so that every edge is also a luma edge."""


def _regular(corners: int, radius: float, turn: float) -> np.ndarray:
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int, outer: float, inner: float) -> np.ndarray:
    angles = -math.pi / 2 + math.pi * np.arange(2 * points) / points
    radii = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.asarray(radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def _cross(reach: float, half: float) -> np.ndarray:
    r, h = reach, half
    return np.array(
        [(-h, -r), (h, -r), (h, -h), (r, -h), (r, h), (h, h), (h, r), (-h, r), (-h, h), (-r, h), (-r, -h), (-h, -h)],
        dtype=float,
    )


SHAPES: dict[str, np.ndarray | None] = {
    "circle": None,
    "square": _regular(4, 1.20, math.pi / 4),
    "triangle": _regular(3, 1.30, -math.pi / 2),
    "star": _star(5, 1.42, 0.58),
    "cross": _cross(1.15, 0.42),
    "hexagon": _regular(6, 1.10, 0.0),
}
"""Corner points of each shape around its centre, in units of its radius; ``None`` is the unit circle."""

NEW_COLOURS = ("purple", "orange")
NEW_SHAPES = ("star", "square")
"""Concepts that the shipped model has not seen, which a finetune on the drawn clips has to learn."""

_SETTINGS_FILE = "shapes.json"
DRAWING_SETTINGS = ("clips", "seed", "frames", "height", "width", "fps", "colours", "shapes", "motions")
"""The fields of :class:`DataConfig` on which drawn clips depend."""

BASE_COLOURS = ("red", "green", "blue", "yellow")
BASE_SHAPES = ("circle", "cross", "triangle")
MOTION_NAMES = tuple(MOTIONS)
GROUND_NAMES = tuple(GROUNDS)


@dataclass(frozen=True)
class Scene:
    """Content of one clip. ``seed`` determines what the caption does not name: place, size, texture and grey levels."""

    colour: str
    shape: str
    motion: str
    ground: str
    seed: int

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} moves {self.motion} over a {self.ground} background"


def scenes(
    count: int,
    seed: int,
    colours: Sequence[str] = BASE_COLOURS,
    shapes: Sequence[str] = BASE_SHAPES,
    motions: Sequence[str] = MOTION_NAMES,
    grounds: Sequence[str] = GROUND_NAMES,
) -> list[Scene]:
    """Return ``count`` scenes that cover the named concepts evenly, in an order that depends on ``seed`` alone."""
    combinations = [(c, s, m, g) for c in colours for s in shapes for m in motions for g in grounds]
    rng = np.random.default_rng([seed, 0x5CE9E])
    picked: list[tuple[str, str, str, str]] = []
    while len(picked) < count:
        picked.extend(combinations[i] for i in rng.permutation(len(combinations)))
    seeds = rng.integers(0, 2**31 - 1, size=count)
    return [Scene(*picked[i], seed=int(seeds[i])) for i in range(count)]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance to the outline of ``shape``, negative inside, for points in units of its radius.

    Polygons by the edge-wise formula of Quilez, "Distance to a polygon" (iquilezles.org/articles/distfunctions2d).
    """
    corners = SHAPES[shape]
    if corners is None:
        return np.asarray(np.hypot(x, y) - 1.0)
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        crosses = (ay > y) != (by > y)
        if ey != 0.0:
            inside ^= crosses & (x < ex * (y - ay) / ey + ax)
    return np.asarray(np.where(inside, -1.0, 1.0) * np.sqrt(nearest))


def draw(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """Return the clip of ``scene`` as uint8 ``[frames, height, width, 3]``, sRGB."""
    rng = np.random.default_rng([scene.seed, 0xD4A3])
    aspect = width / height
    radius = rng.uniform(0.24, 0.28)
    margin = radius * 1.25
    dx, dy = MOTIONS[scene.motion]
    # The path runs through the frame's middle region; the shape stays whole in every frame.
    travel = rng.uniform(0.24, 0.30) * (1.0 if dy else 1.25)
    cx = aspect / 2 + rng.uniform(-1, 1) * max(0.0, aspect / 2 - margin - abs(dx) * travel / 2)
    cy = 0.5 + rng.uniform(-1, 1) * max(0.0, 0.5 - margin - abs(dy) * travel / 2)
    turn = rng.uniform(-0.15, 0.15)

    ys, xs = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / height, indexing="ij")
    ground = _ground(rng, xs, ys, aspect, GROUNDS[scene.ground])
    stripe_angle = rng.uniform(0, math.pi)
    stripe_period = rng.uniform(0.13, 0.19)
    stripe_phase = rng.uniform(0, 2 * math.pi)
    depth = rng.uniform(0.16, 0.26)
    fill = np.asarray(COLOURS[scene.colour]) * rng.uniform(0.94, 1.06)

    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        step = (index / max(1, frames - 1) - 0.5) * travel
        px, py = xs - (cx + dx * step), ys - (cy + dy * step)
        qx = (px * math.cos(turn) + py * math.sin(turn)) / radius
        qy = (py * math.cos(turn) - px * math.sin(turn)) / radius
        coverage = np.clip(0.5 - signed_distance(scene.shape, qx, qy) * radius * height, 0.0, 1.0)[..., None]
        wave = np.sin(
            2 * math.pi * (px * math.cos(stripe_angle) + py * math.sin(stripe_angle)) / stripe_period + stripe_phase
        )
        shade = 1.0 - depth * 0.5 * (1.0 + np.tanh(2.5 * wave))
        frame = ground[..., None] * (1.0 - coverage) + fill * shade[..., None] * coverage
        clip[index] = np.clip(frame * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return clip


def _ground(
    rng: np.random.Generator, xs: np.ndarray, ys: np.ndarray, aspect: float, levels: tuple[float, float]
) -> np.ndarray:
    """Return a grey slope with a faint woven texture, float ``[height, width]`` in 0..1."""
    low, high = levels
    middle = rng.uniform(low + 0.05, high - 0.05)
    slope = rng.uniform(0.0, 0.05)
    angle = rng.uniform(0, 2 * math.pi)
    plane = middle + slope * ((xs - aspect / 2) * math.cos(angle) + (ys - 0.5) * math.sin(angle))
    weave = np.zeros_like(xs)
    for _ in range(2):
        turn, period, phase = rng.uniform(0, math.pi), rng.uniform(0.12, 0.20), rng.uniform(0, 2 * math.pi)
        weave += np.sin(2 * math.pi * (xs * math.cos(turn) + ys * math.sin(turn)) / period + phase)
    return np.clip(plane + 0.022 * weave, 0.0, 1.0)


def fill_concepts(data: DataConfig) -> DataConfig:
    """Return ``data`` with its empty lists of concepts filled in.

    Raises :class:`DataError` for a concept that cannot be drawn.
    """
    filled = replace(
        data,
        colours=list(data.colours or NEW_COLOURS),
        shapes=list(data.shapes or NEW_SHAPES),
        motions=list(data.motions or MOTION_NAMES),
    )
    for key, known in (("colours", COLOURS), ("shapes", SHAPES), ("motions", MOTIONS)):
        unknown = [name for name in getattr(filled, key) if name not in known]
        if unknown:
            raise DataError(
                f"data.{key} has names that cannot be drawn: {', '.join(unknown)}", f"known are: {', '.join(known)}"
            )
    return filled


def drawing_differences(folder: Path, data: DataConfig) -> list[str]:
    """Return one line for each setting of ``data`` that the clips in ``folder`` were not drawn with; empty where there
    are no drawn clips.
    """
    drawn = read_json_object(folder / _SETTINGS_FILE)
    if not drawn:
        return []
    wanted = fill_concepts(data)
    pairs = [(key, getattr(wanted, key), drawn.get(key)) for key in DRAWING_SETTINGS]
    return [f"data.{key}={now}, drawn with {then}" for key, now, then in pairs if now != then]


def draw_folder(folder: Path, data: DataConfig) -> None:
    """Draw ``data.clips`` clips into ``folder``, as mp4 files with a metadata.jsonl, unless they are there already.

    Clips are drawn at twice the size and twice the frame rate of ``data``, so that the loader resizes and resamples
    them. The folder appears complete or not at all. Raises :class:`DataError` when ``folder`` holds anything else.
    """
    data = fill_concepts(data)
    settings = {"version": 1, **{key: getattr(data, key) for key in DRAWING_SETTINGS}}
    settings_file = folder / _SETTINGS_FILE
    if folder.exists():
        if not settings_file.is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(
                f"{folder} contains other files than drawn clips",
                "data=shapes draws into an empty or new folder; to train on your own clips use data=folder",
            )
        if settings_file.is_file() and _complete(folder, settings):
            return
    rows = []
    with publish_folder(folder, replace=True) as partial:
        for number, scene in enumerate(scenes(data.clips, data.seed, data.colours, data.shapes, data.motions)):
            name = f"videos/{number:05d}.mp4"
            frames = draw(scene, 2 * data.frames - 1, 2 * data.height, 2 * data.width)
            # x264's output depends on the number of threads; with one the clips do not depend on the machine.
            write_video(partial / name, frames, 2 * data.fps, crf=12, threads=1)
            rows.append({"file_name": name, "text": scene.caption})
        (partial / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (partial / _SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether ``folder`` holds all clips that were drawn with ``settings``."""
    try:
        same = read_json_file(folder / _SETTINGS_FILE) == settings
        rows = [parse_json(line) for line in read_regular(folder / "metadata.jsonl").splitlines()]
        return same and all(is_file_below(folder, row["file_name"]) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return False
