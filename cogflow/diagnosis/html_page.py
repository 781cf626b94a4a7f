"""``diagnosis.html``: one file that holds the verdict, the frames side by side with the crop that lost most, and what every step found."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from cogflow.files.atomic_write import write_text
from cogflow.ladder import crop_sheet as sheets
from cogflow.tracking.contact_sheet import GAP, INK, LABEL, PAPER, enlarge

Frames = Mapping[str, Mapping[str, torch.Tensor]]
"""By sample, and by side (as it should be, candidate, mended), frames ``[T, H, W, 3]`` in 0..1."""


CELL = 280  # pixels; narrower frames are enlarged by whole factors


@dataclass(frozen=True)
class Page:
    """``pictures``: name to file."""

    path: Path
    pictures: dict[str, Path]


def write_page(folder: Path, found: Mapping[str, Any], frames: Frames) -> Page:
    """Write ``folder/diagnosis.html`` and its pictures ``folder/diagnosis/*.png``; ``found`` is what diagnosis.json holds."""
    pictures = {}
    if frames:
        whole, crops = folder / "diagnosis" / "frames.png", folder / "diagnosis" / "crops.png"
        whole.parent.mkdir(parents=True, exist_ok=True)
        side_by_side(frames).save(whole)
        sheets.write_crop_sheet(
            crops,
            {name: {side: torch.nan_to_num(video) for side, video in sides.items()} for name, sides in frames.items()},
        )
        pictures = {"frames": whole, "crops": crops}
    titles = {"frames": "Samples: same prompt, same noise", "crops": "The crop that lost most"}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    text = environment.get_template("diagnosis.html.j2").render(
        found={"mended": None, **found},
        pictures=[
            {"title": titles[name], "data": base64.b64encode(path.read_bytes()).decode()}
            for name, path in pictures.items()
            if path.is_file()
        ],
    )
    write_text(folder / "diagnosis.html", text)
    return Page(folder / "diagnosis.html", pictures)


def side_by_side(frames: Frames) -> Image.Image:
    """A row for each sample: the middle frame of each side, under its name."""
    rows = []
    font = ImageFont.load_default(size=16)
    for name, sides in frames.items():
        pictures = [(side, middle(video)) for side, video in sides.items()]
        factor = max(1, -(-CELL // pictures[0][1].shape[1]))
        cells = [(side, Image.fromarray(enlarge(picture, factor))) for side, picture in pictures]
        width = GAP + sum(cell.width + GAP for _, cell in cells)
        row = Image.new("RGB", (width, 2 * LABEL + cells[0][1].height + GAP), PAPER)
        pen = ImageDraw.Draw(row)
        pen.text((GAP, 4), name, fill=INK, font=font)
        left = GAP
        for side, cell in cells:
            pen.text((left, LABEL + 4), side, fill=INK, font=font)
            row.paste(cell, (left, 2 * LABEL))
            left += cell.width + GAP
        rows.append(row)
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def middle(video: torch.Tensor) -> np.ndarray:
    """The middle frame, uint8 ``[H, W, 3]``; values that are no numbers are black."""
    shown: np.ndarray = (
        (torch.nan_to_num(video[len(video) // 2].float()).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    )
    return shown
