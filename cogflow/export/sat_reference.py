"""SAT's network, evaluated from SAT's tensors in plain torch: the reference that an export is compared with.

It shares no table and no class with the conversion, so that a tensor in the wrong place shows as a difference.
Written from the description of the network in the paper (Yang et al. 2024, arXiv:2408.06072, section 2.2) and the
behaviour of ``dit_video_concat.py`` in zai-org/CogVideo. One tensor is in memory at a time, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from cogflow.weights.tensor_source import TensorSource

LAYERNORM_EPS = 1e-5
"""Epsilon of the layer norms of SAT's transformer."""

MIXIN_EPS = 1e-6
"""Epsilon of the norms of queries and keys, and of the last norm."""


@dataclass(frozen=True)
class NetworkLayout:
    """Settings of the network that tensors do not show. ``layers``: numbers of the layers to run, in order."""

    heads: int
    layers: Sequence[int]
    patch_size: int = 2
    patch_size_t: int | None = None


@dataclass(frozen=True)
class NetworkInputs:
    """Inputs of one forward.

    ``latents``: ``[batch, frames, in_channels, h, w]``; ``text``: embeddings ``[batch, tokens, width]``;
    ``timesteps``: ``[batch]``; ``ofs``: ``[batch]``, only for models with that embedding.
    """

    latents: torch.Tensor
    text: torch.Tensor
    timesteps: torch.Tensor
    ofs: torch.Tensor | None = None


def sat_forward(
    weights: TensorSource, layout: NetworkLayout, inputs: NetworkInputs, last_eps: Sequence[float] = (MIXIN_EPS,)
) -> list[torch.Tensor]:
    """Return the velocity, fp32 ``[batch, frames, out_channels, h, w]``, for each epsilon of the last norm in
    ``last_eps``.

    The blocks, which take the time, run once for all epsilons.
    """
    network = _Network(weights, layout)
    _, frames, _, height, width = inputs.latents.shape
    patch_t = layout.patch_size_t or 1
    grid = (frames // patch_t, height // layout.patch_size, width // layout.patch_size)
    video = network.patches(inputs.latents.float(), grid)
    text = network.linear("mixins.patch_embed.text_proj", inputs.text.float())
    text_tokens = text.shape[1]
    hidden = torch.cat([text, video], dim=1)
    if network.has("mixins.pos_embed.pos_embedding"):
        hidden = hidden + network.get("mixins.pos_embed.pos_embedding")[:, : hidden.shape[1]]
    emb = network.time_embedding(inputs.timesteps, inputs.ofs)
    tables = None if network.is_sincos else sat_rotary_tables(grid, hidden.shape[-1] // layout.heads)
    for layer in layout.layers:
        hidden = network.layer(layer, hidden, text_tokens, emb, tables)
    normed = network.norm("transformer.final_layernorm", hidden, LAYERNORM_EPS)[:, text_tokens:]
    return [network.velocity(normed, emb, grid, eps) for eps in last_eps]


def sat_rotary_tables(grid: tuple[int, int, int], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin), each fp32 ``[tokens, head_dim]``, for a grid of (frames, rows, columns) that starts at the
    origin."""

    def angles(count: int, dim: int) -> torch.Tensor:
        speeds = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return (torch.arange(count, dtype=torch.float32)[:, None] * speeds).repeat_interleave(2, dim=1)

    frames, rows, columns = grid
    for_time, for_space = head_dim // 4, head_dim * 3 // 8
    parts = [
        angles(frames, for_time)[:, None, None].expand(*grid, -1),
        angles(rows, for_space)[None, :, None].expand(*grid, -1),
        angles(columns, for_space)[None, None].expand(*grid, -1),
    ]
    table = torch.cat(parts, dim=-1).reshape(-1, head_dim)
    return table.cos(), table.sin()


class _Network:
    def __init__(self, weights: TensorSource, layout: NetworkLayout) -> None:
        self.weights = weights
        self.layout = layout
        # The sin-cos model stores its position table. All others rotate, some with a learned table in addition.
        is_rotary = self.has("transformer.position_embeddings.weight")
        self.is_sincos = self.has("mixins.pos_embed.pos_embedding") and not is_rotary

    def has(self, name: str) -> bool:
        return name in self.weights.tensors

    def get(self, name: str) -> torch.Tensor:
        return self.weights.read(name).float()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.layer_norm(x, (x.shape[-1],), self.get(f"{name}.weight"), self.get(f"{name}.bias"), eps)

    def patches(self, latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Return the embedded patches ``[batch, tokens, width]``."""
        batch, _, channels = latents.shape[:3]
        t, h, w = grid
        p, o = self.layout.patch_size, self.layout.patch_size_t or 1
        cells = latents.reshape(batch, t, o, channels, h, p, w, p).permute(0, 1, 4, 6, 3, 2, 5, 7)
        flat = cells.reshape(batch, t * h * w, channels * o * p * p)
        weight = self.get("mixins.patch_embed.proj.weight")
        return functional.linear(flat, weight.reshape(weight.shape[0], -1), self.get("mixins.patch_embed.proj.bias"))

    def time_embedding(self, timesteps: torch.Tensor, ofs: torch.Tensor | None) -> torch.Tensor:
        emb = self._wave_embedding("time_embed", timesteps)
        if self.has("ofs_embed.0.weight") and ofs is not None:
            emb = emb + self._wave_embedding("ofs_embed", ofs)
        return emb

    def _wave_embedding(self, name: str, values: torch.Tensor) -> torch.Tensor:
        width = self.weights.tensors[f"{name}.0.weight"].shape[1]
        speeds = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
        angles = values.float()[:, None] * speeds
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear(f"{name}.2", functional.silu(self.linear(f"{name}.0", waves)))

    def layer(
        self,
        i: int,
        hidden: torch.Tensor,
        text_tokens: int,
        emb: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Run one block. ``hidden``: text then video tokens, ``[batch, tokens, width]``."""
        name = f"transformer.layers.{i}"
        chunks = self.linear(f"mixins.adaln_layer.adaLN_modulations.{i}.1", functional.silu(emb))[:, None].chunk(
            12, dim=-1
        )
        video, text = chunks[:6], chunks[6:]

        def modulation(index: int) -> torch.Tensor:
            """Return modulation ``index`` of every token: one value for text tokens, another for video tokens."""
            return torch.cat(
                [
                    text[index].expand(-1, text_tokens, -1),
                    video[index].expand(-1, hidden.shape[1] - text_tokens, -1),
                ],
                dim=1,
            )

        x = self.norm(f"{name}.input_layernorm", hidden, LAYERNORM_EPS) * (1 + modulation(1)) + modulation(0)
        hidden = hidden + modulation(2) * self._attention(i, x, text_tokens, tables)
        x = self.norm(f"{name}.post_attention_layernorm", hidden, LAYERNORM_EPS) * (1 + modulation(4)) + modulation(3)
        x = functional.gelu(self.linear(f"{name}.mlp.dense_h_to_4h", x), approximate="tanh")
        return hidden + modulation(5) * self.linear(f"{name}.mlp.dense_4h_to_h", x)

    def _attention(
        self, i: int, x: torch.Tensor, text_tokens: int, tables: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = self.layout.heads
        name = f"transformer.layers.{i}.attention"
        q, k, v = (
            part.reshape(batch, tokens, heads, width // heads).transpose(1, 2)
            for part in self.linear(f"{name}.query_key_value", x).chunk(3, dim=-1)
        )
        q = self.norm(f"mixins.adaln_layer.query_layernorm_list.{i}", q, MIXIN_EPS)
        k = self.norm(f"mixins.adaln_layer.key_layernorm_list.{i}", k, MIXIN_EPS)
        if tables is not None:
            q, k = (
                torch.cat([part[:, :, :text_tokens], _rotate(part[:, :, text_tokens:], *tables)], dim=2)
                for part in (q, k)
            )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.linear(f"{name}.dense", mixed)

    def velocity(self, video: torch.Tensor, emb: torch.Tensor, grid: tuple[int, int, int], eps: float) -> torch.Tensor:
        """Return the output for video tokens ``[batch, tokens, width]`` after the final layer norm."""
        shift, scale = self.linear("mixins.final_layer.adaLN_modulation.1", functional.silu(emb))[:, None].chunk(
            2, dim=-1
        )
        video = self.norm("mixins.final_layer.norm_final", video, eps) * (1 + scale) + shift
        flat = self.linear("mixins.final_layer.linear", video)
        t, h, w = grid
        p, o = self.layout.patch_size, self.layout.patch_size_t or 1
        cells = flat.reshape(len(flat), t, h, w, -1, o, p, p).permute(0, 1, 5, 4, 2, 6, 3, 7)
        return cells.reshape(len(flat), t * o, -1, h * p, w * p)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of the last axis by their angles (Su et al. 2021, arXiv:2104.09864)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin
