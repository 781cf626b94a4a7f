"""SAT's network evaluated straight from SAT's tensors, in plain torch: what an export is compared with.

It shares no table and no class with the conversion, so a tensor that the conversion put in the wrong place shows as a
difference. Written after the description of the network in the paper (Yang et al. 2024, arXiv:2408.06072, section 2.2) and the
behaviour of ``dit_video_concat.py`` in zai-org/CogVideo. One tensor is in memory at a time, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cogflow.weights.tensor_source import TensorSource

LAYERNORM_EPS = 1e-5  # of SAT's transformer
MIXIN_EPS = 1e-6  # of the norms of queries and keys, and of the last one


@dataclass(frozen=True)
class Layout:
    """What tensors alone do not tell of the network. ``layers``: which of them to run, in order; the others are skipped."""

    heads: int
    layers: Sequence[int]
    patch_size: int = 2
    patch_size_t: int | None = None


def rotary(frames: int, height: int, width: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each fp32 ``[frames * height * width, head_dim]``, for a grid of tokens that starts at the origin."""

    def angles(count: int, dim: int) -> torch.Tensor:
        speeds = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return (torch.arange(count, dtype=torch.float32)[:, None] * speeds).repeat_interleave(2, dim=1)

    along_t, across = head_dim // 4, head_dim * 3 // 8
    grid = (frames, height, width)
    parts = [
        angles(frames, along_t)[:, None, None].expand(*grid, -1),
        angles(height, across)[None, :, None].expand(*grid, -1),
        angles(width, across)[None, None].expand(*grid, -1),
    ]
    table = torch.cat(parts, dim=-1).reshape(-1, head_dim)
    return table.cos(), table.sin()


def forward(
    weights: TensorSource,
    layout: Layout,
    latents: torch.Tensor,
    text: torch.Tensor,
    timesteps: torch.Tensor,
    ofs: torch.Tensor | None = None,
    last_eps: Sequence[float] = (MIXIN_EPS,),
) -> list[torch.Tensor]:
    """Velocity ``[batch, frames, out_channels, h, w]`` for ``latents`` ``[batch, frames, in_channels, h, w]``, in fp32.

    ``text``: embeddings ``[batch, tokens, width]``; ``timesteps``: ``[batch]``; ``ofs``: ``[batch]`` where the model has it. One
    result for each epsilon of the last norm in ``last_eps``: the blocks, which cost the time, run once.
    """
    network = _Network(weights, layout)
    batch, frames, _, height, width = latents.shape
    per_t, p = layout.patch_size_t or 1, layout.patch_size
    grid = (frames // per_t, height // p, width // p)
    video = network.patches(latents.float(), grid)
    words = network.linear("mixins.patch_embed.text_proj", text.float())
    hidden = torch.cat([words, video], dim=1)
    if network.has("mixins.pos_embed.pos_embedding"):
        hidden = hidden + network.get("mixins.pos_embed.pos_embedding")[:, : hidden.shape[1]]
    emb = network.embedded(timesteps, ofs)
    count = words.shape[1]
    tables = None if network.sincos else rotary(*grid, hidden.shape[-1] // layout.heads)
    for layer in layout.layers:
        hidden = network.layer(layer, hidden, count, emb, tables)
    return [network.velocity(hidden, count, emb, grid, eps) for eps in last_eps]


class _Network:
    def __init__(self, weights: TensorSource, layout: Layout) -> None:
        self.weights, self.layout = weights, layout
        # The sin-cos model keeps its table of positions; all others rotate, with or without a learned table beside.
        learned = self.has("transformer.position_embeddings.weight")
        self.sincos = self.has("mixins.pos_embed.pos_embedding") and not learned

    def has(self, name: str) -> bool:
        return name in self.weights.tensors

    def get(self, name: str) -> torch.Tensor:
        return self.weights.read(name).float()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.get(f"{name}.weight"), self.get(f"{name}.bias"), eps)

    def patches(self, latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        batch, _, channels = latents.shape[:3]
        t, h, w = grid
        p, o = self.layout.patch_size, self.layout.patch_size_t or 1
        cells = latents.reshape(batch, t, o, channels, h, p, w, p).permute(0, 1, 4, 6, 3, 2, 5, 7)
        flat = cells.reshape(batch, t * h * w, channels * o * p * p)
        weight = self.get("mixins.patch_embed.proj.weight")
        return F.linear(flat, weight.reshape(weight.shape[0], -1), self.get("mixins.patch_embed.proj.bias"))

    def embedded(self, timesteps: torch.Tensor, ofs: torch.Tensor | None) -> torch.Tensor:
        emb = self._embed("time_embed", timesteps)
        return emb + self._embed("ofs_embed", ofs) if self.has("ofs_embed.0.weight") and ofs is not None else emb

    def _embed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        width = self.weights.tensors[f"{name}.0.weight"].shape[1]
        speeds = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
        angles = values.float()[:, None] * speeds
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear(f"{name}.2", F.silu(self.linear(f"{name}.0", waves)))

    def layer(
        self,
        i: int,
        hidden: torch.Tensor,
        count: int,
        emb: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """One block. ``hidden``: text then video tokens, ``[batch, tokens, width]``; ``count``: text tokens."""
        name = f"transformer.layers.{i}"
        parts = self.linear(f"mixins.adaln_layer.adaLN_modulations.{i}.1", F.silu(emb))[:, None].chunk(12, dim=-1)
        video, text = parts[:6], parts[6:]

        def each(index: int) -> torch.Tensor:
            """Modulation ``index`` of every token: one value for the text, one for the video."""
            return torch.cat(
                [text[index].expand(-1, count, -1), video[index].expand(-1, hidden.shape[1] - count, -1)],
                dim=1,
            )

        x = self.norm(f"{name}.input_layernorm", hidden, LAYERNORM_EPS) * (1 + each(1)) + each(0)
        hidden = hidden + each(2) * self._attention(i, x, count, tables)
        x = self.norm(f"{name}.post_attention_layernorm", hidden, LAYERNORM_EPS) * (1 + each(4)) + each(3)
        x = F.gelu(self.linear(f"{name}.mlp.dense_h_to_4h", x), approximate="tanh")
        return hidden + each(5) * self.linear(f"{name}.mlp.dense_4h_to_h", x)

    def _attention(
        self, i: int, x: torch.Tensor, count: int, tables: tuple[torch.Tensor, torch.Tensor] | None
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
            q, k = (torch.cat([part[:, :, :count], rotated(part[:, :, count:], *tables)], dim=2) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.linear(f"{name}.dense", mixed)

    def velocity(
        self, hidden: torch.Tensor, count: int, emb: torch.Tensor, grid: tuple[int, int, int], eps: float
    ) -> torch.Tensor:
        video = self.norm("transformer.final_layernorm", hidden, LAYERNORM_EPS)[:, count:]
        shift, scale = self.linear("mixins.final_layer.adaLN_modulation.1", F.silu(emb))[:, None].chunk(2, dim=-1)
        video = self.norm("mixins.final_layer.norm_final", video, eps) * (1 + scale) + shift
        flat = self.linear("mixins.final_layer.linear", video)
        t, h, w = grid
        p, o = self.layout.patch_size, self.layout.patch_size_t or 1
        cells = flat.reshape(len(flat), t, h, w, -1, o, p, p).permute(0, 1, 5, 4, 2, 6, 3, 7)
        return cells.reshape(len(flat), t * o, -1, h * p, w * p)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of the last axis turned by their angle (Su et al. 2021, arXiv:2104.09864)."""
    one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-other, one], dim=-1).flatten(-2) * sin
