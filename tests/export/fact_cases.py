"""Inputs of the tests of facts and configs: SAT's own folders, and names and shapes of the published models."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cogflow.export import sat_tables
from cogflow.export.facts import TransformerFacts, resolve_facts
from cogflow.export.facts_from_yaml import read_yamls
from cogflow.models.family import ModelSpec
from cogflow.weights.tensor_source import TensorInfo
from cogflow.weights.torch_file import TorchFile

IN_REPOSITORY = Path(__file__).resolve().parent.parent / "golden" / "sat"
EVERY = ("2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v", "5b-lora")


def yamls(name: str, which: str = "all") -> list[tuple[Path, dict[str, Any]]]:
    """Return copies of a folder's yaml files: ``model`` (per-model and sft), ``merged`` (training_config.yaml) or
    all."""
    paths = sorted((IN_REPOSITORY / name / "configs").glob("*.yaml")) if which != "merged" else []
    paths += [IN_REPOSITORY / name / "training_config.yaml"] if which != "model" else []
    return [(path, copy.deepcopy(dict(data))) for path, data in read_yamls(paths)]


@cache
def components(folder: Path) -> sat_tables.SatComponents:
    """Return the components of the checkpoint in a folder that SAT wrote."""
    step = (folder / "latest").read_text(encoding="utf-8").strip()
    return sat_tables.split_components(TorchFile(folder / step / "mp_rank_00_model_states.pt"))


def infos(name: str) -> dict[str, TensorInfo]:
    """Return the transformer's tensors, for ``5b-lora`` with unmerged LoRA."""
    found = components(IN_REPOSITORY / ("1.5-5b-i2v" if name == "1.5-5b" else name)).transformer
    assert found is not None
    if name != "1.5-5b":
        return dict(found.tensors)
    # The repository has only the image-to-video checkpoint of 1.5: text to video has half the input channels and no
    # ofs.
    kept = {key: info for key, info in found.tensors.items() if not key.startswith("ofs_embed.")}
    return kept | shaped([("mixins.patch_embed.proj.weight", (64, 128))])


def facts(name: str, **changes: Any) -> TransformerFacts:
    return resolve_facts(infos(name), yamls(name), **changes)


def network(data: dict[str, Any]) -> dict[str, Any]:
    return data["model"]["network_config"]["params"]


def schedules(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the three copies of the noise schedule in a yaml."""
    model = data["model"]
    return [
        model["denoiser_config"]["params"]["discretization_config"],
        model["loss_fn_config"]["params"]["sigma_sampler_config"]["params"]["discretization_config"],
        model["sampler_config"]["params"]["discretization_config"],
    ]


def shaped(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, dtype, Path("mp_rank_00_model_states.pt")) for name, shape in shapes}


def published(member: ModelSpec, time_embed_dim: int = 512) -> dict[str, TensorInfo]:
    """Return SAT's names and shapes of a member at its full size, without tensors that show no fact (MLP, biases)."""
    width, patch, area = (
        member.heads * member.head_dim,
        member.patch_size,
        member.patch_size**2 * (member.patch_size_t or 1),
    )
    rows, columns, frames = member.height // 8 // patch, member.width // 8 // patch, (member.frames - 1) // 4 + 1
    embed = (member.in_channels * area,) if member.patch_size_t else (member.in_channels, patch, patch)
    found: list[tuple[str, tuple[int, ...]]] = [
        ("mixins.patch_embed.proj.weight", (width, *embed)),
        ("mixins.patch_embed.text_proj.weight", (width, member.text_width)),
        ("mixins.final_layer.linear.weight", (member.latent_channels * area, width)),
        ("time_embed.2.weight", (time_embed_dim, time_embed_dim)),
    ]
    if member.ofs_embed_dim:
        found.append(("ofs_embed.0.weight", (member.ofs_embed_dim, member.ofs_embed_dim)))
    if member.rotary:
        found.append(("transformer.position_embeddings.weight", (64, width)))
        if member.patch_size_t is None:
            found += [
                (f"mixins.pos_embed.freqs_{part}", (frames * rows * columns, member.head_dim))
                for part in ("sin", "cos")
            ]
    if member.learned_positions or not member.rotary:
        found.append(("mixins.pos_embed.pos_embedding", (1, member.text_tokens + frames * rows * columns, width)))
    for layer in range(member.layers):
        found.append((f"transformer.layers.{layer}.attention.query_key_value.weight", (3 * width, width)))
        found.append((f"mixins.adaln_layer.adaLN_modulations.{layer}.1.weight", (12 * width, time_embed_dim)))
        found.append((f"mixins.adaln_layer.query_layernorm_list.{layer}.weight", (member.head_dim,)))
    return shaped(found)
