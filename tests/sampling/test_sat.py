"""SAT's samplers reproduce, step by step, the trajectories that were recorded from CogVideo's own code.

With COGFLOW_GOLDEN set to a folder of more such recordings, the tests also run on those.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogflow.errors import ConfigError, DataError, PipelineError
from cogflow.export.export_plan import ConvertedTensors, make_plan
from cogflow.export.sat_tables import transformer_table
from cogflow.models.family import MODEL_SPECS
from cogflow.sampling import sat_samplers
from cogflow.sampling.sat_schedule import alpha_table, make_schedule, schedule_of, visited_timesteps
from tests.export.golden_sets import IN_REPOSITORY, GoldenSet, sets

GOLDEN = IN_REPOSITORY.parent
RECORDED = {"sat_dpm": "dpmpp2m", "sat_ddim": "ddim"}
TOLERANCE = 5e-5  # for values up to 5; the eps of the last norm (1e-5 here, 1e-6 in SAT) alone causes 2e-5
KEPT_SETS = {
    name: GoldenSet(IN_REPOSITORY / name, GOLDEN / f"sampler-{name}.safetensors")
    for name in ("2b", "5b-i2v", "1.5-5b-i2v")
}
MORE_SETS = {golden.folder.name: golden for golden in sets() if golden.golden.name == "golden.safetensors"}
CASES = [
    (n, solver) for n in [*KEPT_SETS, *MORE_SETS] for solver in RECORDED if (n, solver) != ("1.5-5b-i2v", "sat_dpm")
]


@functools.cache
def network(name: str) -> CogVideoXTransformer3DModel:
    golden = (KEPT_SETS | MORE_SETS)[name]
    source, config = golden.transformer(), golden.config()
    model = CogVideoXTransformer3DModel(**config)
    converted = ConvertedTensors(make_plan(transformer_table(config), source.tensors), source)
    model.load_state_dict({key: converted.read(key).float() for key in converted.tensors})
    return model.eval()


@functools.cache
def recorded(name: str) -> dict[str, torch.Tensor]:
    found = (KEPT_SETS | MORE_SETS)[name].recorded()
    return {key.removeprefix("sampler."): value for key, value in found.items() if key.startswith("sampler.")}


def shift(name: str) -> float:
    """Return the SNR shift of the model's own yaml; SAT's default is 1."""
    for path in sorted(((KEPT_SETS | MORE_SETS)[name].folder / "configs").glob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model")
        if model:
            noise: dict[str, Any] = model["denoiser_config"]["params"]["discretization_config"]
            return float(noise.get("params", {}).get("shift_scale", 1.0))
    raise AssertionError(f"{name} has no yaml of a model")


def velocity(name: str, model: Any = None) -> sat_samplers.Velocity:
    values = recorded(name)
    image = values.get("concat_latents")
    if "first_image_latents" in values:
        first, frames = values["first_image_latents"], values["init_noise"].shape[1]
        image = torch.cat([first, torch.zeros_like(first).expand(-1, frames - 1, -1, -1, -1)], dim=1)
    embeds = values["text_embeds"]
    return sat_samplers.Velocity(
        model or network(name), embeds, sat_samplers.zeros_for_uncond(embeds), image=image, ofs=values.get("ofs")
    )


def noises(name: str) -> Iterator[torch.Tensor]:
    """Yield the noise tensors in SAT's order. NaN replaces an unused one that a kept file leaves out."""
    values = recorded(name)
    if "dpmpp2m.noises" in values:
        return iter(values["dpmpp2m.noises"])
    if "dpmpp2m.noises_used" not in values:
        return iter(())
    first, *others = values["dpmpp2m.noises_used"]
    return iter([first, *(noise for used in others for noise in (torch.full_like(used, torch.nan), used))])


@torch.no_grad()
def follow(name: str, solver: str, model: Any = None) -> list[sat_samplers.SolverStep]:
    schedule = make_schedule(len(recorded(name)["ddim.timesteps"]), shift(name))
    start = recorded(name)["init_noise"]
    return list(
        sat_samplers.steps(velocity(name, model), start, schedule, solver, scale=6.0, dynamic=True, noises=noises(name))
    )


@pytest.mark.parametrize(("name", "solver"), CASES)
def test_trajectories_equal_the_recorded_ones(name: str, solver: str) -> None:
    values, prefix = recorded(name), RECORDED[solver]
    steps = follow(name, solver)
    wanted = values[f"{prefix}.latents"]
    at = values.get(f"{prefix}.latents_after", torch.arange(len(wanted))).tolist()
    for index, latents in zip(at, wanted, strict=True):
        torch.testing.assert_close(steps[index].latents, latents, rtol=0, atol=TOLERANCE)
    assert at[-1] == len(steps) - 1  # the last latents are the result
    if f"{prefix}.denoised" in values:
        torch.testing.assert_close(
            torch.stack([step.denoised for step in steps]), values[f"{prefix}.denoised"], rtol=0, atol=TOLERANCE
        )
    assert [step.timestep for step in steps] == values[f"{prefix}.timesteps"].tolist()
    assert [step.guidance for step in steps] == pytest.approx(values[f"{prefix}.guidance_scale"].tolist(), abs=1e-12)


@pytest.mark.parametrize("name", KEPT_SETS)
def test_schedules_equal_the_recorded_ones(name: str) -> None:
    values, schedule = recorded(name), make_schedule(8, shift(name))
    torch.testing.assert_close(schedule.alphas, values["ddim.alphas_cumprod_sqrt"], rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.quantized, values["ddim.quantized_alphas_cumprod_sqrt"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_alpha_tables_equal_the_recorded_ones(scale: float) -> None:
    values = load_file(GOLDEN / "sampler-schedules.safetensors")
    key = f"alphas_cumprod_sqrt.shift_scale_{scale}"
    torch.testing.assert_close(alpha_table(scale, 0.00085, 0.012), values[key], rtol=0, atol=1e-6)
    for steps in (8, 50):
        schedule = make_schedule(steps, scale)
        torch.testing.assert_close(schedule.alphas[:-1], values[f"{key}.steps_{steps}"], rtol=0, atol=1e-6)
        assert list(schedule.timesteps) == values[f"timesteps.steps_{steps}"].tolist()


@pytest.mark.parametrize(("steps", "equal"), [(8, True), (20, True), (50, True), (30, False), (51, False)])
def test_timesteps_equal_diffusers_where_the_count_divides_1000(steps: int, equal: bool) -> None:
    scheduler = CogVideoXDDIMScheduler(**MODEL_SPECS["cogvideox-5b"].scheduler_config())
    scheduler.set_timesteps(steps)
    assert (visited_timesteps(steps)[::-1] == scheduler.timesteps.tolist()) is equal


@torch.no_grad()
def test_another_sampler_and_other_weights_both_exceed_the_tolerance() -> None:
    """Neither diffusers' DDIM on SAT's weights nor SAT's DDIM on slightly changed weights equals SAT's own run."""
    name = "2b"
    wanted = recorded(name)["ddim.latents"][-1]
    scheduler = CogVideoXDDIMScheduler(**MODEL_SPECS["cogvideox-2b"].scheduler_config())
    scheduler.set_timesteps(8)
    x, run, schedule = recorded(name)["init_noise"], velocity(name), make_schedule(8, shift(name))
    for index, timestep in enumerate(scheduler.timesteps):
        uncond, cond = run(x, int(timestep)).chunk(2)
        x = scheduler.step(uncond + schedule.guidance(index, 6.0, True) * (cond - uncond), int(timestep), x).prev_sample
    assert (x - wanted).abs().max() > 100 * TOLERANCE
    other = CogVideoXTransformer3DModel.from_config(network(name).config).eval()
    weights = network(name).state_dict()
    other.load_state_dict(weights | {"proj_out.bias": weights["proj_out.bias"] + 0.01})
    assert (follow(name, "sat_ddim", other)[-1].latents - wanted).abs().max() > 100 * TOLERANCE


def constant(latents: torch.Tensor, timestep: int) -> torch.Tensor:
    return torch.full_like(latents, 0.1)


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_sat_dpm_takes_as_many_noise_tensors_as_sat(steps: int) -> None:
    schedule, start = make_schedule(steps, 1.0), torch.ones(1, 1, 1, 2, 2)
    given = iter([torch.ones_like(start)] * (sat_samplers.draws("sat_dpm", steps) + 1))
    trajectory = sat_samplers.steps(constant, start, schedule, "sat_dpm", scale=6.0, dynamic=False, noises=given)
    assert torch.isfinite(sat_samplers.final(trajectory)).all()
    assert len(list(given)) == 1
    few = [torch.ones_like(start)] * (sat_samplers.draws("sat_dpm", steps) - 1)
    with pytest.raises(DataError, match="there are fewer"):
        sat_samplers.final(
            sat_samplers.steps(constant, start, schedule, "sat_dpm", scale=6.0, dynamic=False, noises=few)
        )
    assert sat_samplers.draws("sat_ddim", steps) == 0


def test_the_generator_determines_the_result() -> None:
    schedule, start = make_schedule(4, 1.0), torch.ones(1, 1, 1, 4, 4)

    def result(solver: str, seed: int) -> torch.Tensor:
        noises = torch.Generator().manual_seed(seed)
        return sat_samplers.final(
            sat_samplers.steps(constant, start, schedule, solver, scale=6.0, dynamic=False, noises=noises)
        )

    assert torch.equal(result("sat_dpm", 1), result("sat_dpm", 1))
    assert not torch.equal(result("sat_dpm", 1), result("sat_dpm", 2))
    assert torch.equal(result("sat_ddim", 1), result("sat_ddim", 2))


@pytest.mark.parametrize("steps", [0, 1, 1000])
def test_step_counts_that_sat_does_not_support_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match="2 to 999"):
        make_schedule(steps, 1.0)


def test_schedulers_that_sat_does_not_support_are_refused() -> None:
    config = MODEL_SPECS["cogvideox-2b"].scheduler_config()
    assert torch.equal(schedule_of(config, 8).alphas, make_schedule(8, 3.0).alphas)
    with pytest.raises(PipelineError, match=r"prediction_type=epsilon \(SAT: v_prediction\)"):
        schedule_of(config | {"prediction_type": "epsilon"}, 8)
    with pytest.raises(PipelineError, match="snr_shift_scale is missing"):
        schedule_of({key: value for key, value in config.items() if key != "snr_shift_scale"}, 8)


def test_an_image_to_video_model_without_an_image_is_refused() -> None:
    values = recorded("5b-i2v")
    with pytest.raises(PipelineError, match="takes 32 channels, not 16"):
        sat_samplers.Velocity(network("5b-i2v"), values["text_embeds"], None)(values["init_noise"], 999)


def test_frames_that_do_not_fill_whole_patches_are_refused() -> None:
    run = velocity("1.5-5b-i2v")
    run.image = run.image[:, :3] if run.image is not None else None
    with pytest.raises(PipelineError, match="3 latent frames"):
        run(recorded("1.5-5b-i2v")["init_noise"][:, :3], 999)


def test_the_kept_recordings_stay_small() -> None:
    files: list[Path] = list(GOLDEN.glob("sampler-*.safetensors"))
    assert len(files) == 4 and sum(path.stat().st_size for path in files) < 700_000
