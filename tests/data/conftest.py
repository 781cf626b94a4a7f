"""Real clips, drawn small and encoded through PyAV."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

# Tests are imported by path; this makes their helper (preparing.py) importable, too.
sys.path.insert(0, str(Path(__file__).parent))

WriteClip = Callable[..., Path]


@pytest.fixture
def write_clip() -> WriteClip:
    def write(
        path: Path,
        frames: np.ndarray,
        fps: float = 8,
        times: Sequence[float] | None = None,
        codec: str = "libx264",
        container_format: str | None = None,
        rotation: int = 0,
        faststart: bool = True,
        options: dict[str, str] | None = None,
    ) -> Path:
        """Frames at a constant rate, or at ``times`` in seconds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        muxer = {"movflags": "+faststart"} if faststart and path.suffix in (".mp4", ".mov") else {}
        with av.open(str(path), "w", format=container_format, options=muxer) as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            stream.options = options or (
                {"crf": "4", "threads": "1"} if codec == "libx264" else {"crf": "4", "b": "4M", "deadline": "realtime"}
            )
            if times is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            if rotation:
                stream.set_display_rotation(rotation)
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                if times is not None:
                    frame.time_base = Fraction(1, 1000)
                frame.pts = index if times is None else round(times[index] * 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write
