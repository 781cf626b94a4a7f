"""The recipe of the tiny model, in a few steps: it runs from nothing to a pipeline that plain diffusers loads, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogflow.models.onednn import by_onednn
from cogflow.models.tiny import folder
from cogflow.pretraining import figures
from cogflow.stages.pretrain import sampler
from tests.conftest import Command


@pytest.mark.slow
def test_the_recipe_makes_a_pipeline(tmp_path: Path, cogflow: Command) -> None:
    cogflow("experiment=tiny_pretrain", "debug=quick", f"run.root={tmp_path}", "run.name=recipe")
    model = tmp_path / "recipe/model"
    recipe = json.loads((model / "recipe.json").read_text())
    assert set(recipe["steps"]) == {"text", "vae", "transformer"} and recipe["figures"]["following"]["samples"] == 24
    pipeline = CogVideoXPipeline.from_pretrained(model)
    shipped = CogVideoXPipeline.from_pretrained(folder())
    assert pipeline.scheduler.config == shipped.scheduler.config
    assert {name: p.shape for name, p in pipeline.transformer.named_parameters()} == {
        name: p.shape for name, p in shipped.transformer.named_parameters()
    }


def test_the_shipped_model_is_trained_small_and_has_5bs_traits() -> None:
    size = sum(path.stat().st_size for path in folder().rglob("*") if path.is_file())
    assert size < 15e6
    recorded = json.loads((folder() / "recipe.json").read_text())["figures"]
    assert recorded["roundtrip"]["psnr_min_db"] > 26 and recorded["following"]["follows_all"] >= 0.85
    pipeline = CogVideoXPipeline.from_pretrained(folder(), torch_dtype=torch.float32)
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.snr_shift_scale) == (
        "v_prediction",
        True,
        1.0,
    )
    assert pipeline.vae.config.scaling_factor == 0.7 and pipeline.transformer.config.use_rotary_positional_embeddings


@pytest.mark.slow
def test_the_shipped_model_does_what_its_record_says() -> None:
    """Measured anew, on fewer clips: the round trip, and whether samples show what the prompts name."""
    pipeline = CogVideoXPipeline.from_pretrained(folder(), torch_dtype=torch.float32)
    by_onednn(pipeline.vae)
    assert figures.roundtrip(pipeline.vae, 16)["psnr_mean_db"] > 26
    followed = figures.following(sampler(pipeline, 20), 1)
    assert {name: share for name, share in followed.items() if name.startswith("follows") and share < 0.85} == {}
    assert followed["wavelet_ratio_change_of_gaussian_1"] < -2 * followed["its_deviation"]
