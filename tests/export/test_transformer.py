"""Test the conversion of SAT's transformers: outputs equal SAT's, and the inverse restores the checkpoint."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from golden_sets import GoldenSet, kept, set_name, sets

from cogflow.errors import ConversionError
from cogflow.export import sat_tables
from cogflow.export.export_plan import ConvertedTensors, computed_table_differences, make_plan, unrestored_tensors
from cogflow.export.tensor_operations import TokenGrid, inverse_table, sincos_table
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.weights.tensor_source import TensorSource

UNUSED = "transformer.position_embeddings.weight"
every_set = pytest.mark.parametrize("golden", sets(), ids=set_name)


@cache
def converted(golden: GoldenSet) -> tuple[TensorSource, ConvertedTensors, dict[str, Any]]:
    """Return the source, its conversion and the model's config."""
    config, source = golden.config(), golden.transformer()
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return (
        source,
        ConvertedTensors(make_plan(sat_tables.transformer_table(config), source.tensors, expected), source),
        config,
    )


def output(model: CogVideoXTransformer3DModel, recorded: dict[str, torch.Tensor], which: str) -> torch.Tensor:
    latents = recorded[f"{which}.latents"]
    if f"{which}.concat_latents" in recorded:
        latents = torch.cat([latents, recorded[f"{which}.concat_latents"]], dim=2)
    with torch.no_grad():
        return model(
            hidden_states=latents,
            encoder_hidden_states=recorded["forward.text_embeds"],
            timestep=recorded["forward.timesteps"],
            ofs=recorded.get("forward.ofs"),
            image_rotary_emb=rotary_tables(
                model, latents.shape[1], latents.shape[3], latents.shape[4], torch.device("cpu")
            ),
            return_dict=False,
        )[0]


@every_set
def test_the_converted_transformer_computes_sats_output(golden: GoldenSet) -> None:
    _, weights, config = converted(golden)
    model = CogVideoXTransformer3DModel.from_config(config).eval()
    model.load_state_dict({name: weights.read(name).float() for name in weights.tensors}, strict=True)
    recorded = golden.recorded()
    for which in ("forward", "forward_short"):
        if f"{which}.output" in recorded:
            model.norm_out.norm.eps = 1e-5  # the published value
            torch.testing.assert_close(output(model, recorded, which), recorded[f"{which}.output"], atol=5e-5, rtol=0)
            model.norm_out.norm.eps = 1e-6  # SAT's value
            torch.testing.assert_close(output(model, recorded, which), recorded[f"{which}.output"], atol=3e-6, rtol=0)


@every_set
def test_the_inverse_conversion_restores_every_bit(golden: GoldenSet) -> None:
    source, weights, config = converted(golden)
    names = {name: info.shape for name, info in source.tensors.items()}
    plan = make_plan(inverse_table(sat_tables.transformer_table(config)), weights.tensors, names)
    unused = unrestored_tensors(weights.plan)
    assert unused == [name for name in source.tensors if name == UNUSED]
    back = ConvertedTensors(plan, weights, {name: source.read(name) for name in unused})
    assert back.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        assert back.read(name).dtype == source.read(name).dtype
        assert torch.equal(back.read(name), source.read(name)), name
    for name in unused:  # SAT never reads this tensor
        assert ConvertedTensors(plan, weights).read(name).count_nonzero() == 0


@every_set
def test_dropped_tables_equal_the_computed_ones(golden: GoldenSet) -> None:
    source, weights, _ = converted(golden)
    found = computed_table_differences(weights.plan, source)
    tables = {name for name in source.tensors if name.endswith(("freqs_sin", "freqs_cos"))}
    if "patch_embed.pos_embedding" not in weights.tensors:
        tables |= {name for name in source.tensors if name.endswith("pos_embedding")}
    assert found == dict.fromkeys(tables, 0.0)


def test_a_wrong_interpolation_changes_the_computed_table() -> None:
    golden = kept("2b")
    source, config = golden.transformer(), golden.config() | {"spatial_interpolation_scale": 1.0}
    plan = make_plan(sat_tables.transformer_table(config), source.tensors)
    assert computed_table_differences(plan, source)["mixins.pos_embed.pos_embedding"] > 0.1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_layers": 1}, "mixins.adaln_layer.adaLN_modulations.1.1.weight [768, 64]: no rule uses it"),
        ({"num_layers": 3}, "transformer.layers.2.attention.dense.weight: missing"),
        ({"ofs_embed_dim": None}, "ofs_embed.0.weight [64, 64]: no rule uses it"),
        ({"use_learned_positional_embeddings": True}, "mixins.pos_embed.pos_embedding: missing"),
    ],
)
def test_a_checkpoint_of_another_variant_is_refused(changes: dict[str, Any], complaint: str) -> None:
    golden = kept("1.5-5b-i2v")
    with pytest.raises(ConversionError) as caught:
        make_plan(sat_tables.transformer_table(golden.config() | changes), golden.transformer().tensors)
    assert complaint in caught.value.message


def test_a_config_without_layers_is_refused() -> None:
    with pytest.raises(ConversionError, match="num_layers"):
        sat_tables.transformer_table({})


def test_diffusers_computes_the_same_sincos_table() -> None:
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    ours = sincos_table(TokenGrid(3, 4, 6), width=64, text_tokens=5, spatial=1.875, temporal=1.0)
    theirs = get_3d_sincos_pos_embed(64, (6, 4), 3, 1.875, 1.0)
    assert ours[:, :5].abs().max() == 0
    torch.testing.assert_close(ours[0, 5:], theirs.reshape(-1, 64).float(), atol=1e-6, rtol=0)
