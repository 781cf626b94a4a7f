"""Degrade clips on purpose. Each function maps a clip ``[T, H, W, 3]`` uint8 to one of the same shape and dtype."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import av
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter1d

Degradation = Callable[[np.ndarray], np.ndarray]


def gauss(sigma: float) -> Degradation:
    """Return a defocus: a Gaussian of ``sigma`` pixels."""
    return lambda clip: _bytes(gaussian_filter(_floats(clip), (0, sigma, sigma, 0)))


def noise(deviation: float, sigma: float = 0) -> Degradation:
    """Return sensor noise of ``deviation`` (of 255) after a Gaussian of ``sigma`` pixels. The clip seeds the noise."""

    def apply(clip: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(clip.tobytes()))
        soft = gaussian_filter(_floats(clip), (0, sigma, sigma, 0)) if sigma else _floats(clip)
        return _bytes(soft + random.standard_normal(clip.shape, dtype=np.float32) * (deviation / 255))

    return apply


def rounding(clip: np.ndarray) -> np.ndarray:
    """Round the frames differently: a quarter of the values is one level (of 255) higher, a quarter one level lower."""
    random = np.random.default_rng(zlib.crc32(clip.tobytes()))
    return _bytes(_floats(clip) + (random.random(clip.shape, dtype=np.float32) * 2 - 1) / 255)


def motion(length: int, axis: int) -> Degradation:
    """Return motion blur: a box of ``length`` pixels along rows (2) or columns (1)."""
    return lambda clip: _bytes(uniform_filter1d(_floats(clip), length, axis=axis))


def blend(count: int) -> Degradation:
    """Return a temporal blur: each frame is the mean of itself and the ``count - 1`` frames after it."""

    def apply(clip: np.ndarray) -> np.ndarray:
        frames, places = _floats(clip), np.arange(len(clip))
        return _bytes(np.mean([frames[np.minimum(places + step, len(clip) - 1)] for step in range(count)], axis=0))

    return apply


def down_up(factor: int) -> Degradation:
    """Return scaling down by ``factor`` and up to the original size."""

    def apply(clip: np.ndarray) -> np.ndarray:
        height, width = clip.shape[1:3]
        small = [
            Image.fromarray(frame).resize((width // factor, height // factor), Image.Resampling.BICUBIC)
            for frame in clip
        ]
        return np.stack([np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in small])

    return apply


def contrast(factor: float) -> Degradation:
    return lambda clip: _bytes((_floats(clip) - 0.5) * factor + 0.5)


def brightness(by: float) -> Degradation:
    return lambda clip: _bytes(_floats(clip) + by)


def haze(clip: np.ndarray) -> np.ndarray:
    """Blend the frames with light grey."""
    return _bytes(_floats(clip) * 0.8 + 0.17)


def saturation(factor: float) -> Degradation:
    def apply(clip: np.ndarray) -> np.ndarray:
        frames = _floats(clip)
        grey = (frames @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
        return _bytes(grey + (frames - grey) * factor)

    return apply


def sharpened(clip: np.ndarray) -> np.ndarray:
    """Apply an unsharp mask of sigma 1 and strength 1."""
    frames = _floats(clip)
    return _bytes(2 * frames - gaussian_filter(frames, (0, 1, 1, 0)))


def frozen(clip: np.ndarray) -> np.ndarray:
    return np.repeat(clip[:1], len(clip), axis=0)


def slowed(clip: np.ndarray) -> np.ndarray:
    """Return a clip with little motion: nine tenths of the first frame plus one tenth of each frame."""
    return _bytes(_floats(clip) * 0.1 + _floats(clip[:1]) * 0.9)


def blocks(clip: np.ndarray) -> np.ndarray:
    """Add a grid of 8x8 blocks, each two levels of 255 lighter or darker at random."""
    random = np.random.default_rng(zlib.crc32(clip.tobytes()))
    frames, height, width = clip.shape[:3]
    steps = random.choice([-2.0, 2.0], (frames, -(-height // 8), -(-width // 8)))
    grid = np.kron(steps, np.ones((8, 8)))[:, :height, :width, None].astype(np.float32)
    return _bytes(_floats(clip) + grid / 255)


def h264(crf: int) -> Degradation:
    """Return encoding with x264 at ``crf`` and decoding."""

    def apply(clip: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as video:
            stream = video.add_stream("libx264", rate=8, options={"crf": str(crf), "threads": "1"})
            stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
            for frame in clip:
                video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            video.mux(stream.encode())
        file.seek(0)
        with av.open(file) as video:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])

    return apply


def _floats(clip: np.ndarray) -> np.ndarray:
    return clip.astype(np.float32) / 255


def _bytes(frames: np.ndarray) -> np.ndarray:
    return np.asarray((np.clip(frames, 0, 1) * 255).round().astype(np.uint8))


SIGMAS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0)
BLURS: dict[str, Degradation] = {
    **{f"gauss {sigma:g}": gauss(sigma) for sigma in SIGMAS},
    "down-up 2": down_up(2),
    "motion 5": motion(5, 2),
    "motion 5 down": motion(5, 1),
    "motion 9": motion(9, 2),
    "gauss 1.5 noise 3": noise(3, 1.5),
    "blend 2": blend(2),
    "blend 3": blend(3),
}
"""Degradations that must be reported as soft; blends must be reported as smeared."""
CONFOUNDS: dict[str, Degradation] = {
    **{f"contrast {factor:g}": contrast(factor) for factor in (0.6, 0.8, 1.25, 1.6)},
    "brighter": brightness(0.1),
    "darker": brightness(-0.1),
    "noise 2": noise(2),
    "noise 5": noise(5),
}
"""Degradations that must not change whether a clip is reported as soft or over-sharpened."""
OTHERS: dict[str, Degradation] = {
    "rounding": rounding,
    "noise 10": noise(10),
    "h264 23": h264(23),
    "h264 35": h264(35),
    "haze": haze,
    "saturation 1.5": saturation(1.5),
    "saturation 0.5": saturation(0.5),
    "sharpened": sharpened,
    "frozen": frozen,
    "slowed": slowed,
    "blocks": blocks,
}
CLEAN = "clean"
"""Name of the clip without degradation."""
