"""The schedule probe finds a wrong SNR shift, for transformers that patch over time (CogVideoX1.5), too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from cogflow.ladder.ladder_record import read_ladder
from cogflow.ladder.rung_findings import evaluate_ladder
from cogflow.ladder.schedule_probe import (
    SHIFTS,
    ProbeClip,
    alpha_tables,
    best_shift,
    record_schedule_probe,
    schedule_errors,
)
from cogflow.models import tiny
from cogflow.models.family import MODEL_SPECS
from cogflow.models.transformer_inputs import pad_latent_frames
from tests import small
from tests.ladder.conftest import World

CPU, FP32 = torch.device("cpu"), torch.float32
TABLES = alpha_tables(MODEL_SPECS["cogvideox1.5-5b"].scheduler_config(), SHIFTS)
PATCH = 2
assert MODEL_SPECS["cogvideox1.5-5b"].patch_size_t == PATCH


class PerfectTransformer(CogVideoXTransformer3DModel):
    """A transformer with CogVideoX1.5's patches that predicts the exact velocity of ``x0`` when its timestep has the
    level of ``table``.
    """

    x0: torch.Tensor
    table: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor]:
        _, frames, _, height, width = hidden_states.shape
        patch = self.config.patch_size
        tokens = frames // PATCH * (height // patch) * (width // patch)
        assert frames % PATCH == 0, f"{frames} latent frames are no whole patches"
        assert inputs["image_rotary_emb"][0].shape[0] == tokens
        level = self.table[timestep].sqrt()
        sigma = (1 - level**2).sqrt()
        noise = (hidden_states - level * self.x0) / sigma
        return (level * noise - sigma * self.x0,)


def perfect_transformer(latents: torch.Tensor, scaling_factor: float, shift: float) -> PerfectTransformer:
    """Return a transformer that predicts as if trained on ``latents`` ``[channels, frames, h, w]`` under ``shift``."""
    config = small.transformer_config(patch_size_t=PATCH, patch_bias=False, num_layers=1)
    transformer = PerfectTransformer.from_config(config)
    transformer.x0 = pad_latent_frames(scaling_factor * latents.float().transpose(0, 1), PATCH)[None]
    transformer.table = TABLES[shift]
    return transformer


@pytest.mark.parametrize("trained", SHIFTS)
@pytest.mark.parametrize("configured", SHIFTS)
def test_a_wrong_shift_of_a_transformer_that_patches_over_time_is_found_at_step_0(
    world: World, tmp_path: Path, trained: float, configured: float
) -> None:
    (held_out,) = world.cache.holdout
    latents = world.cache.entry(held_out).mean
    assert latents.shape[1] % PATCH, "the latent frames must need padding"
    sampler = world.sampler()
    sampler.transformer = perfect_transformer(latents, 0.7, trained)
    config = {**sampler.pipeline.scheduler.config, "snr_shift_scale": configured}
    sampler.pipeline.register_modules(scheduler=CogVideoXDDIMScheduler.from_config(config))
    record_schedule_probe(tmp_path, sampler, world.cache, 0.7)
    base = read_ladder(tmp_path).rungs.base
    assert base is not None and base.schedule is not None and base.schedule.errors[f"{trained:g}"] < 1e-2
    fields = [finding.field for finding in evaluate_ladder(read_ladder(tmp_path))[1]]
    assert fields == ([] if trained == configured else ["scheduler.snr_shift_scale"])


def test_shifts_are_tried_when_the_scheduler_config_names_none(tmp_path: Path) -> None:
    """diffusers then loads its default, and ignores a shift that is given beside the loaded config."""
    config = MODEL_SPECS["cogvideox1.5-5b"].scheduler_config() | {"_class_name": "CogVideoXDDIMScheduler"}
    del config["snr_shift_scale"]
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = CogVideoXDDIMScheduler.from_pretrained(tmp_path)
    tables = alpha_tables(scheduler.config, SHIFTS)
    assert all(torch.equal(tables[shift], TABLES[shift]) for shift in SHIFTS)
    assert not torch.equal(tables[1.0], tables[3.0])


def test_an_image_to_video_transformer_is_skipped(world: World, tmp_path: Path) -> None:
    sampler = world.sampler()
    config = small.transformer_config(in_channels=32, num_layers=1)
    sampler.transformer = CogVideoXTransformer3DModel.from_config(config)
    record_schedule_probe(tmp_path, sampler, world.cache, 0.7)
    assert read_ladder(tmp_path).rungs.base is None


def test_the_probe_restores_the_training_mode(world: World, tmp_path: Path) -> None:
    sampler = world.sampler()
    sampler.transformer.train()
    record_schedule_probe(tmp_path, sampler, world.cache, 0.7)
    assert sampler.transformer.training
    sampler.transformer.eval()


def test_random_weights_name_no_shift(world: World) -> None:
    torch.manual_seed(0)
    transformer = tiny.new_transformer().eval()
    entry = world.cache.entry(0)
    clips = [ProbeClip(entry.mean, entry.embeds, "clip")]
    errors = schedule_errors(transformer, clips, TABLES, scaling_factor=0.7, device=CPU, dtype=FP32)
    assert set(errors) == set(SHIFTS) and best_shift(errors) is None


def test_the_best_shift_needs_a_clear_margin() -> None:
    assert best_shift({1.0: 0.10, 3.0: 0.20}) == 1.0
    assert best_shift({1.0: 0.100, 3.0: 0.104}) is None
    assert best_shift({1.0: 0.1}) is None
    assert best_shift({}) is None
