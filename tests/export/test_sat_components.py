"""Test which tensors of a SAT checkpoint belong to which component."""

from __future__ import annotations

import torch
from golden_sets import infos, kept

from cogflow.export import sat_tables
from cogflow.weights.tensor_source import TensorInfo, TensorSource


class Named:
    def __init__(self, *names: str) -> None:
        self.tensors: dict[str, TensorInfo] = infos(dict.fromkeys(names, (1,)))

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError("a split reads no values")


def split(*names: str) -> sat_tables.SatComponents:
    source: TensorSource = Named(*names)
    return sat_tables.split_components(source)


def test_a_complete_checkpoint_is_split_by_prefixes() -> None:
    found = sat_tables.split_components(kept("5b-i2v").checkpoint())
    assert found.transformer is not None and found.text_encoder is not None and found.vae is not None
    assert [len(found.transformer.tensors), len(found.text_encoder.tensors), len(found.vae.tensors)] == [56, 13, 148]
    assert found.other == []
    assert "mixins.patch_embed.proj.weight" in found.transformer.tensors
    assert "shared.weight" in found.text_encoder.tensors
    assert "encoder.conv_in.conv.weight" in found.vae.tensors


def test_tensors_of_no_component_are_listed() -> None:
    found = split(
        "model.diffusion_model.time_embed.0.weight",
        "conditioner.embedders.1.weight",
        "model_ema.decay",
        "encoder.conv_in.bias",
    )
    assert found.other == ["conditioner.embedders.1.weight", "model_ema.decay", "encoder.conv_in.bias"]
    assert found.transformer is not None and found.vae is None and found.text_encoder is None


def test_single_components_are_recognised_without_prefix() -> None:
    vae = split("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "loss.logvar")
    assert vae.vae is not None and list(vae.vae.tensors) == [
        "encoder.conv_in.conv.weight",
        "decoder.conv_in.conv.weight",
        "loss.logvar",
    ]
    assert vae.transformer is None
    bare = split(
        "mixins.patch_embed.proj.weight", "transformer.layers.0.attention.dense.weight", "ofs_embed.0.bias", "lr"
    )
    assert bare.transformer is not None and len(bare.transformer.tensors) == 3
    assert bare.other == ["lr"]
