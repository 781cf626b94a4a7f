"""Test sizes from the meta device, and compare operations by formula with those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogflow.config.model_section import ModelConfig
from cogflow.models.family import MODEL_SPECS
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.training import flops, transformer_size
from tests import small

PARAMETERS = {
    "cogvideox-2b": 1_693_783_872,
    "cogvideox-5b": 5_570_283_072,
    "cogvideox-5b-i2v": 5_570_479_680,
    "cogvideox1.5-5b": 5_570_676_352,
    "cogvideox1.5-5b-i2v": 5_571_594_880,
}
"""Parameters of the published checkpoints."""
OVER_TIME: dict[str, Any] = {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 64}
"""Settings in which CogVideoX1.5 for image to video differs."""


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_meta_device_counts_every_parameter(name: str) -> None:
    found, source = transformer_size.of_model(ModelConfig(name=name, path="/nowhere/yet"))
    assert found.parameters == found.trained == PARAMETERS[name] and f"model={name}" in source


def test_every_published_model_has_its_number_of_parameters() -> None:
    assert set(PARAMETERS) == set(MODEL_SPECS) - {"tiny"}


@pytest.mark.parametrize(
    ("name", "size", "video", "total"),
    [
        ("cogvideox-5b", (49, 480, 720), 13 * 30 * 45, 17_776),
        ("cogvideox1.5-5b", (81, 768, 1360), 11 * 48 * 85, 45_104),  # 21 latent frames and one padded
        ("cogvideox1.5-5b", (85, 768, 1360), 11 * 48 * 85, 45_104),
        ("tiny", (9, 64, 96), 72, 104),
    ],
)
def test_the_number_of_tokens_is_that_of_each_published_model(
    name: str, size: tuple[int, int, int], video: int, total: int
) -> None:
    found = transformer_size.tokens(transformer_size.of_model(ModelConfig(name=name))[0], *size)
    assert (found.video, found.total) == (video, total)


def test_a_step_of_5b_takes_the_published_number_of_operations() -> None:
    """The figures by which a day of training is budgeted."""
    own, _ = transformer_size.of_model(ModelConfig(name="cogvideox-5b"))
    tokens = transformer_size.tokens(own, 49, 480, 720)
    one = flops.forward(own, tokens)
    assert one.linear == pytest.approx(0.17e15, rel=0.01) and one.attention == pytest.approx(0.163e15, rel=0.01)
    assert flops.step(own, tokens, {}).total == pytest.approx(1.0e15, rel=0.01)
    assert flops.step(own, tokens, {"nothing": own.layers}).total == pytest.approx(1.33e15, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("over_time", [False, True])
def test_the_formula_counts_what_torch_counts(checkpointing: bool, over_time: bool) -> None:
    config = small.transformer_config(**(OVER_TIME if over_time else {}))
    model = CogVideoXTransformer3DModel.from_config(config).train()
    assert (model.ofs_embedding is not None) == over_time
    if checkpointing:
        model.enable_gradient_checkpointing()
    own = transformer_size.of_config(config)
    frames = 4 if over_time else 3
    tokens = transformer_size.tokens(own, 9 + 4 * over_time, 64, 96)
    arguments = {
        "hidden_states": torch.randn(1, frames, 16, 8, 12),
        "encoder_hidden_states": torch.randn(1, own.text_tokens, own.text_width),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": rotary_tables(model, frames, 8, 12, torch.device("cpu")),
        "ofs": torch.tensor([2.0]) if over_time else None,
    }
    # The plain formula of attention is made of products that torch counts on every device.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as ahead:
            loss = model(**arguments, return_dict=False)[0].sum()
        with FlopCounterMode(display=False) as back:
            loss.backward()
    step = flops.step(own, tokens, {"nothing": own.layers if checkpointing else 0})
    assert step.forward == pytest.approx(ahead.get_total_flops(), rel=0.02)
    assert step.backward + step.recomputation == pytest.approx(back.get_total_flops(), rel=0.02)


def test_a_folder_that_describes_no_transformer_is_refused(tmp_path) -> None:
    from cogflow.errors import ConfigError

    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json"):
        transformer_size.of_model(ModelConfig(name="cogvideox-5b", path=str(tmp_path)))
