"""Detect soft data: measure the effective resolution of a clip, and split a set of clips into softer and sharper ones.

**Reach.** A picture that was scaled up holds nothing above the band of the small one. A soft style or shallow focus
holds fine detail *somewhere*. So tiles are measured one by one, and the sharpest structured tiles decide. Power spectra
along rows and columns are multiplied by f squared: the power of edges and of natural pictures falls with 1 / f squared
(Field 1987), so what remains is flat up to where the picture ends. Twice the noise floor, measured on the flattest
tiles, is
subtracted: grain and codec noise are everywhere, detail is at edges.

**Two groups.** One Gaussian against a mixture of two over the clips' detail, by BIC (Schwarz 1978), with a least
distance (Ashman, Bird and Zepf 1994) and a least share, so that skew alone is no group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

LUMA = np.array([0.299, 0.587, 0.114])
FRAMES = 4
MOST_TILES = 400  # of each frame
STRUCTURED, SHARPEST = 0.25, 0.9
"""The share of tiles, those with most mid-band energy, that are looked at; the quantile over them at each frequency."""
REFERENCE = (0.06, 0.25)
"""The band, as a share of Nyquist, that sets 0 dB."""
END = -10.0
"""dB below the reference at which the picture has ended. Photographs as they are stay above it up to Nyquist (-5 to +5
dB); scaled up twice (bicubic, bilinear, Lanczos, then H.264) they fall below it at 0.45 to 0.75."""
WHOLE = 0.8
"""A picture that reaches this share of the band in either direction counts as whole."""
HALF = 0.6
"""So does one that stays above -6 dB of the reference up to this share: 0.44 to 0.5 for one scaled up twice, 0.33 for
four times.
"""


@dataclass(frozen=True)
class Resolution:
    """Effective resolution of frames of ``height`` x ``width`` pixels.

    ``reach`` (down, across): the share of the band that holds a picture, 0..1; ``half_power``: up to where it stays
    above -6 dB; ``detail``: mean level in dB of 0.4..0.8 of Nyquist against 0.06..0.25. Flat clips
    get reach 1 and detail 0.
    """

    height: int
    width: int
    reach: tuple[float, float]
    half_power: tuple[float, float]
    detail: float

    @property
    def scaled_up(self) -> bool:
        """True if the picture ends well below Nyquist in both directions."""
        return max(self.reach) < WHOLE and sum(self.half_power) / 2 < HALF

    @property
    def effective(self) -> tuple[int, int]:
        """The size (height, width) that would hold the picture, about."""
        if not self.scaled_up:
            return self.height, self.width
        rows, columns = (min(1.0, share) for share in self.half_power)
        return _even(self.height * rows), _even(self.width * columns)


@dataclass(frozen=True)
class Groups:
    """``soft``: names of the softer clips; ``gap``: between the groups' means, in dB; ``distance``: the gap in pooled
    deviations.
    """

    soft: tuple[str, ...]
    total: int
    gap: float
    distance: float

    def line(self) -> str:
        return f"{len(self.soft)} of {self.total} clips are softer than the rest by {self.gap:.1f} dB of fine detail"


def resolution(frames: torch.Tensor | np.ndarray) -> Resolution:
    """Return the effective resolution of a clip.

    ``frames``: ``[T, H, W, 3]``, uint8 or float 0..1, 32 pixels or more high and wide. Four frames are read. Raises
    ``ValueError`` for another shape.

    It is misled by coarse coding and strong grain on top of a scaled-up picture, pixel art and nearest-neighbour
    scaling (they have hard edges), sharp lettering over much of a soft picture. A clip that is soft everywhere cannot
    be distinguished from a scaled-up one and counts as scaled up (18 of 22 clips under a Gaussian of 0.8 pixels).
    """
    luma = _luma(frames)
    height, width = luma.shape[1:]
    side = 64 if min(height, width) >= 192 else 32
    tiles = np.concatenate([_tiles(frame, side) for frame in luma])
    window = np.hanning(side + 1)[:side]
    window2 = window[:, None] * window
    power = np.abs(np.fft.fft2((tiles - tiles.mean((1, 2), keepdims=True)) * window2)) ** 2 / float((window2**2).sum())
    low = np.abs(np.fft.fftfreq(side)) <= 1 / 8
    half = slice(1, side // 2 + 1)
    along_rows = power[:, low][:, :, half].mean(1)
    along_columns = power[:, :, low][:, half].mean(2)
    columns, rows = _profile(along_rows), _profile(along_columns)
    if columns is None or rows is None:
        return Resolution(height, width, (1.0, 1.0), (1.0, 1.0), 0.0)
    frequencies = np.arange(1, side // 2 + 1) / (side // 2)
    band = (frequencies >= 0.4) & (frequencies <= 0.8)
    return Resolution(
        height,
        width,
        (_end(frequencies, rows, END), _end(frequencies, columns, END)),
        (_first(frequencies, rows, -6.0), _first(frequencies, columns, -6.0)),
        float((rows[band].mean() + columns[band].mean()) / 2),
    )


def two_groups(detail: Mapping[str, float]) -> Groups | None:
    """Return the softer and the sharper group of clips (name to detail in dB); ``None`` if one Gaussian fits as well.

    Requires 12 clips or more, a tenth of them (at least 3) in either group, groups that are ``LEAST_DISTANCE`` pooled
    deviations and ``LEAST_GAP`` dB apart, and ``LEAST_EVIDENCE`` of BIC.
    """
    names = [name for name, value in detail.items() if math.isfinite(value)]
    values = np.array([detail[name] for name in names])
    if len(values) < 12 or values.std() < 1e-6:
        return None
    fitted = _mixture(values)
    if fitted is None:
        return None
    likelihood, means, deviations, soft = fitted
    one = -0.5 * len(values) * (math.log(2 * math.pi * values.var()) + 1)
    evidence = 2 * (likelihood - one) - 3 * math.log(len(values))
    gap = float(means[1] - means[0])
    distance = gap / math.sqrt((deviations[0] ** 2 + deviations[1] ** 2) / 2)
    least = max(3, math.ceil(0.1 * len(values)))
    if (
        evidence < LEAST_EVIDENCE
        or gap < LEAST_GAP
        or distance < LEAST_DISTANCE
        or not least <= soft.sum() <= len(values) - least
    ):
        return None
    return Groups(tuple(name for name, is_soft in zip(names, soft, strict=True) if is_soft), len(names), gap, distance)


LEAST_EVIDENCE, LEAST_DISTANCE, LEAST_GAP = 15.0, 3.0, 4.0
"""The test takes none of 60 sets of 96 values from a normal, a gamma (shape 2) or a Student t (4 degrees) distribution
for two groups, and 4 of 60 sets from a uniform distribution, which has no tails. Drawn clips, half of them under a
Gaussian of 1.2 pixels, are 22 dB and 9 deviations apart; photographs, half under one pixel, 15 dB and 2.8: contents
differ too much for this test to be sure."""


def _luma(frames: torch.Tensor | np.ndarray) -> np.ndarray:
    array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu()
    if array.ndim != 4 or array.shape[-1] != 3 or not len(array) or min(array.shape[1:3]) < 32:
        raise ValueError(f"frames are [T, H, W, 3], 32 pixels or more high and wide, not {list(array.shape)}")
    picked = np.unique(np.linspace(0, len(array) - 1, min(len(array), FRAMES)).round().astype(int))
    chosen = np.asarray(array[picked] if isinstance(array, np.ndarray) else array[torch.from_numpy(picked)].float())
    scale = 1.0 if frames.dtype in (np.uint8, torch.uint8) else 255.0
    return np.nan_to_num(chosen.astype(np.float64)) @ (LUMA * scale)


def _tiles(frame: np.ndarray, side: int) -> np.ndarray:
    """Return tiles ``[n, side, side]`` that overlap by half, thinned evenly to ``MOST_TILES``."""
    view = np.lib.stride_tricks.sliding_window_view(frame, (side, side))[:: side // 2, :: side // 2]
    flat = view.reshape(-1, side, side)
    chosen = np.unique(np.linspace(0, len(flat) - 1, min(len(flat), MOST_TILES)).astype(int))
    return np.asarray(flat[chosen])


def _profile(power: np.ndarray) -> np.ndarray | None:
    """Return the level in dB by frequency, of power ``[tiles, frequencies]``; ``None`` for flat clips."""
    count = power.shape[1]
    frequencies = np.arange(1, count + 1) / count
    reference = (frequencies >= REFERENCE[0]) & (frequencies <= REFERENCE[1])
    weighted = power * frequencies**2
    energy = weighted[:, reference].mean(1)
    order = np.argsort(energy)
    floor = 2 * _smooth(np.median(power[order[: max(3, len(power) // 10)]], axis=0)).min()
    top = order[-max(3, int(STRUCTURED * len(power))) :]
    signal = np.maximum(power[top] - floor, 0) * frequencies**2
    level = signal[:, reference].mean(1)
    if np.median(level) < 1e-3:
        return None
    return 10 * np.log10(_smooth(np.quantile(signal / np.maximum(level, 1e-9)[:, None], SHARPEST, axis=0)) + 1e-6)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the running median of three."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    return np.asarray(np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0))


def _end(frequencies: np.ndarray, levels: np.ndarray, least: float) -> float:
    """Return the frequency at which the levels fall below ``least`` and stay there on average.

    The average is over the next fifth of the band, because codec noise may rise again above.
    """
    ahead = max(2, len(levels) // 5)
    for index in range(len(levels) - ahead):
        if frequencies[index] > REFERENCE[0] and levels[index] < least and levels[index : index + ahead].mean() < least:
            return float(frequencies[index])
    return 1.0


def _first(frequencies: np.ndarray, levels: np.ndarray, least: float) -> float:
    below = frequencies[(levels < least) & (frequencies > REFERENCE[0])]
    return float(below.min()) if len(below) else 1.0


def _even(value: float) -> int:
    return max(2, 2 * round(value / 2))


def _mixture(values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the best of a few EM fits of two Gaussians.

    The values are log-likelihood, means (rising), deviations, and a mask of the values in the lower Gaussian.
    """
    best: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None
    least = 0.1 * values.std()  # a group of equal values would have an infinite likelihood
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        cut = np.quantile(values, share)
        weight = np.stack([values <= cut, values > cut]).astype(float)
        for _ in range(200):
            mass = weight.sum(1)
            if mass.min() < 1:
                break
            means = weight @ values / mass
            deviations = np.maximum(np.sqrt((weight * (values - means[:, None]) ** 2).sum(1) / mass), least)
            logs = np.log(mass / len(values))[:, None] - 0.5 * ((values - means[:, None]) / deviations[:, None]) ** 2
            logs -= np.log(deviations * math.sqrt(2 * math.pi))[:, None]
            total = np.logaddexp(logs[0], logs[1])
            fresh = np.exp(logs - total)
            converged = np.abs(fresh - weight).max() < 1e-6
            weight = fresh
            if converged:
                break
        else:
            mass = weight.sum(1)
        if mass.min() < 1:
            continue
        order = np.argsort(means)
        soft = (weight[order[0]] > 0.5) & (values < means[order[1]])
        if best is None or total.sum() > best[0]:
            best = (float(total.sum()), means[order], deviations[order], soft)
    return best
