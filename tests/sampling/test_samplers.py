"""The values of ``sampling.sampler``: what each runs and records; padding and noise do not depend on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from cogflow.config.compose import compose
from cogflow.config.sampling_section import SAMPLERS, SamplingConfig
from cogflow.errors import ConfigError, PipelineError
from cogflow.models import loading, tiny
from cogflow.models.family import MODEL_SPECS
from cogflow.records.sample_records import SampledWeights, SamplingRecord
from cogflow.sampling import sample_folder, sat_samplers
from cogflow.sampling.noise import latent_frames, noise_for, step_generator
from cogflow.sampling.prompts import Prompt
from cogflow.sampling.sample_record import read_sample_record
from cogflow.sampling.sampler import Request, Sampler, decoder
from cogflow.sampling.sat_schedule import make_schedule
from tests.random_parts import new_transformer, new_vae

SCHEDULER_NAMES = {
    "default": "CogVideoXDDIMScheduler",
    "ddim": "CogVideoXDDIMScheduler",
    "dpm": "CogVideoXDPMScheduler",
    "sat_ddim": "SAT VideoDDIMSampler",
    "sat_dpm": "SAT VPSDEDPMPP2MSampler",
}
REQUEST = Request(Prompt("a", "a red circle"), 3, torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))


def transformer(patch_size_t: int | None = None, channels: int = 16) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    model = new_transformer(in_channels=channels, sample_frames=9, max_text_seq_length=4, patch_size_t=patch_size_t)
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return new_vae(scaling_factor=0.7).eval()


def sampler(
    vae: AutoencoderKLCogVideoX, choice: str, model: CogVideoXTransformer3DModel | None = None, **settings: object
) -> Sampler:
    scheduler = CogVideoXDDIMScheduler(**MODEL_SPECS["tiny"].scheduler_config())
    config = SamplingConfig(**{"sampler": choice, "steps": 4, **settings})  # type: ignore[arg-type]
    return Sampler(
        model or transformer(),
        vae,
        scheduler,
        torch.ones(4, 8),
        config,
        frames=9,
        height=32,
        width=32,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_every_sampler_is_tested() -> None:
    assert set(SCHEDULER_NAMES) == set(SAMPLERS) and set(sat_samplers.SOLVERS) < set(SAMPLERS)
    assert SamplingConfig().sampler == "default"


@pytest.mark.parametrize("choice", SAMPLERS)
def test_each_sampler_runs_its_scheduler_and_is_deterministic(vae: AutoencoderKLCogVideoX, choice: str) -> None:
    tested = sampler(vae, choice)
    assert tested.describe().scheduler == SCHEDULER_NAMES[choice] and tested.describe().sampler == choice
    assert tested.describe().unconditional == ("zeros" if choice.startswith("sat_") else "empty caption")
    latents = tested.latents(REQUEST)
    torch.randn(3)
    assert latents.shape == (3, 16, 4, 4) and torch.isfinite(latents).all()
    assert torch.equal(latents, sampler(vae, choice).latents(REQUEST))


def test_samplers_differ_and_default_is_the_pipelines_own(vae: AutoencoderKLCogVideoX) -> None:
    made = {choice: sampler(vae, choice).latents(REQUEST) for choice in SAMPLERS}
    assert torch.equal(made["default"], made["ddim"])
    others = ["dpm", "ddim", "sat_dpm", "sat_ddim"]
    assert all((made[a] - made[b]).abs().max() > 1e-3 for a in others for b in others if a < b)


def test_default_equals_a_plain_call_of_the_pipeline(vae: AutoencoderKLCogVideoX) -> None:
    model, scheduler = transformer().eval(), CogVideoXDDIMScheduler(**MODEL_SPECS["tiny"].scheduler_config())
    plain = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=model, scheduler=scheduler)
    plain.set_progress_bar_config(disable=True)
    found = plain(
        prompt_embeds=REQUEST.embeds[None],
        negative_prompt_embeds=torch.ones(1, 4, 8),
        latents=noise_for(3, "a", (1, 3, 16, 4, 4)),
        num_frames=9,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=6.0,
        use_dynamic_cfg=True,
        output_type="latent",
    ).frames[0]
    assert torch.equal(sampler(vae, "default", model).latents(REQUEST), found)


@torch.no_grad()
def test_sat_dpm_equals_a_direct_call_of_sat_samplers(vae: AutoencoderKLCogVideoX) -> None:
    model = transformer().eval()
    embeds = REQUEST.embeds[None]
    run = sat_samplers.Velocity(model, embeds, sat_samplers.zeros_for_uncond(embeds))
    noises = step_generator(3, "a")
    noise = noise_for(3, "a", (1, 3, 16, 4, 4))
    wanted = sat_samplers.final(
        sat_samplers.steps(run, noise, make_schedule(4, 1.0), "sat_dpm", scale=6.0, dynamic=True, noises=noises)
    )
    assert torch.equal(sampler(vae, "sat_dpm", model).latents(REQUEST), wanted[0])


@pytest.mark.parametrize("choice", ["ddim", "sat_ddim"])
def test_a_guidance_scale_of_1_runs_without_guidance(vae: AutoencoderKLCogVideoX, choice: str) -> None:
    """The batches hold the conditional half only."""
    model, batches = transformer(), []
    model.register_forward_pre_hook(lambda _, __, given: batches.append(len(given["hidden_states"])), with_kwargs=True)
    sampler(vae, choice, model, guidance_scale=1.0, use_dynamic_cfg=False).latents(REQUEST)
    assert batches == [1] * 4
    sampler(vae, choice, model).latents(REQUEST)
    assert batches[4:] == [2] * 4


@pytest.mark.parametrize("choice", ["default", "dpm", "sat_dpm", "sat_ddim"])
def test_1_5_samples_whole_patches_and_returns_the_frames_of_the_clip(vae: AutoencoderKLCogVideoX, choice: str) -> None:
    tested = sampler(vae, choice, transformer(patch_size_t=2))
    assert tested.noise(REQUEST).shape == (1, 4, 16, 4, 4)
    latents = tested.latents(REQUEST)
    assert latents.shape == (3, 16, 4, 4) and tested.decode(latents).shape == (9, 32, 32, 3)


def test_frames_are_padded_in_front_to_whole_patches() -> None:
    assert [latent_frames(frames, 4, 2) for frames in (1, 9, 13, 49, 81, 85)] == [
        (2, 1),
        (4, 1),
        (4, 0),
        (14, 1),
        (22, 1),
        (22, 0),
    ]
    assert [latent_frames(frames, 4, None) for frames in (9, 13, 49)] == [(3, 0), (4, 0), (13, 0)]


def test_the_dropped_frames_are_those_that_the_pipeline_drops(vae: AutoencoderKLCogVideoX) -> None:
    """When it decodes, the pipeline drops the padding itself; the decoded clips are equal."""
    model = transformer(patch_size_t=2).eval()
    tested = sampler(vae, "default", model)
    pipeline = tested.pipeline
    found = pipeline(
        prompt_embeds=REQUEST.embeds[None],
        negative_prompt_embeds=torch.ones(1, 4, 8),
        latents=tested.noise(REQUEST),
        num_frames=9,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=6.0,
        use_dynamic_cfg=True,
        output_type="pt",
    ).frames[0]
    torch.testing.assert_close(tested.decode(tested.latents(REQUEST)).permute(0, 3, 1, 2), found, rtol=0, atol=1e-5)


def test_image_to_video_without_images_is_refused(vae: AutoencoderKLCogVideoX) -> None:
    with pytest.raises(PipelineError, match="takes 32 channels") as caught:
        sampler(vae, "default", transformer(channels=32))
    assert "CogVideoXImageToVideoPipeline" in caught.value.hint


def test_noise_between_steps_is_a_function_of_seed_and_prompt() -> None:
    def draw(seed: int, prompt: str) -> torch.Tensor:
        return torch.randn(8, generator=step_generator(seed, prompt))

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a")) and not torch.equal(draw(0, "a"), draw(0, "b"))
    assert not torch.equal(draw(0, "a"), noise_for(0, "a", (8,)))


def test_the_record_names_the_sampler(vae: AutoencoderKLCogVideoX, tmp_path: Path) -> None:
    tested = sampler(vae, "sat_ddim", steps=2)
    record = sample_folder.write_samples(
        tmp_path / "samples", tested, [REQUEST], fps=8.0, weights=SampledWeights("ab"), title="samples"
    )
    assert record == read_sample_record(tmp_path / "samples")
    assert record.sampling == SamplingRecord(
        sampler="sat_ddim",
        scheduler="SAT VideoDDIMSampler",
        unconditional="zeros",
        steps=2,
        guidance_scale=6.0,
        use_dynamic_cfg=True,
        vae_dtype="fp32",
        vae_tiling=False,
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("sampling.sampler=sat_dmp", ["sampling.sampler=sat_dmp", "Did you mean sat_dpm?"]),
        ("sampling.sampler=sat_dpm sampling.steps=1", ["sampling.steps=1", "sampling.sampler=sat_dpm", "2 to 999"]),
        ("sampling.sampler=sat_ddim sampling.steps=1000", ["sampling.steps=1000", "2 to 999"]),
    ],
)
def test_wrong_settings_are_refused_with_the_right_values(words: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["stage=sample", *words.split()])
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_diffusers_samplers_accept_one_step() -> None:
    compose(["stage=sample", "sampling.sampler=ddim", "sampling.steps=1"])


def test_vae_dtype_and_tiling_apply_without_changing_the_given_vae(vae: AutoencoderKLCogVideoX) -> None:
    latents = torch.randn(1, 16, 4, 48, generator=torch.Generator().manual_seed(2))  # wider than a tile
    plain = sampler(vae, "default")
    half = sampler(vae, "default", vae_dtype="bf16")
    tiled = sampler(vae, "default", vae_tiling=True)
    assert plain.vae is vae and half.vae is not vae and tiled.vae is not vae
    assert [variant.describe().vae_dtype for variant in (plain, half, tiled)] == ["fp32", "bf16", "fp32"]
    assert [variant.describe().vae_tiling for variant in (plain, half, tiled)] == [False, False, True]
    frames = plain.decode(latents)
    assert 0 < float((half.decode(latents) - frames).abs().max()) < 0.1
    assert float((tiled.decode(latents) - frames).abs().max()) > 0
    assert vae.dtype == torch.float32 and torch.equal(plain.decode(latents), frames)


def test_an_overflow_decodes_to_nan_and_not_to_white(vae: AutoencoderKLCogVideoX) -> None:
    tested = sampler(vae, "default")
    frames = tested.decode(torch.full((1, 16, 4, 4), torch.inf))
    assert frames.isnan().all()


def test_tiles_add_up_to_the_size_of_the_frame() -> None:
    """At the size of the shipped model, diffusers' own overlaps give frames that are too wide."""
    tiled = decoder(loading.load_vae(tiny.folder()), "fp32", tiling=True)
    latents = torch.zeros(1, 16, 1, 8, 12)
    with torch.no_grad():
        assert tiled.decode(latents).sample.shape == (1, 3, 1, 64, 96)
    large = new_vae()
    made = decoder(large, "fp32", tiling=True)
    assert abs(made.tile_overlap_factor_height - large.tile_overlap_factor_height) < 1e-6
    assert abs(made.tile_overlap_factor_width - large.tile_overlap_factor_width) < 1e-6
