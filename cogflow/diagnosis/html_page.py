"""Write diagnosis.html: the verdict, the frames side by side, the crop that lost most detail, and the result of each
step.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from cogflow.files.atomic_write import write_text
from cogflow.ladder.crop_sheet import write_crop_sheet
from cogflow.records.pipeline_records import DiagnosisRecord
from cogflow.tracking.contact_sheet import GAP, INK, LABEL, PAPER, enlarge

Frames = Mapping[str, Mapping[str, torch.Tensor]]
"""Frames ``[T, H, W, 3]`` in 0..1 by sample name and by title (target, candidate, repaired)."""

MIN_WIDTH = 280
"""Pixels; narrower frames are enlarged by a whole factor."""

TITLES = {"frames": "Samples: same prompt, same noise", "crops": "The crop that lost most detail"}


@dataclass(frozen=True)
class DiagnosisPage:
    """The page and its pictures by name."""

    path: Path
    pictures: dict[str, Path]


def write_page(folder: Path, record: DiagnosisRecord, frames: Frames) -> DiagnosisPage:
    """Write ``folder/diagnosis.html``, and its pictures to ``folder/diagnosis/``. The page also contains the
    pictures.
    """
    pictures = _write_pictures(folder / "diagnosis", frames) if frames else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    text = environment.get_template("diagnosis.html.j2").render(
        found=record,
        pictures=[
            {"title": TITLES[name], "data": base64.b64encode(path.read_bytes()).decode()}
            for name, path in pictures.items()
            if path.is_file()
        ],
    )
    write_text(folder / "diagnosis.html", text)
    return DiagnosisPage(folder / "diagnosis.html", pictures)


def _write_pictures(folder: Path, frames: Frames) -> dict[str, Path]:
    """Write frames.png and crops.png to ``folder``."""
    whole, crops = folder / "frames.png", folder / "crops.png"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(name, videos) for name, videos in frames.items()]
    _stack(rows).save(whole)
    finite = {
        name: {title: torch.nan_to_num(video) for title, video in videos.items()} for name, videos in frames.items()
    }
    write_crop_sheet(crops, finite)
    return {"frames": whole, "crops": crops}


def _row(name: str, videos: Mapping[str, torch.Tensor]) -> Image.Image:
    """Return the middle frame of each video of a sample, side by side below their titles."""
    pictures = {title: middle_frame(video) for title, video in videos.items()}
    width = next(iter(pictures.values())).shape[1]
    factor = max(1, -(-MIN_WIDTH // width))
    cells = {title: Image.fromarray(enlarge(picture, factor)) for title, picture in pictures.items()}
    height = max(cell.height for cell in cells.values())
    size = (GAP + sum(cell.width + GAP for cell in cells.values()), 2 * LABEL + height + GAP)
    row = Image.new("RGB", size, PAPER)
    font = ImageFont.load_default(size=16)
    pen = ImageDraw.Draw(row)
    pen.text((GAP, 4), name, fill=INK, font=font)
    left = GAP
    for title, cell in cells.items():
        pen.text((left, LABEL + 4), title, fill=INK, font=font)
        row.paste(cell, (left, 2 * LABEL))
        left += cell.width + GAP
    return row


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def middle_frame(video: torch.Tensor) -> np.ndarray:
    """Return the middle frame as uint8 ``[H, W, 3]``; values that are not finite become black."""
    frame = torch.nan_to_num(video[len(video) // 2].float()).clamp(0, 1) * 255
    pixels: np.ndarray = frame.round().to(torch.uint8).numpy()
    return pixels
