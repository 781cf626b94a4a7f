"""Check that an exported component computes what its source computes.

The exported transformer is compared with SAT's network, evaluated from SAT's tensors in plain torch by the second half
of this module. That reference shares no table and no class with the conversion, so that a tensor in the wrong place
shows as a difference. It is written from the description of the network in the paper (Yang et al. 2024,
arXiv:2408.06072, section 2.2) and the behaviour of ``dit_video_concat.py`` in zai-org/CogVideo. One tensor is in
memory at a time, in fp32.

Small networks run whole. Of large networks the first and the last block run, each with everything before and after the
blocks, so that a 5B export is checked in seconds within the memory of one block; all blocks are converted by the same
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch.nn import functional

from cogflow.errors import QualityGateError
from cogflow.export.diffusers_configs import DiffusersConfig
from cogflow.export.export_plan import ExportComponent
from cogflow.files.record_io import ForeignObject
from cogflow.records.export_records import ProofRecord, ProofRun
from cogflow.sharpness.psnr import psnr_of_error
from cogflow.weights.strict_loading import check_strict_load, meta_model
from cogflow.weights.tensor_source import TensorInfo, TensorSource, WeightsFolder, read_json

TOLERANCE = 5e-5
"""Largest difference of outputs that counts as equal, for outputs of magnitude 1. Both sides are in fp32 and differ
only in the order of sums: measured differences are up to 2e-6, a swapped pair of tensors gives 1e-2 and more."""

WHOLE_NETWORK_PARAMETERS = 200_000_000
"""Number of parameters up to which the whole network runs."""

_WHOLE = {"auto": None, "whole": True, "ends": False}
_BLOCK = "transformer_blocks."


def check_component(component: ExportComponent, folder: Path, verify: str) -> ProofRecord:
    """Check the exported component in ``folder``. ``verify``: off, auto, whole (run every block) or ends (first and
    last).

    Raises :class:`QualityGateError` if outputs differ from the source's, or are not finite.
    """
    if verify == "off":
        return ProofRecord("strict load only: stage.verify=off")
    if component.name == "vae":
        return check_vae_round_trip(folder)
    if component.name != "transformer" or component.plan is None or component.source is None:
        return ProofRecord("strict load; the source has the same layout")
    computed = {
        drop.source: drop.formula.make
        for drop in component.plan.drops
        if drop.formula is not None and drop.formula.exact
    }
    return compare_transformer(component.source, folder, computed, whole=_WHOLE[verify])


def compare_transformer(
    source: TensorSource,
    folder: Path,
    computed: Mapping[str, Callable[[], torch.Tensor]],
    whole: bool | None = None,
) -> ProofRecord:
    """Compare the exported transformer in ``folder`` with SAT's ``source`` (names without the engine's prefix).

    ``computed``: exact values of tables that the source stores rounded and diffusers computes;
    :func:`cogflow.export.export_plan.check_computed_tables` compares those. ``whole``: run every block, ``None``
    to decide by the network's size. Raises :class:`QualityGateError` if the outputs differ.
    """
    exported = _ExportedTransformer(WeightsFolder(folder), read_json(folder / "config.json"))
    if whole is None:
        parameters = sum(math.prod(info.shape) for info in exported.weights.tensors.values())
        whole = parameters <= WHOLE_NETWORK_PARAMETERS
    last = int(exported.config["num_layers"]) - 1
    layer_sets = [list(range(last + 1))] if whole else [[layer] for layer in sorted({0, last})]
    # The source is rounded as the export rounded it, so that only the layout can differ.
    rounded = _RoundedTensors(source, {info.dtype for info in exported.weights.tensors.values()}, computed)
    runs = [_compare_layers(rounded, exported, layers, whole) for layers in layer_sets]
    worst = max(runs, key=lambda run: run.difference / max(1.0, run.absmax))
    if not worst.difference <= TOLERANCE * max(1.0, worst.absmax):
        file = next(iter(source.tensors.values())).file
        raise QualityGateError(
            f"The exported transformer does not compute what {file} does: outputs of up to {worst.absmax:.3g} differ "
            f"by {worst.difference:.3g} (blocks {worst.layers}).",
            "Nothing is published. Check the facts that shapes do not show, such as the number of heads.",
        )
    checked = "whole network" if whole else "first and last block, with everything before and after the blocks"
    return ProofRecord(checked, tolerance=TOLERANCE, runs=runs)


@dataclass(frozen=True)
class _ExportedTransformer:
    weights: WeightsFolder
    config: DiffusersConfig


def _compare_layers(source: TensorSource, exported: _ExportedTransformer, layers: list[int], whole: bool) -> ProofRun:
    config = exported.config
    grid = _latent_grid(config, whole)
    model = _network_of_layers(exported, layers, grid)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    frames, height, width = grid
    inputs = NetworkInputs(
        latents=noise(1, frames, int(config["in_channels"]), height, width),
        text=noise(1, int(config["max_text_seq_length"]), int(config["text_embed_dim"])) * 0.3,
        timesteps=torch.tensor([501]),
        ofs=torch.tensor([2.0]) if config.get("ofs_embed_dim") else None,
    )
    patch, patch_t = int(config["patch_size"]), int(config.get("patch_size_t") or 1)
    tables = None
    if config["use_rotary_positional_embeddings"]:
        tokens = (frames // patch_t, height // patch, width // patch)
        tables = sat_rotary_tables(tokens, int(config["attention_head_dim"]))
    layout = NetworkLayout(int(config["num_attention_heads"]), layers, patch, config.get("patch_size_t"))
    epsilons = (float(config.get("norm_eps", LAYERNORM_EPS)), MIXIN_EPS)
    with torch.no_grad():
        ours = model(
            inputs.latents,
            inputs.text,
            inputs.timesteps,
            ofs=inputs.ofs,
            image_rotary_emb=tables,
            return_dict=False,
        )[0]
        expected, with_sat_eps = sat_forward(source, layout, inputs, epsilons)
    return ProofRun(layers, _absmax(ours - expected), _absmax(expected), _absmax(ours - with_sat_eps))


def _absmax(x: torch.Tensor) -> float:
    return float(x.abs().max())


def _latent_grid(config: ForeignObject, whole: bool) -> tuple[int, int, int]:
    """Return latent frames, height and width to run. Added position tables require the native height and width."""
    patch, patch_t = int(config["patch_size"]), int(config.get("patch_size_t") or 1)
    native = (int(config["sample_height"]), int(config["sample_width"]))
    frames = (int(config["sample_frames"]) - 1) // int(config.get("temporal_compression_ratio", 4)) + 1
    frames = -(-frames // patch_t) * patch_t
    adds_table = config.get("use_learned_positional_embeddings") or not config["use_rotary_positional_embeddings"]
    height, width = native if adds_table or native[0] * native[1] <= 512 else (patch * 3, patch * 4)
    return (frames if whole and frames * height * width <= 8192 else patch_t), height, width


def _network_of_layers(
    exported: _ExportedTransformer, layers: list[int], grid: tuple[int, int, int]
) -> torch.nn.Module:
    """Return diffusers' network with only these blocks, loaded from the exported files, in fp32."""
    weights = exported.weights
    names = {name: name for name in weights.tensors if not name.startswith(_BLOCK)}
    for position, layer in enumerate(layers):
        prefix = f"{_BLOCK}{layer}."
        in_layer = [name for name in weights.tensors if name.startswith(prefix)]
        names |= {f"{_BLOCK}{position}.{name.removeprefix(prefix)}": name for name in in_layer}
    config = exported.config | {"num_layers": len(layers)}
    if config.get("patch_size_t") is None:  # 1.5 adds no position table, and its patches need not divide these frames
        config["sample_frames"] = (grid[0] - 1) * int(config.get("temporal_compression_ratio", 4)) + 1
    model = meta_model(config, weights.folder / "config.json")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {}
    for name, stored in names.items():
        value = weights.read(stored).float()
        # A learned table covers all native frames; only the frames that run are needed.
        state[name] = value[:, : shapes[name][1]] if name == "patch_embed.pos_embedding" else value
    model.load_state_dict(state, strict=True, assign=True)
    _fill_computed_buffers(model, config)
    return model.eval()


def _fill_computed_buffers(model: torch.nn.Module, config: DiffusersConfig) -> None:
    """Replace buffers on the meta device, which the class computes and no file holds, by those of a network without
    blocks."""
    computed: dict[str, torch.Tensor] | None = None
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        if computed is None:
            computed = dict(CogVideoXTransformer3DModel.from_config(config | {"num_layers": 0}).named_buffers())
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, computed[name])


def check_vae_round_trip(folder: Path) -> ProofRecord:
    """Encode and decode a smooth clip with the exported VAE. Raises :class:`QualityGateError` for non-finite values."""
    check_strict_load(folder, "vae")
    vae = AutoencoderKLCogVideoX.from_pretrained(
        folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 3, 8, 8, generator=generator) * 2 - 1
    clip = torch.nn.functional.interpolate(coarse, size=(9, 64, 64), mode="trilinear", align_corners=False)
    with torch.no_grad():
        latents = vae.encode(clip).latent_dist.mode()
        decoded = vae.decode(latents).sample
    if not bool(decoded.isfinite().all()):
        raise QualityGateError(f"The exported VAE in {folder} decodes a smooth clip into values that are not finite.")
    error = float((decoded.clamp(-1, 1) - clip).square().mean()) / 4.0
    std = float((latents * float(vae.config.scaling_factor)).std())
    return ProofRecord("round trip of a smooth clip of 9x64x64", psnr_db=psnr_of_error(error), scaled_latents_std=std)


class _RoundedTensors:
    """A source whose values are rounded to the export's dtype. ``computed``: values that replace stored ones."""

    def __init__(
        self, source: TensorSource, dtypes: set[torch.dtype], computed: Mapping[str, Callable[[], torch.Tensor]]
    ) -> None:
        self.source = source
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        self.computed = computed
        self.dtype = next(iter(dtypes)) if len(dtypes) == 1 else None

    def read(self, name: str) -> torch.Tensor:
        if name in self.computed:
            return self.computed[name]()
        value = self.source.read(name)
        return value if self.dtype is None else value.to(self.dtype)


# SAT's network, the reference

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
