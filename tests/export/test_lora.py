"""Test SAT's LoRA: merging, removing, and writing a file for diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from golden_sets import kept
from safetensors.torch import save_file

from cogflow.errors import ConversionError
from cogflow.export import lora, sat_tables
from cogflow.export.export_plan import ConvertedTensors, make_plan
from cogflow.models.tiny import new_vae
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.weights.tensor_source import RenamedTensors

QKV = "transformer.layers.1.attention.query_key_value"


@pytest.fixture
def source() -> RenamedTensors:
    found = sat_tables.split_components(kept("5b-lora").checkpoint()).transformer
    assert found is not None
    return found


def without(source: RenamedTensors, *names: str) -> RenamedTensors:
    return RenamedTensors(source.source, {name: inner for name, inner in source.names.items() if name not in names})


def test_find_lora_returns_rank_and_adapted_layers(source: RenamedTensors) -> None:
    facts = lora.find_lora(source)
    assert facts is not None and facts.rank == 8
    assert facts.layers == {
        f"transformer.layers.{layer}.attention.{inner}": count
        for layer in range(2)
        for inner, count in (("query_key_value", 3), ("dense", 1))
    }
    assert lora.find_lora(lora.merge_lora(source, alpha=1.0)) is None


@pytest.mark.parametrize("alpha", [1.0, 12.0])
def test_merging_adds_each_part_to_its_rows(source: RenamedTensors, alpha: float) -> None:
    merged = lora.merge_lora(source, alpha, rank=8, dtype=torch.float32)
    weight, change = merged.read(f"{QKV}.weight"), torch.empty(192, 64)
    for part in range(3):
        a, b = (source.read(f"{QKV}.matrix_{side}.{part}").double() for side in "AB")
        change[64 * part : 64 * (part + 1)] = (b @ a) * alpha / 8
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(weight, source.read(f"{QKV}.original.weight").float() + change, atol=1e-6, rtol=0)
    assert merged.tensors[f"{QKV}.weight"].dtype == torch.float32
    assert torch.equal(merged.read(f"{QKV}.bias"), source.read(f"{QKV}.original.bias"))


def test_merging_in_the_stored_dtype_rounds_once(source: RenamedTensors) -> None:
    kept, exact = lora.merge_lora(source, 1.0), lora.merge_lora(source, 1.0, dtype=torch.float32)
    assert kept.tensors[f"{QKV}.weight"].dtype == torch.bfloat16
    assert torch.equal(kept.read(f"{QKV}.weight"), exact.read(f"{QKV}.weight").bfloat16())


def test_merging_does_not_change_the_source(source: RenamedTensors) -> None:
    before = source.read(f"{QKV}.original.weight").clone()
    lora.merge_lora(source, 100.0).read(f"{QKV}.weight")
    assert torch.equal(source.read(f"{QKV}.original.weight"), before)
    assert torch.equal(lora.without_lora(source).read(f"{QKV}.weight"), before)


def test_the_lora_file_adds_the_same_change_as_merging(source: RenamedTensors) -> None:
    table = sat_tables.transformer_table(kept("5b-lora").config())
    file = lora.to_diffusers_lora(source, table, alpha=4.0)
    made, header = file.tensors, file.metadata
    assert header["lora_alpha"] == "4.0" and header["lora_rank"] == "8"
    assert len(made) == 2 * 2 * 4
    before, merged = lora.without_lora(source), lora.merge_lora(source, alpha=4.0, dtype=torch.float32)
    weights = [ConvertedTensors(make_plan(table, which.tensors), which) for which in (before, merged)]
    for name in (
        f"transformer_blocks.{layer}.attn1.{part}"
        for layer in range(2)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ):
        a, b = (made[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        was, now = (which.read(f"{name}.weight").float() for which in weights)
        torch.testing.assert_close(was + b.float() @ a.float(), now, atol=1e-6, rtol=0)
        assert a.is_contiguous() and b.is_contiguous() and a.shape == (8, 64) and b.shape == (64, 8)


def test_diffusers_recognises_the_names_of_the_lora_file(source: RenamedTensors) -> None:
    from diffusers.loaders import CogVideoXLoraLoaderMixin

    config = kept("5b-lora").config()
    made = lora.to_diffusers_lora(source, sat_tables.transformer_table(config), alpha=1.0).tensors
    assert CogVideoXLoraLoaderMixin.lora_state_dict(dict(made)).keys() == made.keys()
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(config)
    for name in made:
        assert isinstance(model.get_submodule(name.removeprefix("transformer.").split(".lora_")[0]), torch.nn.Linear)


def test_a_pipeline_with_the_lora_file_equals_merged_weights(source: RenamedTensors, tmp_path: Path) -> None:
    config = kept("5b-lora").config()
    table = sat_tables.transformer_table(config)
    file = lora.to_diffusers_lora(source, table, alpha=4.0)
    made, header = file.tensors, file.metadata
    save_file(made, tmp_path / "pytorch_lora_weights.safetensors", metadata=header)
    models = []
    for weights in (lora.without_lora(source), lora.merge_lora(source, alpha=4.0, dtype=torch.float32)):
        converted = ConvertedTensors(make_plan(table, weights.tensors), weights)
        model = CogVideoXTransformer3DModel.from_config(config).eval()
        model.load_state_dict({name: converted.read(name).float() for name in converted.tensors}, strict=True)
        models.append(model)
    adapted, merged = models
    pipeline = CogVideoXPipeline(None, None, new_vae(), adapted, CogVideoXDDIMScheduler())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 3, 16, 8, 12, generator=generator)
    text = torch.randn(1, config["max_text_seq_length"], config["text_embed_dim"], generator=generator)
    rotary = rotary_tables(merged, 3, 8, 12, torch.device("cpu"))

    def forward(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(latents, text, torch.tensor([500]), image_rotary_emb=rotary, return_dict=False)[0]

    expected, before = forward(merged), forward(adapted)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(forward(pipeline.transformer), expected, atol=5e-6, rtol=0)
    assert (before - expected).abs().max() > 1e-3


def test_all_incomplete_adapters_are_listed(source: RenamedTensors) -> None:
    broken = without(source, f"{QKV}.matrix_B.1", "transformer.layers.0.attention.dense.original.weight")
    with pytest.raises(ConversionError) as caught:
        lora.find_lora(broken)
    assert f"{QKV}: not a pair" in caught.value.message
    assert "layers.0.attention.dense: adapters without the weight" in caught.value.message


def test_another_rank_and_weights_without_lora_are_refused(source: RenamedTensors) -> None:
    with pytest.raises(ConversionError, match=r"rank is 8 .* 128 by its yaml"):
        lora.merge_lora(source, 1.0, rank=128)
    with pytest.raises(ConversionError, match="no LoRA"):
        lora.merge_lora(lora.without_lora(source), 1.0)


def test_an_adapter_without_counterpart_is_refused(source: RenamedTensors) -> None:
    table = [
        operation
        for operation in sat_tables.transformer_table(kept("5b-lora").config())
        if f"{QKV}.weight" not in operation.sources
    ]
    with pytest.raises(ConversionError, match=f"{QKV}: 3 adapters for 0"):
        lora.to_diffusers_lora(source, table, 1.0)
