"""Pipeline folders of the tiny size with traits of other models: image to video, patches over time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from cogflow.models import tiny

TRAITS: dict[str, dict[str, Any]] = {
    "5b-i2v": {"in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5": {"patch_size_t": 2, "patch_bias": False},
    "1.5-i2v": {"in_channels": 32, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 64},
}


def pipeline(folder: Path, kind: str) -> Path:
    """Return a copy of the tiny pipeline with a random transformer that has the traits of ``kind``."""
    shutil.copytree(tiny.folder(), folder, ignore=shutil.ignore_patterns("transformer", "manifest.json"))
    torch.manual_seed(0)
    config = {key: value for key, value in tiny.new_transformer().config.items() if not key.startswith("_")}
    if kind.endswith("i2v"):
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "CogVideoXImageToVideoPipeline"}))
    if kind == "1.5-i2v":
        vae = folder / "vae/config.json"
        vae.write_text(json.dumps(json.loads(vae.read_text()) | {"invert_scale_latents": True}))
    CogVideoXTransformer3DModel(**(config | TRAITS[kind])).save_pretrained(folder / "transformer")
    return folder
