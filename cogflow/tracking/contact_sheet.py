"""Draw contact sheets: some frames of every clip on one picture, one row a clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

    Clip: TypeAlias = np.ndarray | torch.Tensor

SMALLEST = 144  # pixels; narrower frames are enlarged by a whole factor, so that each pixel is a sharp square
WIDEST = 384  # pixels; wider frames are reduced
GAP = 6
LABEL = 24
INK, PAPER = (235, 235, 238), (22, 23, 26)


def pick(total: int, count: int) -> list[int]:
    """Return ``count`` of ``total`` frame numbers, evenly from the first to the last; all when there are not more."""
    if count >= total:
        return list(range(total))
    if count == 1:
        return [total // 2]
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]


def enlarge(frame: np.ndarray, factor: int) -> np.ndarray:
    """Return uint8 ``[H, W, 3]`` with every pixel repeated ``factor`` times in both directions."""
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def contact_sheet(clips: Mapping[str, Clip], columns: int) -> Image.Image:
    """Return an RGB picture of ``clips``: label to uint8 ``[T, H, W, 3]`` (numpy or torch, the same H and W in all).

    Each clip is a row: its label above ``columns`` frames, evenly from the first to the last. Raises ``ValueError``
    for other shapes or types, for no clips, and for ``columns`` < 1.
    """
    arrays = {label: _array(label, clip) for label, clip in clips.items()}
    if not arrays or columns < 1:
        raise ValueError("a contact sheet needs at least one clip and one column")
    sizes = {array.shape[1:3] for array in arrays.values()}
    if len(sizes) > 1:
        raise ValueError(f"the clips of a contact sheet must share one size, not {sorted(sizes)}")
    height, width = sizes.pop()
    factor = max(1, math.ceil(SMALLEST / width))
    scale = min(1.0, WIDEST / width)
    cell_w, cell_h = round(width * factor * scale), round(height * factor * scale)
    count = min(columns, max(len(array) for array in arrays.values()))
    sheet = Image.new("RGB", (GAP + count * (cell_w + GAP), GAP + len(arrays) * (LABEL + cell_h + GAP)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for row, (label, array) in enumerate(arrays.items()):
        top = GAP + row * (LABEL + cell_h + GAP)
        pen.text((GAP, top + 1), _shorten(pen, font, label, sheet.width - 2 * GAP), fill=INK, font=font)
        for column, index in enumerate(pick(len(array), count)):
            cell = Image.fromarray(enlarge(array[index], factor))
            if scale < 1.0:
                cell = cell.resize((cell_w, cell_h), Image.Resampling.LANCZOS)
            sheet.paste(cell, (GAP + column * (cell_w + GAP), top + LABEL))
    return sheet


def _array(label: str, clip: Clip) -> np.ndarray:
    array = clip if isinstance(clip, np.ndarray) else clip.detach().cpu().numpy()
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
        raise ValueError(f"{label}: a clip must be uint8 [T, H, W, 3], not {array.dtype} {list(array.shape)}")
    return array


def _shorten(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width: int
) -> str:
    """Return ``text`` on one line, cut off at ``width`` pixels."""
    text = " ".join(text.split())
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
