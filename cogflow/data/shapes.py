"""Drawn clips: textured shapes that move over a soft background, with captions that name what is seen.

The clips are an asset of the project, not a toy beside it: the shipped tiny model is trained on some of these concepts,
the demo finetunes it on others, and the tests measure blur on them. So each property serves a measurement:

* shapes are saturated and backgrounds are grey, so that a mask, a colour, a shape and a direction can be read back from
  any sample (:mod:`tools.recognise_shapes`);
* edges are one pixel wide at the drawn size, and both the shape and the ground carry a fine texture, so that a Gaussian
  blur of one pixel shows in any sharpness metric;
* everything is a function of the scene alone: no global random state, no dependence on size or on the number of frames.

Lengths are in units of the frame's height, times run from 0 to 1 over the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


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

BASE_COLOURS = ("red", "green", "blue", "yellow")
BASE_SHAPES = ("circle", "cross", "triangle")
MOTION_NAMES = tuple(MOTIONS)
GROUND_NAMES = tuple(GROUNDS)


@dataclass(frozen=True)
class Scene:
    """What one clip shows. ``seed`` settles everything the caption does not say (place, size, texture, grey levels)."""

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
    """``count`` scenes that cover the named concepts evenly, in an order that depends on ``seed`` alone."""
    combinations = [(c, s, m, g) for c in colours for s in shapes for m in motions for g in grounds]
    rng = np.random.default_rng([seed, 0x5CE9E])
    picked: list[tuple[str, str, str, str]] = []
    while len(picked) < count:
        picked.extend(combinations[i] for i in rng.permutation(len(combinations)))
    seeds = rng.integers(0, 2**31 - 1, size=count)
    return [Scene(*picked[i], seed=int(seeds[i])) for i in range(count)]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of ``shape``, negative inside, for points in units of its radius.

    Polygons by the edge-wise formula of Quilez, "Distance to a polygon" (iquilezles.org/articles/distfunctions2d).
    """
    corners = SHAPES[shape]
    if corners is None:
        return np.hypot(x, y) - 1.0
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
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def draw(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """The clip of ``scene`` as uint8 ``[frames, height, width, 3]``, sRGB."""
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
    stripe_angle, stripe_period, stripe_phase = (
        rng.uniform(0, math.pi),
        rng.uniform(0.13, 0.19),
        rng.uniform(0, 2 * math.pi),
    )
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
    """A grey slope with a faint woven texture, float ``[height, width]`` in 0..1."""
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
