"""What a transformer of the family is given beside noised latents and text, as its own config and its VAE's say.

Sources: sat/diffusion_video.py (``shared_step``) of zai-org/CogVideo, finetune/models/cogvideox_i2v/lora_trainer.py there, and
diffusers' ``CogVideoXImageToVideoPipeline.prepare_latents``, which is what users sample with. Where they disagree the pipeline is followed,
so that training and sampling see the same (docs/image-to-video.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import ConfigError

OFS = 2.0
"""What 1.5 I2V is told as ``ofs``, by SAT's sampling, CogVideo's finetuning and diffusers alike."""
SIGMA_MEAN, SIGMA_STD = -3.0, 0.5
"""Of the logarithm of the noise on the first frame, whose pixels lie in [-1, 1] (``add_noise_to_first_frame``)."""


@dataclass(frozen=True)
class Inputs:
    """``scaling_factor`` of the latents; ``image_factor`` of the first frame's, ``None`` for text to video; ``patch_size_t``: latent frames
    of one token, 1 for models that do not patch over time; ``ofs``: whether the model takes one."""

    scaling_factor: float
    image_factor: float | None = None
    patch_size_t: int = 1
    ofs: bool = False

    @classmethod
    def of(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Inputs:
        """From the configs of a transformer and its VAE.

        ``invert_scale_latents`` (1.5) divides the image's latents by the scaling factor where others multiply.
        """
        factor = float(vae["scaling_factor"])
        image = 1.0 / factor if vae.get("invert_scale_latents") else factor
        return cls(
            factor, image if takes_image(transformer) else None, transformer.get("patch_size_t") or 1,
            transformer.get("ofs_embed_dim") is not None,
        )  # fmt: skip

    def padded(self, latents: torch.Tensor) -> torch.Tensor:
        """``latents`` ``[frames, channels, h, w]`` in whole patches over time: the first frame is repeated in front, as CogVideo's own
        finetuning does it. Sampling starts with as many frames of noise in front and drops what they become."""
        missing = -len(latents) % self.patch_size_t
        return torch.cat([latents[:1].expand(missing, -1, -1, -1), latents]) if missing else latents

    def beside(self, image: torch.Tensor | None, latents: torch.Tensor) -> torch.Tensor:
        """What stands beside ``latents`` ``[frames, channels, h, w]``: the image's latents ``[channels, 1, h, w]``, not scaled, at the very
        first (padded) frame, zeros at all others; zeros everywhere without one."""
        found = torch.zeros_like(latents)
        if image is not None:
            assert self.image_factor is not None
            found[0] = self.image_factor * image[:, 0]
        return found

    def extra(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Further keyword arguments of the transformer's forward pass."""
        return {"ofs": torch.full((1,), OFS, device=device, dtype=dtype)} if self.ofs else {}


def read_transformer_config(model: Path) -> dict[str, Any]:
    """The transformer's config.json, which must say how long captions are. Raises :class:`ConfigError`."""
    config_file = model / "transformer" / "config.json"
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        int(config["max_text_seq_length"])
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{config_file} does not say max_text_seq_length", "it should be a CogVideoX transformer's config.json"
        ) from error


def takes_image(transformer: Mapping[str, Any]) -> bool:
    """Whether a transformer with this config makes videos from an image."""
    return transformer.get("in_channels", 16) != transformer.get("out_channels", 16)


def check_sizes(transformer: Mapping[str, Any], sizes: Iterable[tuple[int, int, int]]) -> None:
    """Raise :class:`ConfigError` when :func:`size_problems` finds any."""
    if problems := size_problems(transformer, sizes):
        raise ConfigError(
            "The transformer cannot take clips of these sizes (frames x height x width):\n  " + "\n  ".join(problems),
            "Give data.frames, data.height, data.width and data.buckets that fit it.",
        )


def size_problems(transformer: Mapping[str, Any], sizes: Iterable[tuple[int, int, int]]) -> list[str]:
    """Which of ``sizes`` (frames, height, width of clips in pixels) the positions of a transformer do not reach, one line each.

    Learned positions (5B I2V) exist for one size. Of another height or width diffusers refuses them; of another number of frames it
    quietly puts computed ones in their place. 1.5 reads its positions off a table.
    """
    if not transformer.get("use_learned_positional_embeddings") and not transformer.get("patch_size_t"):
        return []
    ratio = int(transformer.get("temporal_compression_ratio") or 4)
    rows, columns = int(transformer["sample_height"]), int(transformer["sample_width"])
    own = (int(transformer["sample_frames"]) - 1) // ratio + 1, rows, columns
    found = []
    for frames, height, width in sizes:
        size, grid = f"{frames}x{height}x{width}", ((frames - 1) // ratio + 1, height // 8, width // 8)
        if transformer.get("use_learned_positional_embeddings") and grid != own:
            found.append(
                f"{size}: the model has learned positions of {transformer['sample_frames']}x{8 * rows}x{8 * columns} alone"
            )
        elif grid[1:] != own[1:] and (grid[1] > rows or grid[2] > columns):
            found.append(f"{size}: the model's positions end at a height of {8 * rows} and a width of {8 * columns}")
    return found
