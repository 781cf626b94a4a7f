"""Crop sheets of the ladder: the crop where most detail is lost, the rungs side by side, enlarged by whole factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, uniform_filter

from cogflow.tracking.contact_sheet import GAP, INK, LABEL, PAPER, enlarge

FramesByTitle = Mapping[str, torch.Tensor]
"""Column title to frames ``[T, H, W, 3]``, uint8 or 0..1. Frames of another size than the last column's are resampled
to it.
"""
CELL = 288  # pixels; about how large a crop is shown
CROP_SHARE = 0.4  # of the frame's height
SMALLEST_CROP = 24  # pixels
DETAIL_SIGMA = 1.5  # pixels; what a Gaussian of this sigma takes away is fine detail


def write_crop_sheet(path: Path, rows: Mapping[str, FramesByTitle]) -> None:
    """Write a picture with one row per clip or prompt to ``path``. Each row is labelled with its name and its columns'
    titles.
    """
    strips = [_strip(name, columns) for name, columns in rows.items() if columns]
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
    """Return (row, column) of the square of ``side`` pixels in which ``after`` has lost most fine detail of ``before``.

    Both are uint8 ``[H, W, 3]``.
    """
    lost = uniform_filter(_fine_detail(before) - _fine_detail(after), side, mode="constant")
    half = side // 2
    inside = lost[half : lost.shape[0] - side + half + 1, half : lost.shape[1] - side + half + 1]
    row, column = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return int(row), int(column)


def _fine_detail(image: np.ndarray) -> np.ndarray:
    luma = image.astype(np.float64).mean(axis=-1)
    return np.asarray(np.abs(luma - gaussian_filter(luma, DETAIL_SIGMA)))


def _strip(name: str, columns: FramesByTitle) -> Image.Image:
    pictures = [_middle_frame(frames) for frames in columns.values()]
    height, width = pictures[-1].shape[:2]
    pictures = [_fitted(picture, height, width) for picture in pictures]
    side = min(height, width, max(SMALLEST_CROP, round(CROP_SHARE * height)))
    row, column = worst_crop(pictures[max(0, len(pictures) - 2)], pictures[-1], side)
    factor = max(1, math.ceil(CELL / side)) if side < CELL else 1
    cell = side * factor
    strip = Image.new("RGB", (GAP + len(pictures) * (cell + GAP), 2 * LABEL + cell + GAP), PAPER)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(size=16)
    pen.text((GAP, 2), name[: max(8, strip.width // 9)], fill=INK, font=font)
    for index, (title, picture) in enumerate(zip(columns, pictures, strict=True)):
        left = GAP + index * (cell + GAP)
        pen.text((left, LABEL + 2), title, fill=INK, font=font)
        crop = picture[row : row + side, column : column + side]
        strip.paste(Image.fromarray(enlarge(crop, factor)), (left, 2 * LABEL))
    return strip


def _middle_frame(frames: torch.Tensor) -> np.ndarray:
    frame = frames[len(frames) // 2].detach().cpu()
    if frame.is_floating_point():
        frame = (torch.nan_to_num(frame).clamp(0, 1) * 255).round().to(torch.uint8)
    return np.asarray(frame.numpy())


def _fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return ``picture`` scaled to cover the size and cropped at the centre, as the loader does."""
    if picture.shape[:2] == (height, width):
        return picture
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale))
    image = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    down, right = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[down : down + height, right : right + width]
