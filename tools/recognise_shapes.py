"""Recognise colour, shape and direction in a clip, to check whether a sample follows its prompt.

Shapes are saturated and backgrounds are grey, so pixels of high saturation are the mask of the shape. The hue gives the
colour, the path of the centre gives the direction, and the overlap with each drawn outline gives the shape. The method
has no learned parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cogflow.data.shapes import COLOURS, MOTIONS, SHAPES, signed_distance

SATURATION = 0.18
"""Difference between the largest and the smallest channel above which a pixel belongs to a shape."""


@dataclass(frozen=True)
class RecognisedClip:
    """Content of a clip. A field is ``None`` when the clip shows too little of a shape."""

    colour: str | None
    shape: str | None
    motion: str | None


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """Return two opponent colour axes, ``[..., 2]``: a direction is a hue, a length is a saturation."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([red - 0.5 * (green + blue), 0.8660254 * (green - blue)], axis=-1)


def recognise(
    frames: np.ndarray, colours: tuple[str, ...] = tuple(COLOURS), shapes: tuple[str, ...] = tuple(SHAPES)
) -> RecognisedClip:
    """Return the content of ``frames``, uint8 ``[frames, height, width, 3]``; ``colours`` and ``shapes`` are the
    candidates."""
    clip = frames.astype(np.float32) / 255.0
    masks = (clip.max(axis=-1) - clip.min(axis=-1)) > SATURATION
    areas = masks.reshape(len(masks), -1).mean(axis=1)
    if np.median(areas) < 0.01:
        return RecognisedClip(None, None, None)
    return RecognisedClip(_colour(clip, masks, colours), _shape(masks, shapes), _motion(masks))


def _colour(clip: np.ndarray, masks: np.ndarray, colours: tuple[str, ...]) -> str:
    """Compare hues only, because texture and background change the brightness and not the hue."""
    mean = _chroma(clip[masks].mean(axis=0))
    angles = {name: _chroma(np.asarray(COLOURS[name])) for name in colours}
    return max(
        colours,
        key=lambda name: float(angles[name] @ mean) / (np.linalg.norm(angles[name]) * np.linalg.norm(mean) + 1e-9),
    )


def _motion(masks: np.ndarray) -> str | None:
    centres = [np.argwhere(mask).mean(axis=0) for mask in masks if mask.any()]
    if len(centres) < 2:
        return None
    third = max(1, len(centres) // 3)
    dy, dx = np.mean(centres[-third:], axis=0) - np.mean(centres[:third], axis=0)
    if np.hypot(dx, dy) < 0.05 * masks.shape[1]:
        return None
    return max(MOTIONS, key=lambda name: MOTIONS[name][0] * dx + MOTIONS[name][1] * dy)


def _shape(masks: np.ndarray, shapes: tuple[str, ...]) -> str:
    """Return the outline with the best overlap, summed over five frames; each outline may turn by up to 10 degrees."""
    scores = dict.fromkeys(shapes, 0.0)
    for mask in masks[np.linspace(0, len(masks) - 1, 5).astype(int)]:
        if not mask.any():
            continue
        ys, xs = np.nonzero(mask)
        height, width = mask.shape
        rows, columns = np.mgrid[0:height, 0:width]
        for name in shapes:
            scores[name] += max(
                _overlap(mask, name, columns - xs.mean(), rows - ys.mean(), len(xs), turn)
                for turn in np.radians((-10, -5, 0, 5, 10))
            )
    return max(scores, key=lambda name: scores[name])


def _overlap(mask: np.ndarray, shape: str, x: np.ndarray, y: np.ndarray, area: int, turn: float) -> float:
    """Return the intersection over union of ``mask`` and ``shape`` placed by its centre of area, with the same area."""
    unit, (cx, cy) = _unit_area_and_centre(shape)
    radius = float(np.sqrt(area / unit))
    qx = (x * np.cos(turn) + y * np.sin(turn)) / radius + cx
    qy = (y * np.cos(turn) - x * np.sin(turn)) / radius + cy
    drawn = signed_distance(shape, qx, qy) <= 0.0
    return float((drawn & mask).sum() / max(1, (drawn | mask).sum()))


_UNITS: dict[str, tuple[float, tuple[float, float]]] = {}


def _unit_area_and_centre(shape: str) -> tuple[float, tuple[float, float]]:
    """Return area and centre of area of the shape of radius 1.

    A triangle's centre is not that of the circle through its corners.
    """
    if shape not in _UNITS:
        axis = np.linspace(-1.6, 1.6, 321)
        x, y = np.meshgrid(axis, axis)
        inside = signed_distance(shape, x, y) <= 0.0
        _UNITS[shape] = (
            float(inside.sum()) * (axis[1] - axis[0]) ** 2,
            (float(x[inside].mean()), float(y[inside].mean())),
        )
    return _UNITS[shape]
