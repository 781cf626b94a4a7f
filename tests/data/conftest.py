"""Fixture that writes small drawn clips as real video files through PyAV."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cogflow.data.shapes import draw, scenes

# Tests are imported by path; this makes their helper (preparing.py) importable, too.
sys.path.insert(0, str(Path(__file__).parent))

WriteClip = Callable[..., Path]


def drawn_clips(folder: Path, count: int, write_clip: WriteClip) -> Path:
    """Write ``count`` drawn clips of 9 frames and their captions into ``folder``."""
    drawn = scenes(count, 0)
    for number, scene in enumerate(drawn):
        write_clip(folder / f"{number}.mp4", draw(scene, 9, 48, 64), fps=16)
    rows = [{"file_name": f"{number}.mp4", "text": scene.caption} for number, scene in enumerate(drawn)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass(frozen=True)
class Encoding:
    """Properties of a test video. ``rotation``: in degrees. ``options``: of the codec; None chooses by ``codec``."""

    codec: str = "libx264"
    container_format: str | None = None
    rotation: int = 0
    faststart: bool = True
    options: dict[str, str] | None = None


@pytest.fixture
def write_clip() -> WriteClip:
    def write(
        path: Path,
        frames: np.ndarray,
        fps: float = 8,
        times: Sequence[float] | None = None,
        **encoding: Any,
    ) -> Path:
        """Write frames at a constant rate, or at ``times`` in seconds. ``encoding``: fields of :class:`Encoding`."""
        wanted = Encoding(**encoding)
        path.parent.mkdir(parents=True, exist_ok=True)
        muxer = {"movflags": "+faststart"} if wanted.faststart and path.suffix in (".mp4", ".mov") else {}
        with av.open(str(path), "w", format=wanted.container_format, options=muxer) as container:
            stream = container.add_stream(wanted.codec, rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            x264 = {"crf": "4", "threads": "1"}
            vpx = {"crf": "4", "b": "4M", "deadline": "realtime"}
            stream.options = wanted.options or (x264 if wanted.codec == "libx264" else vpx)
            if times is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            if wanted.rotation:
                stream.set_display_rotation(wanted.rotation)
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                if times is not None:
                    frame.time_base = Fraction(1, 1000)
                frame.pts = index if times is None else round(times[index] * 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write
