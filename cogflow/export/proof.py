"""Proof that an export is what its source was: the exported network against an evaluation straight from SAT's tensors.

Small networks are run whole. Of large ones the first and the last block are run, each with everything before and behind the
blocks, so that a 5B export is checked in seconds within the memory of one block; all blocks go through the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cogflow.errors import QualityGateError
from cogflow.export.sat_reference import LAYERNORM_EPS, MIXIN_EPS, Layout, forward, rotary
from cogflow.weights.strict_loading import check_strict_load, meta_model
from cogflow.weights.tensor_source import TensorInfo, TensorSource, WeightsFolder, read_json

TOLERANCE = 5e-5
"""Largest difference of the output that counts as equal, where the output's largest value is about 1. Both sides are in fp32;
what is left is the order of sums. Goldens reach 2e-6, a swapped pair of tensors gives 1e-2 and more."""
WHOLE = 200_000_000
"""Parameters up to which the whole network is run."""
BLOCK = "transformer_blocks."


@dataclass(frozen=True)
class Compared:
    """``layers``: which were run. ``difference``: largest, of an output whose largest value is ``absmax``; ``eps_difference``: the
    same against SAT's own epsilon of the last norm (1e-6), which diffusers' config cannot say (it has 1e-5)."""

    layers: list[int]
    difference: float
    absmax: float
    eps_difference: float


def prove_transformer(
    source: TensorSource,
    component: Path,
    heads: int,
    computed: Mapping[str, Callable[[], torch.Tensor]],
    whole: bool | None = None,
) -> dict[str, Any]:
    """Compare the exported ``component`` folder with SAT's ``source`` (names without the engine's prefix).

    ``computed``: exact values of tables that the file holds rounded and diffusers computes; how far they are apart is
    :func:`cogflow.export.mapping_plan.differences`' matter. ``whole``: run every block; ``None``: when the network is small. Raises
    :class:`QualityGateError` when they differ.
    """
    config = read_json(component / "config.json")
    weights = WeightsFolder(component)
    count = int(config["num_layers"])
    if whole is None:
        whole = sum(math.prod(info.shape) for info in weights.tensors.values()) <= WHOLE
    runs = [list(range(count))] if whole else [[layer] for layer in sorted({0, count - 1})]
    # The source as it is after the cast: what is left to differ is the layout.
    cast = _Cast(source, {info.dtype for info in weights.tensors.values()}, computed)
    compared = [_compare(cast, weights, config, heads, layers, whole) for layers in runs]
    worst = max(compared, key=lambda one: one.difference / max(1.0, one.absmax))
    result = {
        "what": "whole network" if whole else "first and last block, with all that is before and behind the blocks",
        "tolerance": TOLERANCE,
        "runs": [vars(one) for one in compared],
    }
    if not worst.difference <= TOLERANCE * max(1.0, worst.absmax):
        raise QualityGateError(
            f"The exported transformer does not compute what {_place(source)} does: outputs of up to {worst.absmax:.3g} differ by "
            f"{worst.difference:.3g} (blocks {worst.layers}).",
            "Nothing is published. Is a fact wrong that shapes do not show, such as the number of heads?",
        )
    return result


def _compare(
    cast: TensorSource, weights: WeightsFolder, config: dict[str, Any], heads: int, layers: list[int], whole: bool
) -> Compared:
    grid = _grid(config, whole)
    model = _network(weights, config, layers, grid)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    frames, height, width = grid
    latents = noise(1, frames, int(config["in_channels"]), height, width)
    text = noise(1, int(config["max_text_seq_length"]), int(config["text_embed_dim"])) * 0.3
    timesteps, ofs = torch.tensor([501]), torch.tensor([2.0]) if config.get("ofs_embed_dim") else None
    p, per_t = int(config["patch_size"]), int(config.get("patch_size_t") or 1)
    tables = None
    if config["use_rotary_positional_embeddings"]:
        tables = rotary(frames // per_t, height // p, width // p, int(config["attention_head_dim"]))
    with torch.no_grad():
        ours = model(latents, text, timesteps, ofs=ofs, image_rotary_emb=tables, return_dict=False)[0]
        layout = Layout(heads, layers, p, config.get("patch_size_t"))
        epsilons = (float(config.get("norm_eps", LAYERNORM_EPS)), MIXIN_EPS)
        theirs, own = forward(cast, layout, latents, text, timesteps, ofs, epsilons)
    return Compared(layers, _largest(ours - theirs), _largest(theirs), _largest(ours - own))


def _grid(config: Mapping[str, Any], whole: bool) -> tuple[int, int, int]:
    """Latent frames, height and width. Positions that are added are tied to the native height and width; rotated ones are not."""
    p, per_t = int(config["patch_size"]), int(config.get("patch_size_t") or 1)
    native = (int(config["sample_height"]), int(config["sample_width"]))
    frames = (int(config["sample_frames"]) - 1) // int(config.get("temporal_compression_ratio", 4)) + 1
    frames = -(-frames // per_t) * per_t
    added = config.get("use_learned_positional_embeddings") or not config["use_rotary_positional_embeddings"]
    height, width = native if added or native[0] * native[1] <= 512 else (p * 3, p * 4)
    return (frames if whole and frames * height * width <= 8192 else per_t), height, width


def _network(
    weights: WeightsFolder, config: dict[str, Any], layers: list[int], grid: tuple[int, int, int]
) -> torch.nn.Module:
    """diffusers' own network of these blocks alone, from the exported files, in fp32."""
    names = {name: name for name in weights.tensors if not name.startswith(BLOCK)}
    for place, layer in enumerate(layers):
        prefix = f"{BLOCK}{layer}."
        names |= {
            f"{BLOCK}{place}." + name.removeprefix(prefix): name for name in weights.tensors if name.startswith(prefix)
        }
    ratio = int(config.get("temporal_compression_ratio", 4))
    changed = config | {"num_layers": len(layers)}
    if config.get("patch_size_t") is None:  # 1.5 knows no added positions, and frames that its patches do not divide
        changed["sample_frames"] = (grid[0] - 1) * ratio + 1
    model = meta_model(changed, weights.folder / "config.json")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {}
    for name, stored in names.items():
        value = weights.read(stored).float()
        # A learned table is for all native frames: take those that are run.
        state[name] = value[:, : shapes[name][1]] if name == "patch_embed.pos_embedding" else value
    model.load_state_dict(state, strict=True, assign=True)
    _fill_tables(model, changed)
    return model.eval()


def _fill_tables(model: torch.nn.Module, config: dict[str, Any]) -> None:
    """Tables that the class computes and no file holds are on the meta device still: take them from a network without blocks."""
    fresh = None
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        if fresh is None:
            fresh = dict(CogVideoXTransformer3DModel.from_config(config | {"num_layers": 0}).named_buffers())
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], fresh[name])


def prove_vae(component: Path) -> dict[str, Any]:
    """Send a clip through the exported autoencoder. Raises :class:`QualityGateError` for values that are not finite."""
    check_strict_load(component, "vae")
    vae = AutoencoderKLCogVideoX.from_pretrained(
        component, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 3, 8, 8, generator=generator) * 2 - 1
    clip = torch.nn.functional.interpolate(coarse, size=(9, 64, 64), mode="trilinear", align_corners=False)
    with torch.no_grad():
        latents = vae.encode(clip).latent_dist.mode()
        back = vae.decode(latents).sample
    if not bool(back.isfinite().all()):
        raise QualityGateError(
            f"The exported autoencoder in {component} turns a plain clip into values that are not finite."
        )
    error = float((back.clamp(-1, 1) - clip).square().mean()) / 4.0
    std = float((latents * float(vae.config.scaling_factor)).std())
    return {
        "what": "round trip of a smooth clip of 9x64x64",
        "psnr_db": -10 * math.log10(max(error, 1e-12)),
        "scaled_latents_std": std,
    }


class _Cast:
    """Tensors rounded as the export rounded them, back in fp32."""

    def __init__(
        self, source: TensorSource, dtypes: set[torch.dtype], computed: Mapping[str, Callable[[], torch.Tensor]]
    ) -> None:
        self.source, self.tensors, self.computed = source, source.tensors, computed
        self.dtype = next(iter(dtypes)) if len(dtypes) == 1 else None

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        if name in self.computed:
            return self.computed[name]()
        value = self.source.read(name)
        return value if self.dtype is None else value.to(self.dtype)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def _place(source: TensorSource) -> str:
    return str(next(iter(source.tensors.values())).file)
