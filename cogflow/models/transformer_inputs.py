"""The inputs of a CogVideoX transformer beside noised latents and text: image latents, ofs and rotary positions.

The module also checks the sizes that a transformer takes. Sources: sat/diffusion_video.py (``shared_step``) of
zai-org/CogVideo, finetune/models/cogvideox_i2v/lora_trainer.py there, and diffusers'
``CogVideoXImageToVideoPipeline.prepare_latents``, with which users sample. If they disagree, this module follows the
pipeline, so that training and sampling use the same inputs (docs/image-to-video.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogflow.errors import ConfigError
from cogflow.files.bounded_parsing import read_json_file
from cogflow.files.record_io import ForeignObject

OFS = 2.0
"""The ``ofs`` of 1.5 I2V in SAT's sampling, CogVideo's finetuning and diffusers."""
SIGMA_MEAN, SIGMA_STD = -3.0, 0.5
"""Mean and standard deviation of log(sigma) of the noise on the first frame.

The frame's pixels are in [-1, 1] (SAT: ``add_noise_to_first_frame``).
"""
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class TransformerSettings:
    """The settings of a transformer that decide which inputs it takes.

    The names, and the values of missing keys, are those of diffusers' ``CogVideoXTransformer3DModel``.
    """

    max_text_seq_length: int
    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 30
    text_embed_dim: int = 4096
    patch_size_t: int | None = None
    ofs_embed_dim: int | None = None
    sample_frames: int = 49
    sample_height: int = 60
    sample_width: int = 90
    temporal_compression_ratio: int = 4
    use_learned_positional_embeddings: bool = False

    @classmethod
    def of_config(cls, config: ForeignObject) -> TransformerSettings:
        """Return the settings in a ``config.json`` of diffusers. Raise ``KeyError`` without ``max_text_seq_length``."""
        present = {one.name: config[one.name] for one in fields(cls) if one.name in config}
        return cls(**present | {"max_text_seq_length": int(config["max_text_seq_length"])})

    @property
    def takes_image(self) -> bool:
        """True for a transformer that makes videos from an image."""
        return self.in_channels != self.out_channels


@dataclass(frozen=True)
class TransformerInputs:
    """Inputs of one model.

    ``scaling_factor``: factor of the latents; ``image_factor``: factor of the first frame's latents, ``None`` for text
    to video; ``patch_size_t``: latent frames of one token, 1 for models that do not patch over time; ``ofs``: whether
    the model takes ``ofs``.
    """

    scaling_factor: float
    image_factor: float | None = None
    patch_size_t: int = 1
    ofs: bool = False

    @classmethod
    def of(
        cls, transformer: TransformerSettings, scaling_factor: float, *, invert_scale_latents: bool = False
    ) -> TransformerInputs:
        """Return the inputs of a transformer. ``scaling_factor`` and ``invert_scale_latents``: those of its VAE.

        ``invert_scale_latents`` (1.5) divides the image's latents by the scaling factor where other models multiply.
        """
        image_factor = 1.0 / scaling_factor if invert_scale_latents else scaling_factor
        return cls(
            scaling_factor=scaling_factor,
            image_factor=image_factor if transformer.takes_image else None,
            patch_size_t=transformer.patch_size_t or 1,
            ofs=transformer.ofs_embed_dim is not None,
        )

    def padded(self, latents: torch.Tensor) -> torch.Tensor:
        """Return ``latents`` ``[frames, channels, h, w]`` in whole patches over time (:func:`pad_latent_frames`)."""
        return pad_latent_frames(latents, self.patch_size_t)

    def beside(self, image: torch.Tensor | None, latents: torch.Tensor) -> torch.Tensor:
        """Return the image channels of ``latents`` ``[frames, channels, h, w]``.

        They are the scaled latents of ``image`` (``[channels, 1, h, w]``, not scaled) at the first (padded) frame and
        zeros at all others. Without an image they are all zeros.
        """
        channels = torch.zeros_like(latents)
        if image is not None:
            assert self.image_factor is not None
            channels[0] = self.image_factor * image[:, 0]
        return channels

    def extra(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return further keyword arguments of the transformer's forward pass."""
        return {"ofs": torch.full((1,), OFS, device=device, dtype=dtype)} if self.ofs else {}


def pad_latent_frames(latents: torch.Tensor, patch_size_t: int) -> torch.Tensor:
    """Return ``latents`` ``[frames, channels, h, w]``, padded to whole patches of ``patch_size_t`` frames.

    The padding repeats the first frame in front, as CogVideo's own finetuning does. Sampling starts with as many
    frames of noise in front and drops their results.
    """
    missing = -len(latents) % patch_size_t
    return torch.cat([latents[:1].expand(missing, -1, -1, -1), latents]) if missing else latents


def rotary_tables(
    transformer: CogVideoXTransformer3DModel,
    latent_frames: int,
    latent_height: int,
    latent_width: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (cos, sin), each fp32 ``[tokens, head_dim]``, as ``CogVideoXPipeline`` prepares them.

    Return ``None`` for sin-cos positions (2B). 1.0 scales the grid into the native one (``crops``); 1.5 takes the
    first rows of a larger table (``slice``).
    """
    config = transformer.config
    if not config.use_rotary_positional_embeddings:
        return None
    rows, columns = latent_height // config.patch_size, latent_width // config.patch_size
    base_rows, base_columns = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    tables: tuple[torch.Tensor, torch.Tensor]
    if config.patch_size_t is None:
        tables = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid((rows, columns), base_columns, base_rows),
            grid_size=(rows, columns),
            temporal_size=latent_frames,
            device=device,
        )
        return tables
    tables = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=None,
        grid_size=(rows, columns),
        temporal_size=-(-latent_frames // config.patch_size_t),
        grid_type="slice",
        max_size=(base_rows, base_columns),
        device=device,
    )
    return tables


def read_transformer_settings(model: Path) -> TransformerSettings:
    """Return the settings in the transformer's config.json of a pipeline folder.

    Raise :class:`ConfigError` when it cannot be read or lacks ``max_text_seq_length``.
    """
    config_file = model / "transformer" / "config.json"
    try:
        return TransformerSettings.of_config(read_json_file(config_file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{config_file} has no max_text_seq_length.", "It should be a CogVideoX transformer's config.json."
        ) from error


def check_sizes(transformer: TransformerSettings, sizes: Iterable[tuple[int, int, int]]) -> None:
    """Raise :class:`ConfigError` when :func:`size_problems` finds any."""
    if problems := size_problems(transformer, sizes):
        raise ConfigError(
            "The transformer cannot take clips of these sizes (frames x height x width):\n  " + "\n  ".join(problems),
            "Give data.frames, data.height, data.width and data.buckets that fit it.",
        )


def size_problems(transformer: TransformerSettings, sizes: Iterable[tuple[int, int, int]]) -> list[str]:
    """Return one line for each of ``sizes`` (frames, height, width of clips in pixels) that the positions do not cover.

    Learned positions (5B I2V) exist for one size. diffusers refuses another height or width; for another number of
    frames it replaces them with computed positions, without a warning. 1.5 takes its positions from a table of limited
    size.
    """
    learned = transformer.use_learned_positional_embeddings
    if not learned and not transformer.patch_size_t:
        return []
    ratio = transformer.temporal_compression_ratio
    rows, columns = transformer.sample_height, transformer.sample_width
    native = ((transformer.sample_frames - 1) // ratio + 1, rows, columns)
    native_height, native_width = PIXELS_PER_LATENT * rows, PIXELS_PER_LATENT * columns
    problems = []
    for frames, height, width in sizes:
        size = f"{frames}x{height}x{width}"
        grid = ((frames - 1) // ratio + 1, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        if learned and grid != native:
            native_size = f"{transformer.sample_frames}x{native_height}x{native_width}"
            problems.append(f"{size}: the model has learned positions of {native_size} only")
        elif grid[1:] != native[1:] and (grid[1] > rows or grid[2] > columns):
            problems.append(
                f"{size}: the model's positions end at a height of {native_height} and a width of {native_width}"
            )
    return problems
