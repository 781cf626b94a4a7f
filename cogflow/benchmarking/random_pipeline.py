"""Write a pipeline folder of a CogVideoX model with random values and the real names, shapes, dtypes and shards."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cogflow.artifacts.run_layout import MODEL_INDEX
from cogflow.benchmarking.random_model import pool_values
from cogflow.export import diffusers_configs
from cogflow.export.diffusers_configs import DiffusersConfig
from cogflow.export.facts import published_facts, published_vae_facts
from cogflow.files.atomic_write import write_json
from cogflow.files.publish import publish_folder
from cogflow.models import tiny
from cogflow.models.family import MODEL_SPECS
from cogflow.models.loading import DTYPES
from cogflow.runtime.progress import progress
from cogflow.weights.strict_loading import STEMS, expected_shapes, meta_model
from cogflow.weights.weights_writer import PlannedTensor, SafetensorsFormat, write_safetensors

T5_XXL: DiffusersConfig = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
    "use_cache": False,
    "is_encoder_decoder": False,
}
"""The ``config.json`` of google/t5-v1_1-xxl's encoder: 4.76e9 parameters, 19 GB in fp32."""

SMALL_VAE = {"block_out_channels": [8, 16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8}


def make_pipeline(folder: Path, family: str, layers: int | None = None) -> int:
    """Publish the folder and return its bytes: the transformer in the dtype of ``family``, T5-XXL and the VAE in fp32.

    ``layers``: number of transformer layers; T5 is shortened in proportion. Memory: a pool of values and one tensor.
    """
    member = MODEL_SPECS[family]
    facts = published_facts(family)
    count = layers or member.layers
    facts = replace(facts, layers=count)
    t5 = T5_XXL | {
        "num_layers": max(1, round(T5_XXL["num_layers"] * count / member.layers)),
        "d_model": member.text_width,
    }
    vae = published_vae_config(family)
    with publish_folder(folder, replace=True) as partly:
        _component(partly, "transformer", diffusers_configs.transformer_config(facts), DTYPES[member.dtype])
        _component(partly, "vae", vae, torch.float32)
        _component(partly, "text_encoder", t5, torch.float32)
        shutil.copytree(tiny.folder() / "tokenizer", partly / "tokenizer")
        (partly / "scheduler").mkdir()
        write_json(partly / "scheduler" / "scheduler_config.json", diffusers_configs.scheduler_config(facts))
        write_json(partly / MODEL_INDEX, diffusers_configs.model_index_config(facts))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def published_vae_config(family: str) -> DiffusersConfig:
    """Return the ``config.json`` of the VAE of ``family``; the tiny model has a small one."""
    config = diffusers_configs.vae_config(published_vae_facts(family))
    return config | (SMALL_VAE if family == "tiny" else {})


def _component(folder: Path, name: str, config: DiffusersConfig, dtype: torch.dtype) -> None:
    shapes = expected_shapes(meta_model(config, "the family's config", name))
    values = pool_values(dtype)
    outputs = [PlannedTensor(tensor, shape, dtype, partial(values, tensor, shape)) for tensor, shape in shapes.items()]
    sizes = {output.name: output.bytes(dtype) for output in outputs}
    with progress(sum(sizes.values()), name, unit="bytes") as bar:
        layout = SafetensorsFormat(folder / name, dtype, STEMS[name], "5GB")
        write_safetensors(outputs, layout, lambda statistics: bar.advance(sizes[statistics.name]))
    write_json(folder / name / "config.json", config)
