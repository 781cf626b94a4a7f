"""Test the recipe of the tiny model in a few steps, and the quality of the shipped tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from cogflow.models.loading import use_onednn_convolutions
from cogflow.models.tiny import folder
from tools import tiny_quality, tiny_text
from tools.pretrain_tiny import main, make_sampler


@pytest.mark.slow
def test_the_recipe_makes_a_pipeline_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--folder", str(tmp_path / "recipe"), "--quick"]
    main(words)
    model = tmp_path / "recipe/model"
    first = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    recipe = json.loads((model / "recipe.json").read_text())
    assert set(recipe["steps"]) == {"text", "vae", "transformer"}
    assert recipe["metrics"]["prompt_following"]["samples"] == 24
    pipeline = CogVideoXPipeline.from_pretrained(model)
    shipped = CogVideoXPipeline.from_pretrained(folder())
    assert pipeline.scheduler.config == shipped.scheduler.config
    assert {name: p.shape for name, p in pipeline.transformer.named_parameters()} == {
        name: p.shape for name, p in shipped.transformer.named_parameters()
    }
    monkeypatch.setattr(tiny_text, "new_text_encoder", None)  # a second run trains nothing anew
    main(words)
    again = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_the_shipped_model_is_small_and_has_the_settings_of_5b() -> None:
    size = sum(path.stat().st_size for path in folder().rglob("*") if path.is_file())
    assert size < 15e6
    recorded = json.loads((folder() / "recipe.json").read_text())["metrics"]
    assert recorded["roundtrip"]["psnr_min_db"] > 26 and recorded["prompt_following"]["follows_all"] >= 0.85
    pipeline = CogVideoXPipeline.from_pretrained(folder(), torch_dtype=torch.float32)
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.snr_shift_scale) == (
        "v_prediction",
        True,
        1.0,
    )
    assert pipeline.vae.config.scaling_factor == 0.7 and pipeline.transformer.config.use_rotary_positional_embeddings


@pytest.mark.slow
def test_the_shipped_model_reaches_its_recorded_quality() -> None:
    """Measure the round trip, and whether samples show what their prompts name, on fewer clips than the record."""
    pipeline = CogVideoXPipeline.from_pretrained(folder(), torch_dtype=torch.float32)
    use_onednn_convolutions(pipeline.vae)
    assert tiny_quality.measure_roundtrip(pipeline.vae, 16)["psnr_mean_db"] > 26
    followed = tiny_quality.measure_prompt_following(make_sampler(pipeline, 20), 1)
    assert {name: share for name, share in followed.items() if name.startswith("follows") and share < 0.85} == {}
    assert followed["wavelet_ratio_change_of_gaussian_1"] < -2 * followed["its_deviation"]
