"""Folders that SAT wrote with outputs of SAT's network: those in the repository, and those in the folder
COGFLOW_GOLDEN names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from cogflow.export import lora, sat_tables
from cogflow.weights.tensor_source import TensorInfo, TensorSource
from cogflow.weights.torch_file import TorchFile

IN_REPOSITORY = Path(__file__).resolve().parent.parent / "golden" / "sat"


@dataclass(frozen=True)
class GoldenSet:
    """One folder. ``golden``: the safetensors file of recorded tensors."""

    folder: Path
    golden: Path

    def checkpoint(self) -> TorchFile:
        step = (self.folder / "latest").read_text(encoding="utf-8").strip()
        return TorchFile(self.folder / step / "mp_rank_00_model_states.pt")

    def recorded(self) -> dict[str, torch.Tensor]:
        return load_file(self.golden)

    def transformer(self) -> TensorSource:
        """Return the transformer's tensors under SAT's names without prefix, with LoRA merged in fp32."""
        found = sat_tables.split_components(self.checkpoint()).transformer
        assert found is not None
        return lora.merge_lora(found, alpha=1.0, dtype=torch.float32) if lora.find_lora(found) else found

    def network(self) -> dict[str, Any]:
        """Return ``network_config.params`` of the model's yaml."""
        for path in sorted((self.folder / "configs").glob("*.yaml")):
            model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model")
            if model:
                return model["network_config"]["params"]
        raise AssertionError(f"{self.folder} has no yaml of a model")

    def config(self) -> dict[str, Any]:
        """Return arguments of ``CogVideoXTransformer3DModel``, built without the code under test."""
        network, tensors = self.network(), self.transformer().tensors
        place = network["modules"]["pos_embed_config"]
        patch = network["patch_size"]
        linear = not isinstance(patch, int)
        return {
            "num_attention_heads": network["num_attention_heads"],
            "attention_head_dim": network["hidden_size"] // network["num_attention_heads"],
            "in_channels": network["in_channels"],
            "out_channels": network["out_channels"],
            "time_embed_dim": network["time_embed_dim"],
            "ofs_embed_dim": network.get("ofs_embed_dim"),
            "text_embed_dim": tensors["mixins.patch_embed.text_proj.weight"].shape[1],
            "num_layers": network["num_layers"],
            "sample_width": network["latent_width"],
            "sample_height": network["latent_height"],
            "sample_frames": network["num_frames"],
            "patch_size": patch[1] if linear else patch,
            "patch_size_t": patch[0] if linear else None,
            "max_text_seq_length": place["params"]["text_length"],
            "spatial_interpolation_scale": place["params"].get("height_interpolation", 1.0),
            "use_rotary_positional_embeddings": "Rotary" in place["target"],
            "use_learned_positional_embeddings": bool(place["params"].get("learnable_pos_embed")),
            "patch_bias": not linear,
        }


def sets() -> list[GoldenSet]:
    """Return the sets in the repository, then every folder with a transformer in COGFLOW_GOLDEN."""
    found = [GoldenSet(path.parent, path) for path in sorted(IN_REPOSITORY.glob("*/forward.safetensors"))]
    more = [path.with_name("golden.safetensors") for path in _additional("*/latest")]
    return found + [GoldenSet(path.parent.resolve(), path) for path in more]


def kept(which: str) -> GoldenSet:
    """Return a set of the repository: ``2b``, ``5b-i2v`` (complete, as SAT wrote it), ``1.5-5b-i2v`` or ``5b-lora``."""
    return GoldenSet(IN_REPOSITORY / which, IN_REPOSITORY / which / "forward.safetensors")


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Return the header information of a file with tensors of these shapes."""
    return {name: TensorInfo(name, tuple(shape), torch.float32, Path("given")) for name, shape in shapes.items()}


def vae_folders() -> list[Path]:
    """Return the folders with a VAE and SAT's outputs: that of the repository, and those in COGFLOW_GOLDEN."""
    return [IN_REPOSITORY.parent / "sat-vae"] + [path.parent.parent for path in _additional("*/vae/3d-vae.pt")]


def complete_folders() -> list[Path]:
    """Return the folders whose checkpoint holds transformer, text encoder and VAE."""
    return [IN_REPOSITORY / "5b-i2v"] + [path.parent for path in _additional("*/latest")]


def _additional(pattern: str) -> list[Path]:
    folder = os.environ.get("COGFLOW_GOLDEN")
    return sorted(Path(folder).glob(pattern)) if folder else []


def set_name(golden: GoldenSet) -> str:
    return golden.folder.name
