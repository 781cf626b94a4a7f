"""The sizes of a transformer, read from one that is built on the meta device: exact, and without a byte of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from cogflow.config.model_section import ModelConfig
from cogflow.errors import ConfigError
from cogflow.export import diffusers_configs, facts
from cogflow.export.diffusers_configs import DiffusersConfig
from cogflow.files.bounded_parsing import read_json_file
from cogflow.files.record_io import ForeignObject
from cogflow.models import tiny
from cogflow.models.transformer_inputs import TransformerSettings
from cogflow.training import initial_weights

COMPRESSION = 8
"""Pixels per latent, along height and along width."""


@dataclass(frozen=True)
class TransformerSize:
    """Sizes of one transformer; ``width`` is that of its hidden states, ``parameters`` counts elements."""

    layers: int
    heads: int
    width: int
    in_channels: int
    out_channels: int
    patch: int
    patch_t: int
    frames_per_latent: int
    text_tokens: int
    text_width: int
    time_width: int
    ofs_width: int
    parameters: int
    trained: int


@dataclass(frozen=True)
class TransformerDescription:
    """The ``config.json`` of a transformer (of diffusers), and where it is from, in words."""

    config: DiffusersConfig
    source: str

    @property
    def settings(self) -> TransformerSettings:
        """The settings that decide which inputs it takes."""
        return TransformerSettings.of_config(self.config)


@dataclass(frozen=True)
class Tokens:
    """Length of one sample's sequence: caption, then video."""

    text: int
    video: int

    @property
    def total(self) -> int:
        return self.text + self.video


def of_config(config: ForeignObject, freeze: Sequence[str] = ()) -> TransformerSize:
    """Return the shape of the transformer that a ``config.json`` of diffusers describes. Parameters that match
    ``freeze`` are not trained."""
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(dict(config))
    initial_weights.freeze(model, freeze)
    parameters = list(model.parameters())
    own = model.config
    return TransformerSize(
        layers=own.num_layers,
        heads=own.num_attention_heads,
        width=own.num_attention_heads * own.attention_head_dim,
        in_channels=own.in_channels,
        out_channels=own.out_channels,
        patch=own.patch_size,
        patch_t=own.patch_size_t or 1,
        frames_per_latent=own.temporal_compression_ratio,
        text_tokens=own.max_text_seq_length,
        text_width=own.text_embed_dim,
        time_width=own.time_embed_dim,
        ofs_width=own.ofs_embed_dim or 0,
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def of_model(model: ModelConfig, freeze: Sequence[str] = ()) -> tuple[TransformerSize, str]:
    """Return the shape of the model in ``model.path``, else of the model family, and its source. The folder need not
    exist yet."""
    described = description_of(model)
    try:
        return of_config(described.config, freeze), described.source
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{described.source} describes no CogVideoX transformer: {error}",
            "Give the folder of a diffusers pipeline.",
        ) from error


def description_of(model: ModelConfig) -> TransformerDescription:
    """Return the ``config.json`` of the transformer in ``model.path``, else of the model family."""
    folder = tiny.folder() if model.name == "tiny" and model.path is None else None
    if model.path is not None:
        folder = Path(model.path).expanduser()
    file = folder / "transformer" / "config.json" if folder else None
    if file is None or not file.is_file():
        published = diffusers_configs.transformer_config(facts.published_facts(model.name))
        return TransformerDescription(published, f"model={model.name}, at its published size")
    try:
        return TransformerDescription(dict(read_json_file(file)), str(file))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} describes no CogVideoX transformer: {error}", "Give the folder of a diffusers pipeline."
        ) from error


def tokens(shape: TransformerSize, frames: int, height: int, width: int) -> Tokens:
    """Return the tokens of a clip of ``frames`` frames of ``height`` x ``width`` pixels. A model that patches over time
    pads to whole patches."""
    latent_frames = (frames - 1) // shape.frames_per_latent + 1
    pixels = COMPRESSION * shape.patch
    return Tokens(shape.text_tokens, -(-latent_frames // shape.patch_t) * (height // pixels) * (width // pixels))
