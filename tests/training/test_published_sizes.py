"""Test every published model with every way of sharding at its real size, on the meta device, in seconds.

A wrong width, position or setting, which would fail on a cluster, fails here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogflow.config.compose import compose
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.export import diffusers_configs, facts
from cogflow.models.loading import DTYPES
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.training import deepspeed_start

MODELS = {
    # parameters of the published checkpoint, dtype of training, tokens of a clip of the native size
    "cogvideox-2b": (1_693_783_872, "fp16", 17_776),
    "cogvideox-5b": (5_570_283_072, "bf16", 17_776),
    "cogvideox-5b-i2v": (5_570_479_680, "bf16", 17_776),
    "cogvideox1.5-5b": (5_570_676_352, "bf16", 45_104),
    "cogvideox1.5-5b-i2v": (5_571_594_880, "bf16", 45_104),
}
SHARING = ("zero2", "zero2_offload", "zero3", "zero3_offload")


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(
            diffusers_configs.transformer_config(facts.published_facts(name))
        )


def composed(model: str, sharing: str) -> Config:
    places = ["model.path=/nowhere/yet", "data=folder", "data.path=/nowhere/yet"]
    return compose(
        ["stage=train", f"model={model}", f"model.dtype={MODELS[model][1]}", f"deepspeed={sharing}", *places]
    )


@pytest.mark.parametrize("model", MODELS)
def test_shapes_of_a_real_clip_fit_every_published_model(model: str) -> None:
    """With latents and captions of the configured size, shapes fit from the first layer to the last."""
    parameters, dtype, total = MODELS[model]
    config, transformer = composed(model, "zero2"), on_meta(model).to(DTYPES[dtype])
    own, data = transformer.config, config.data
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters
    frames = (data.frames - 1) // own.temporal_compression_ratio + 1
    frames += -frames % (own.patch_size_t or 1)
    rows, columns = data.height // 8, data.width // 8
    seen: list[int] = []
    transformer.transformer_blocks[-1].register_forward_hook(
        lambda _, __, made: seen.append(made[0].shape[1] + made[1].shape[1])
    )
    meta: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    predicted = transformer(
        hidden_states=torch.empty(1, frames, own.in_channels, rows, columns, **meta),
        encoder_hidden_states=torch.empty(1, own.max_text_seq_length, own.text_embed_dim, **meta),
        timestep=torch.empty(1, dtype=torch.int64, device="meta"),
        image_rotary_emb=rotary_tables(transformer, frames, rows, columns, torch.device("meta")),
        ofs=torch.empty(1, **meta) if own.ofs_embed_dim else None,
        return_dict=False,
    )[0]
    assert predicted.shape == (1, frames, own.out_channels, rows, columns) and predicted.dtype == DTYPES[dtype]
    assert seen == [total]


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("model", MODELS)
def test_deepspeed_parses_the_settings(model: str, sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setattr(deepspeed_start.ranks, "world_size", lambda: 2)  # type: ignore[attr-defined]  # one rank sums nothing
    config = composed(model, sharing)
    assert isinstance(config.stage, TrainStage)
    dtype = MODELS[model][1]
    given = deepspeed_start.settings(config.deepspeed, config.stage, DTYPES[dtype])
    read = DeepSpeedConfig(given | {"train_batch_size": config.stage.batch_size * config.stage.gradient_accumulation})
    zero = read.zero_config
    assert int(zero.stage) == int(sharing[4])
    assert (zero.offload_optimizer is not None, zero.offload_param is not None) == (
        "offload" in sharing,
        sharing == "zero3_offload",
    )
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (dtype == "bf16", dtype == "fp16")
    assert read.gradient_clipping == config.stage.gradient_clipping == 0.1
    assert read.train_micro_batch_size_per_gpu == config.stage.batch_size
    assert read.communication_data_type == torch.float32
    assert zero.reduce_bucket_size == config.deepspeed.reduce_bucket_size
