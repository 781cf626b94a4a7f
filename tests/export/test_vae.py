"""Test the conversion of the VAE: SAT's files, diffusers' model, and outputs that SAT's VAE computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLCogVideoX
from golden_sets import infos, kept, vae_folders
from safetensors.torch import load_file

from cogflow.errors import ConversionError
from cogflow.export import sat_tables
from cogflow.export.export_plan import ConvertedTensors, make_plan
from cogflow.export.tensor_operations import inverse_table
from cogflow.weights.tensor_source import TensorSource
from cogflow.weights.torch_file import TorchFile


def config(channels: tuple[int, ...], layers: int) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CogVideoXDownBlock3D"] * len(channels),
        "up_block_types": ["CogVideoXUpBlock3D"] * len(channels),
        "latent_channels": 16,
    }


def shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX(**settings)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def convert_and_restore(source: TensorSource, settings: dict[str, Any]) -> ConvertedTensors:
    """Convert, check that the inverse restores every bit, and return the conversion."""
    table = sat_tables.vae_table(settings, source.tensors)
    there = ConvertedTensors(make_plan(table, source.tensors, shapes(settings)), source)
    wanted = {name: info.shape for name, info in source.tensors.items() if not name.startswith("loss.")}
    back = ConvertedTensors(make_plan(inverse_table(table), there.tensors, wanted), there)
    for name in wanted:
        assert torch.equal(back.read(name), source.read(name)), name
    return there


def test_the_vae_of_a_training_checkpoint_is_restored_to_the_bit() -> None:
    """This VAE has two levels of equal width, so no shortcuts."""
    source = sat_tables.split_components(kept("5b-i2v").checkpoint()).vae
    assert source is not None
    convert_and_restore(source, config((32, 32), 1))


def test_tensors_of_the_training_loss_are_dropped() -> None:
    source = sat_tables.split_components(kept("5b-i2v").checkpoint()).vae
    assert source is not None
    loss = "loss.discriminator.weight"
    source.names[loss] = source.names["encoder.conv_in.conv.weight"]
    source.tensors = {**source.tensors, loss: source.tensors["encoder.conv_in.conv.weight"]}
    assert convert_and_restore(source, config((32, 32), 1)).plan.dropped == [
        (loss, "part of the training loss, not of the VAE")
    ]


@pytest.mark.parametrize(("channels", "layers"), [((32, 64, 64, 96), 2), ((128, 256, 256, 512), 3)])
def test_every_tensor_of_diffusers_has_one_source(channels: tuple[int, ...], layers: int) -> None:
    """Test levels of changing width and the published VAE, from diffusers' names to SAT's and back."""
    settings = config(channels, layers)
    table = sat_tables.vae_table(settings)
    expected = shapes(settings)
    back = make_plan(inverse_table(table), infos(expected)).shapes()
    assert len(back) == len(expected)
    assert make_plan(table, infos(back), expected).shapes() == expected
    last = len(channels) - 1
    assert back[f"decoder.up.{last}.block.0.conv1.conv.weight"][0] == channels[last]
    assert back["decoder.up.0.block.0.conv1.conv.weight"][0] == channels[0]
    assert "decoder.up.0.upsample.conv.weight" not in back and f"encoder.down.{last}.downsample.conv.weight" not in back


def test_another_number_of_blocks_is_refused() -> None:
    source = sat_tables.split_components(kept("5b-i2v").checkpoint()).vae
    assert source is not None
    with pytest.raises(ConversionError, match=r"encoder.down.0.block.1.norm1.weight: missing"):
        make_plan(sat_tables.vae_table(config((32, 32), 2)), source.tensors)
    with pytest.raises(ConversionError, match="layers_per_block"):
        sat_tables.vae_table({"block_out_channels": [32]})


@pytest.mark.parametrize("folder", vae_folders(), ids=lambda folder: folder.name)
def test_the_converted_vae_encodes_and_decodes_like_sat(folder: Path) -> None:
    """Outputs are in fp32; SAT decodes latent frames in chunks of 3, 2, 2, ... with its convolution cache."""
    source = sat_tables.split_components(TorchFile(folder / "vae" / "3d-vae.pt")).vae
    assert source is not None
    settings = from_yaml(folder)
    weights = convert_and_restore(source, settings)
    model = AutoencoderKLCogVideoX(**settings).eval()
    model.load_state_dict({name: weights.read(name).float() for name in weights.tensors}, strict=True)
    recorded = load_file(folder / "golden.safetensors")
    with torch.no_grad():
        for name, video in recorded.items():
            stem, kind = name.rsplit(".", 1)
            if name.startswith("encode") and kind == "video":
                # SAT encodes all frames at once, diffusers eight at a time by default
                model.num_sample_frames_batch_size = max(8, video.shape[2] - 1)
                torch.testing.assert_close(model._encode(video), recorded[f"{stem}.moments"], atol=1e-4, rtol=0)
            if name.startswith("decode") and kind == "latents":
                torch.testing.assert_close(model.decode(video).sample, recorded[f"{stem}.video"], atol=1e-4, rtol=0)


def from_yaml(folder: Path) -> dict[str, Any]:
    for path in sorted((folder / "configs").glob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model")
        if model:
            encoder = model["first_stage_config"]["params"]["encoder_config"]["params"]
            return config(tuple(encoder["ch"] * factor for factor in encoder["ch_mult"]), encoder["num_res_blocks"])
    raise AssertionError(f"{folder} has no yaml of a model")
