"""The faults in the clips, the cache and the model of a scenario. All of them occur in practice."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter

from cogflow.data.shapes import NEW_COLOURS, NEW_SHAPES, Scene, draw, scenes
from cogflow.data.video import write_video

FRAMES, HEIGHT, WIDTH, FPS = 9, 64, 96, 8.0
WRONG_SCALE = 1.15258426 / 0.7
"""Error of latents that were multiplied by 2B's factor and are used as latents of 5B."""

Style = Callable[[np.ndarray, int], np.ndarray]
"""Frames ``[T, H, W, 3]`` uint8 at twice the training size, and the clip's number -> frames of the same shape."""


def plain(frames: np.ndarray, _: int) -> np.ndarray:
    """Return the frames unchanged."""
    return frames


def half_blurred(frames: np.ndarray, number: int) -> np.ndarray:
    """Blur every other clip with a Gaussian of 1.5 pixels of the training size."""
    return _smooth(frames, 3.0) if number % 2 else frames


def quarter_size(frames: np.ndarray, _: int) -> np.ndarray:
    """Reduce the frames to a quarter of the training size and enlarge them again. A thumbnail still looks sharp."""
    small = _resized(frames, HEIGHT // 4, WIDTH // 4)
    return _resized(small, frames.shape[1], frames.shape[2])


def soft_style(frames: np.ndarray, _: int) -> np.ndarray:
    """Give the frames a shallow depth of field: sharp in the middle, softer towards the top and the bottom.

    This style is legitimate. Paintings that are soft everywhere cannot be distinguished from clips that were scaled up;
    ``data.soft_style=true`` is for those.
    """
    rows = np.abs(np.linspace(-1, 1, frames.shape[1], dtype=np.float32))[None, :, None, None]
    result = frames.astype(np.float32)
    for sigma, start in ((1.5, 0.15), (3.0, 0.4)):
        weight = np.clip((rows - start) / 0.25, 0, 1)
        result += weight * (_smooth(frames, sigma) - result)
    return result.round().astype(np.uint8)


def draw_clips(folder: Path, count: int, style: Style, seed: int = 0) -> Path:
    """Draw ``count`` clips in ``style``, of concepts new to the shipped model, and write them with captions."""
    rows = []
    for number, scene in enumerate(scenes(count, seed, NEW_COLOURS, NEW_SHAPES)):
        frames = style(draw(scene, 2 * FRAMES - 1, 2 * HEIGHT, 2 * WIDTH), number)
        write_video(folder / f"videos/{number:05d}.mp4", frames, 2 * FPS, crf=12, threads=1)
        rows.append({"file_name": f"videos/{number:05d}.mp4", "text": scene.caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prompts(path: Path, count: int) -> Path:
    """Write ``count`` prompts, half of concepts that finetuning adds and half of those that the model knows."""
    new = [
        ("purple", "star", "right", "light"),
        ("orange", "square", "down", "dark"),
        ("purple", "square", "left", "dark"),
        ("orange", "star", "up", "light"),
    ]
    old = [
        ("red", "circle", "left", "light"),
        ("blue", "triangle", "up", "dark"),
        ("green", "cross", "right", "light"),
        ("yellow", "circle", "down", "dark"),
    ]
    chosen = [Scene(*words, 0) for pair in zip(new, old, strict=True) for words in pair][:count]
    rows = [{"id": f"{scene.colour}-{scene.shape}", "text": scene.caption} for scene in chosen]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rescale_cache(cache: Path) -> None:
    """Multiply the cached latents by the wrong factor, as in a cache that another program wrote."""
    changed = 0
    for file in cache.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(".mean"):
                tensors[name] = tensors[name] * WRONG_SCALE
            elif name.endswith(".logvar"):
                tensors[name] = tensors[name] + 2 * math.log(WRONG_SCALE)
            else:
                continue
            changed += 1
        save_file(tensors, file)
    if not changed:
        raise AssertionError(f"{cache} has no latents, so the scenario would have no fault")


def with_2b_schedule(model: Path, target: Path) -> Path:
    """Copy the pipeline folder ``model`` and give its scheduler 2B's SNR shift."""
    shutil.copytree(model, target)
    file = target / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    if config["snr_shift_scale"] != 1.0:
        raise AssertionError("the SNR shift of the model must be 1.0")
    file.write_text(json.dumps(config | {"snr_shift_scale": 3.0}, indent=2))
    return target


def with_overflowing_vae(model: Path, target: Path) -> Path:
    """Copy ``model`` and change its decoder so that it computes the same in fp32 and overflows in fp16.

    The convolution before a group normalisation is multiplied by 1e6; the normalisation removes the factor.
    """
    shutil.copytree(model, target)
    file = target / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    changed = [name for name in tensors if name.startswith("decoder.mid_block.resnets.0.conv1.")]
    if len(changed) != 2:
        raise AssertionError(f"the decoder must have two such tensors, not {changed}")
    for name in changed:
        tensors[name] = tensors[name] * 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def _smooth(frames: np.ndarray, sigma: float) -> np.ndarray:
    return np.clip(gaussian_filter(frames.astype(np.float32), (0, sigma, sigma, 0)), 0, 255).round().astype(np.uint8)


def _resized(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    planes = torch.nn.functional.interpolate(
        planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return planes.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
