"""Measure the quality of the tiny model on clips and prompts that are not in its training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from scipy.ndimage import gaussian_filter

from cogflow.data.shapes import BASE_COLOURS, BASE_SHAPES, Scene, draw, scenes
from cogflow.models.tiny import SPEC
from cogflow.sharpness.metrics import measure
from cogflow.sharpness.psnr import psnr_of_error
from tools.recognise_shapes import recognise

UNSEEN = 987_654
"""Seed of the measured clips. Training draws clips with other seeds."""

SampleFunction = Callable[[str, int], np.ndarray]
"""(prompt, seed) -> uint8 ``[frames, height, width, 3]``."""


def draw_clips(wanted: list[Scene]) -> torch.Tensor:
    """Return the drawn clips, float ``[n, 3, frames, height, width]`` in -1..1."""
    drawn = np.stack([draw(scene, SPEC.frames, SPEC.height, SPEC.width) for scene in wanted])
    return torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def blur_frames(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Return ``frames`` ``[T, H, W, 3]`` after a Gaussian blur of ``sigma`` pixels in each frame."""
    return np.asarray(gaussian_filter(frames.astype(np.float32), (0, sigma, sigma, 0)))


@torch.no_grad()
def measure_roundtrip(vae: AutoencoderKLCogVideoX, count: int) -> dict[str, float]:
    """Return the PSNR in dB of ``count`` unseen clips through ``vae``, and the change of their wavelet ratio."""
    errors, before, after, softened = [], [], [], []
    for clip in draw_clips(scenes(count, UNSEEN)):
        output = vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample[0].clamp(-1, 1)
        errors.append(float((output - clip).square().mean()) / 4.0)
        original, passed = (x.permute(1, 2, 3, 0).numpy() / 2 + 0.5 for x in (clip, output))
        before.append(measure(original)["wavelet_ratio"])
        after.append(measure(passed)["wavelet_ratio"])
        softened.append(measure(blur_frames(original, 1.0))["wavelet_ratio"])
    decibels = [psnr_of_error(error) for error in errors]
    return {
        "psnr_mean_db": float(np.mean(decibels)),
        "psnr_min_db": float(np.min(decibels)),
        "wavelet_ratio_change": float(np.mean(np.subtract(after, before))),
        "wavelet_ratio_change_of_gaussian_1": float(np.mean(np.subtract(softened, before))),
    }


def measure_prompt_following(sample: SampleFunction, repeats: int) -> dict[str, Any]:
    """Return the share of samples that show the prompt's colour, shape and direction, and the effect of a blur of sigma
    1.

    ``repeats`` times 24 prompts cover every base colour, shape and motion.
    """
    wanted = scenes(24 * repeats, UNSEEN + 1)
    hits = {"colour": 0, "shape": 0, "motion": 0, "all": 0}
    drops = []
    for seed, scene in enumerate(wanted):
        frames = sample(scene.caption, seed)
        seen = recognise(frames, BASE_COLOURS, BASE_SHAPES)
        right = {
            "colour": seen.colour == scene.colour,
            "shape": seen.shape == scene.shape,
            "motion": seen.motion == scene.motion,
        }
        for name, value in {**right, "all": all(right.values())}.items():
            hits[name] += value
        plain = frames.astype(np.float32) / 255.0
        drops.append(measure(blur_frames(plain, 1.0))["wavelet_ratio"] - measure(plain)["wavelet_ratio"])
    shares = {f"follows_{name}": count / len(wanted) for name, count in hits.items()}
    drop, spread = float(np.mean(drops)), float(np.std(drops))
    return {"samples": len(wanted), **shares, "wavelet_ratio_change_of_gaussian_1": drop, "its_deviation": spread}
