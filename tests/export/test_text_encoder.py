"""Test the conversion of the T5 encoder in a training checkpoint that SAT wrote."""

from __future__ import annotations

import pytest
import torch
from golden_sets import infos, kept
from transformers import T5Config, T5EncoderModel

from cogflow.errors import ConversionError
from cogflow.export import sat_tables
from cogflow.export.export_plan import ConvertedTensors, make_plan
from cogflow.export.tensor_operations import inverse_table
from cogflow.weights.tensor_source import RenamedTensors

CONFIG = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}


@pytest.fixture
def source() -> RenamedTensors:
    found = sat_tables.split_components(kept("5b-i2v").checkpoint()).text_encoder
    assert found is not None
    return found


def settings(source: RenamedTensors) -> dict[str, object]:
    layers = {name.split(".")[2] for name in source.tensors if name.startswith("encoder.block.")}
    width = source.tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1]
    return CONFIG | {"num_layers": len(layers), "d_ff": width}


def test_the_inverse_restores_every_tensor(source: RenamedTensors) -> None:
    config = settings(source)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config))
    expected = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != sat_tables.ENCODER_EMBEDDING
    }
    table = sat_tables.text_encoder_table(config, source.tensors)
    there = ConvertedTensors(make_plan(table, source.tensors, expected), source)
    back = ConvertedTensors(make_plan(inverse_table(table), there.tensors), there)
    assert back.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        assert torch.equal(back.read(name), source.read(name)), name


@pytest.mark.parametrize("absent", [sat_tables.SHARED_EMBEDDING, sat_tables.ENCODER_EMBEDDING])
def test_an_embedding_stored_once_is_accepted(source: RenamedTensors, absent: str) -> None:
    names = {name: inner for name, inner in source.names.items() if name != absent}
    once = RenamedTensors(source.source, names)
    there = ConvertedTensors(
        make_plan(sat_tables.text_encoder_table(settings(source), once.tensors), once.tensors), once
    )
    assert torch.equal(there.read(sat_tables.SHARED_EMBEDDING), source.read(sat_tables.SHARED_EMBEDDING))


def test_two_different_embeddings_are_refused(source: RenamedTensors) -> None:
    class Altered(RenamedTensors):
        def read(self, name: str) -> torch.Tensor:
            return super().read(name) + (name == sat_tables.ENCODER_EMBEDDING)

    altered = Altered(source.source, source.names)
    there = ConvertedTensors(
        make_plan(sat_tables.text_encoder_table(settings(source), altered.tensors), altered.tensors), altered
    )
    with pytest.raises(ConversionError, match="values differ"):
        there.read(sat_tables.SHARED_EMBEDDING)


def test_a_t5_of_the_first_release_is_not_gated() -> None:
    table = sat_tables.text_encoder_table({"num_layers": 2, "feed_forward_proj": "relu"})
    names = {name for operation in table for name in operation.sources}
    assert "encoder.block.1.layer.1.DenseReluDense.wi.weight" in names
    with pytest.raises(ConversionError, match="num_layers"):
        sat_tables.text_encoder_table({})
    with pytest.raises(ConversionError, match="wi_0.weight: missing"):
        make_plan(sat_tables.text_encoder_table(CONFIG), infos(dict.fromkeys(names, (1,))))
