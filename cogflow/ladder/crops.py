"""Contact sheets of the ladder: the crop where most detail is lost, each rung side by side, enlarged by whole factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, uniform_filter

from cogflow.tracking.contact_sheet import GAP, INK, LABEL, PAPER, enlarge

Rungs = Mapping[str, torch.Tensor]
"""Name of the rung to its frames ``[T, H, W, 3]``, uint8 or 0..1. Rungs of another size than the last one are resampled to it."""
CELL = 288  # pixels; about how large a crop is shown
SHARE = 0.4  # of the frame's height, that a crop takes


def save(path: Path, rows: Mapping[str, Rungs]) -> None:
    """Write a picture with one row a clip or prompt to ``path``; each row is labelled with its name and its rungs."""
    strips = [_strip(name, rungs) for name, rungs in rows.items() if rungs]
    if not strips:
        return
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def worst_crop(before: np.ndarray, after: np.ndarray, side: int) -> tuple[int, int]:
    """Top left corner of the square of ``side`` in which ``after`` has lost most of the fine detail of ``before`` (uint8 ``[H, W, 3]``)."""
    lost = uniform_filter(_detail(before) - _detail(after), side, mode="constant")
    half = side // 2
    inside = lost[half : lost.shape[0] - side + half + 1, half : lost.shape[1] - side + half + 1]
    row, column = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return int(row), int(column)


def _detail(image: np.ndarray) -> np.ndarray:
    luma = image.astype(np.float64).mean(axis=-1)
    return np.abs(luma - gaussian_filter(luma, 1.5))


def _strip(name: str, rungs: Rungs) -> Image.Image:
    pictures = {rung: _middle(frames) for rung, frames in rungs.items()}
    height, width = list(pictures.values())[-1].shape[:2]
    pictures = {rung: _fitted(picture, height, width) for rung, picture in pictures.items()}
    first, last = list(pictures.values())[-2 if len(pictures) > 1 else -1], list(pictures.values())[-1]
    side = min(height, width, max(24, round(SHARE * height)))
    row, column = worst_crop(first, last, side)
    factor = max(1, math.ceil(CELL / side)) if side < CELL else 1
    cell = side * factor
    strip = Image.new("RGB", (GAP + len(pictures) * (cell + GAP), 2 * LABEL + cell + GAP), PAPER)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(size=16)
    pen.text((GAP, 2), name[: max(8, strip.width // 9)], fill=INK, font=font)
    for index, (rung, picture) in enumerate(pictures.items()):
        left = GAP + index * (cell + GAP)
        pen.text((left, LABEL + 2), rung, fill=INK, font=font)
        crop = picture[row : row + side, column : column + side]
        strip.paste(Image.fromarray(enlarge(crop, factor)), (left, 2 * LABEL))
    return strip


def _middle(frames: torch.Tensor) -> np.ndarray:
    frame = frames[len(frames) // 2].detach().cpu()
    if frame.is_floating_point():
        frame = (torch.nan_to_num(frame).clamp(0, 1) * 255).round().to(torch.uint8)
    return frame.numpy()


def _fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Filled and cut in the middle, as the loader does."""
    if picture.shape[:2] == (height, width):
        return picture
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale))
    image = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    down, right = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[down : down + height, right : right + width]
