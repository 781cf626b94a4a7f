"""Rotary position tables for a latent grid, as ``CogVideoXPipeline`` prepares them for sampling."""

from __future__ import annotations

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid


def rotary_tables(
    transformer: CogVideoXTransformer3DModel,
    latent_frames: int,
    latent_height: int,
    latent_width: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(cos, sin), each fp32 ``[tokens, head_dim]``, or ``None`` for a model with sin-cos positions (2B).

    1.0 scales the grid into the native one (``crops``), 1.5 reads off the first rows of a larger table (``slice``).
    """
    config = transformer.config
    if not config.use_rotary_positional_embeddings:
        return None
    rows, columns = latent_height // config.patch_size, latent_width // config.patch_size
    base_rows, base_columns = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if config.patch_size_t is None:
        return get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid((rows, columns), base_columns, base_rows),
            grid_size=(rows, columns),
            temporal_size=latent_frames,
            device=device,
        )
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=None,
        grid_size=(rows, columns),
        temporal_size=-(-latent_frames // config.patch_size_t),
        grid_type="slice",
        max_size=(base_rows, base_columns),
        device=device,
    )
