"""Write and read video files through PyAV, with the same exact colour conversion both ways."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from cogflow.data.media import as_clip_errors, open_media
from cogflow.data.media_bytes import ClipError

# SWS_BICUBIC, SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT of libswscale; older PyAV has no names for the last two. The
# default rounds down, which darkens each clip by one to two levels of 255.
EXACT = 0x4 | 0x40000 | 0x2000

MOST_BYTES = 2 * 10**9
"""Bytes of one clip's frames that :func:`read_video` reads; the frames after them are left out."""

_BT709 = 1  # the same number names the matrix, the primaries and the transfer curve
_LIMITED_RANGE = 1


def write_video(path: Path, frames: torch.Tensor | np.ndarray, fps: float, crf: int = 16, *, threads: int = 0) -> None:
    """Write ``frames``, uint8 ``[T, H, W, 3]`` sRGB with even H and W, as H.264 in mp4 (yuv420p, BT.709).

    Browsers play this format. The file appears under its name only when it is complete. ``threads``: of x264 (0: its
    choice); the bytes of the file depend on it. Raises ``ValueError`` for frames of another shape or dtype.
    """
    array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {array.dtype} {list(array.shape)}")
    _, height, width, _ = array.shape
    if height % 2 or width % 2:
        raise ValueError(f"H.264 in yuv420p needs an even height and width, not {height}x{width}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # mbtree is off: with AVX-512 it reads beyond narrow pictures, and equal frames gave different bytes.
            stream.options = {"crf": str(crf), "threads": str(threads), "x264-params": "mbtree=0"}
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
            codec.color_range = _LIMITED_RANGE
            for index, image in enumerate(array):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=EXACT,
                )
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Return a decoded frame as uint8 ``[H, W, 3]`` sRGB, upright when the file states a rotation."""
    image = frame.reformat(format="rgb24", interpolation=EXACT).to_ndarray()
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


class PlaneConverter:
    """Convert decoded frames to the planes of :func:`to_rgb`: red, green, blue, uint8 ``[H, W]`` each.

    Use one converter for one file and one thread.
    """

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()  # keeps its tables from frame to frame

    def __call__(self, frame: av.VideoFrame) -> list[np.ndarray]:
        # swscale writes planes with vector instructions but packed pixels one by one: planes take under half the time.
        if frame.format.name not in ("yuv420p", "yuvj420p"):
            image = to_rgb(frame)
            return [np.ascontiguousarray(image[..., channel]) for channel in range(3)]
        turned = self._reformatter.reformat(frame, format="gbrp", interpolation=EXACT)
        green, blue, red = (_rows(plane)[: turned.height, : turned.width] for plane in turned.planes)
        quarter_turns = round(frame.rotation / 90) % 4
        if not quarter_turns:
            return [red, green, blue]
        return [np.ascontiguousarray(np.rot90(plane, quarter_turns)) for plane in (red, green, blue)]


def _rows(plane: av.video.plane.VideoPlane) -> np.ndarray:
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)


def read_video(path: Path, most_bytes: int = MOST_BYTES) -> tuple[torch.Tensor, float]:
    """Return all frames of a video, uint8 ``[T, H, W, 3]``, and its mean frame rate per second.

    ``most_bytes``: reading ends before the frame that would exceed it. Raises :class:`ClipError`.
    """
    frames: list[np.ndarray] = []
    with as_clip_errors(), open_media(path) as container:
        if not container.streams.video:
            raise ClipError("holds no video stream")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 0)
        for frame in container.decode(stream):
            image = to_rgb(frame)
            if (len(frames) + 1) * image.nbytes > most_bytes:
                break
            frames.append(image)
    if not frames:
        raise ClipError("holds no frame")
    if any(image.shape != frames[0].shape for image in frames):
        raise ClipError("frames change their size")
    return torch.from_numpy(np.stack(frames)), rate
