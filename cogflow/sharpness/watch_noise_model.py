"""What the watch takes as no damage: measured deviations of a prompt's change, weights of the blur composite, and limits.

Measured on contents and simulated by ``stage=benchmark stage.what=watch``, which tells detection and false alarms with their counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptNoise:
    """How one tested channel moves with nothing wrong.

    * ``contents``: deviation of its value over contents;
    * ``variants``: deviation of its change between two takes of one content;
    * ``matters``: the smallest shift of all prompts together that is worth an alarm, however sure it is;
    * ``stricter``: added to the limits. Blur, which the watch is for, gets the larger part of the false alarms that all channels
      together are allowed.
    """

    contents: float
    variants: float
    matters: float
    stricter: float = 0.5


@dataclass(frozen=True)
class WatchNoise:
    """``drifts`` by tested channel (of the panel, or derived).

    The composite ``blur`` is told in units of what a Gaussian of sigma 1 pixel takes from real clips (median): -1. A clip that is soft
    already has less to lose: ``gain`` is the line (at 0, slope) of what such a blur takes over the clip's own composite; within GAIN.
    The other settings:

    * ``unit``: the composite's change, as :mod:`cogflow.sharpness.verdict` has it, by a Gaussian of sigma 1;
    * ``share``: content drift expected between the base model's sample and a finetuned one's, as a share of the deviation over contents;
    * ``spread_df``: prompts that the expected drift counts for, before it is corrected by the spread of all channels together;
    * ``prior_df``: prompts that the corrected drift counts for in one channel's deviation;
    * ``newest``: weight of the newest validation in the smoothed change;
    * ``warning``, ``alarm``: limits, as normal scores.
    """

    drifts: dict[str, PromptNoise]
    unit: float = 0.122
    gain: tuple[float, float] = (3.05, 0.44)
    share: float = 0.4
    spread_df: float = 3.0
    prior_df: float = 40.0
    newest: float = 0.4
    warning: float = 2.8
    alarm: float = 3.3


GAIN = (0.3, 2.0)
"""Bounds of the gain of a prompt."""
MEASURED = WatchNoise(
    drifts={
        "blur": PromptNoise(0.88, 0.12, 0.12, 0.0),
        "sharp": PromptNoise(0.86, 0.12, 0.15),
        "smear": PromptNoise(0.62, 0.16, 0.12),
        "contrast": PromptNoise(0.43, 0.18, 0.10),
        "veil": PromptNoise(0.11, 0.06, 0.03),
        "grain": PromptNoise(0.47, 0.07, 0.15),
        "saturation": PromptNoise(0.80, 0.08, 0.15),
        "clipped": PromptNoise(0.08, 0.05, 0.05),
        "motion": PromptNoise(1.06, 0.38, 0.2, 0.9),
        "artefacts": PromptNoise(0.15, 0.05, 0.05),
    },
)
"""On 25 contents of 480x720, but for artefacts: frames of real clips have none (deviation 0.004), samples of a small model do (0.15)."""
