"""Check that an exported component computes what its source computes.

The exported transformer is compared with an evaluation straight from SAT's tensors
(:mod:`cogflow.export.sat_reference`). Small networks run whole. Of large networks the first and the last block run,
each with everything before and after the blocks, so that a 5B export is checked in seconds within the memory of one
block; all blocks are converted by the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cogflow.errors import QualityGateError
from cogflow.export.diffusers_configs import DiffusersConfig
from cogflow.export.export_plan import ExportComponent
from cogflow.export.sat_reference import (
    LAYERNORM_EPS,
    MIXIN_EPS,
    NetworkInputs,
    NetworkLayout,
    sat_forward,
    sat_rotary_tables,
)
from cogflow.files.record_io import ForeignObject
from cogflow.records.export_records import ProofRecord, ProofRun
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
    return ProofRecord(
        "round trip of a smooth clip of 9x64x64", psnr_db=-10 * math.log10(max(error, 1e-12)), scaled_latents_std=std
    )


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
