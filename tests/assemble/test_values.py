"""Test stage.set and stage.force: their effect, the records of it, and what they cannot do."""

from __future__ import annotations

import json

import pytest
from assembling import Work
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from cogflow.config.compose import compose
from cogflow.config.export_settings import AssembleStage
from cogflow.errors import ConfigError, PipelineError
from cogflow.stages import assemble


def write_values_of_2b(work: Work) -> None:
    work.edit("base/vae/config.json", lambda config: config.update(scaling_factor=1.15258426))
    work.edit("base/scheduler/scheduler_config.json", lambda config: config.update(snr_shift_scale=3.0))


@pytest.mark.slow
def test_the_options_of_the_message_correct_the_values(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    write_values_of_2b(work)
    with pytest.raises(PipelineError) as caught:
        assemble.run(work.config())
    words = [line.rpartition("To correct it: ")[2] for line in caught.value.message.splitlines()[1:]]
    assert len(words) == 2
    stage = compose(["stage=assemble", *words]).stage
    assert isinstance(stage, AssembleStage)
    assemble.run(work.config(set=stage.set, verify=True))
    assembly = json.loads((work.run / "pipeline" / "assembly.json").read_text())
    assert assembly["verify"]["status"] == "passed"  # it gives the run's videos, unlike the old values
    assert assembly["components"]["vae"]["set"] == {"scaling_factor": {"before": 1.15258426, "now": 0.7}}
    pipe = CogVideoXPipeline.from_pretrained(work.run / "pipeline")
    assert pipe.vae.config.scaling_factor == 0.7 and pipe.scheduler.config.snr_shift_scale == 1.0
    assert json.loads((work.base / "vae" / "config.json").read_text())["scaling_factor"] == 1.15258426
    assert "note: stage.set: vae.scaling_factor is 0.7" in capfd.readouterr().out
    assert "| vae.scaling_factor | 0.7, set by hand |" in (work.run / "pipeline" / "README.md").read_text()


def test_force_accepts_only_the_named_contradictions(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    write_values_of_2b(work)
    with pytest.raises(PipelineError) as caught:
        assemble.run(work.config(force=["vae.scaling_factor"]))
    assert (
        "scheduler.snr_shift_scale is 3.0" in caught.value.message
        and "vae.scaling_factor is" not in caught.value.message
    )
    assert "stage.force=[vae.scaling_factor,scheduler.snr_shift_scale]" in caught.value.hint
    assemble.run(work.config(force=["vae.scaling_factor", "scheduler.snr_shift_scale", "vae.latent_channels"]))
    output = capfd.readouterr().out
    assert "warning: stage.force: vae.scaling_factor is 1.15258426; the transformer was trained with 0.7" in output
    assert "note: stage.force=vae.latent_channels: nothing contradicts it" in output
    for record in (
        json.loads((work.run / "pipeline" / "assembly.json").read_text())["forced"],
        json.loads((work.run / "assemble.json").read_text())["results"]["forced"],
    ):
        assert [(one["key"], one["value"], one["needed"]) for one in record] == [
            ("vae.scaling_factor", 1.15258426, 0.7),
            ("scheduler.snr_shift_scale", 3.0, 1.0),
        ]
    assert "**vae.scaling_factor is 1.15258426**" in (work.run / "pipeline" / "README.md").read_text()


def test_code_cannot_be_forced(work: Work) -> None:
    (work.base / "vae" / "modeling.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(PipelineError, match=r"modeling\.py in .* is code"):
        assemble.run(work.config(force=["vae", "vae.modeling.py"]))


def test_unknown_settings_and_values_of_another_type_are_named_at_once(work: Work) -> None:
    chosen = {
        "vae": {"scaling_facter": 0.7, "invert_scale_latents": 3},
        "scheduler": {"snr_shift_scale": 1, "prediction_type": 7},
    }
    with pytest.raises(ConfigError) as caught:
        assemble.run(work.config(set=chosen))
    assert "AutoencoderKLCogVideoX has no such setting. Did you mean scaling_factor?" in caught.value.message
    assert "stage.set.vae.invert_scale_latents=3: its value is false now" in caught.value.message
    assert (
        "stage.set.scheduler.prediction_type=7" in caught.value.message
        and "snr_shift_scale" not in caught.value.message
    )


def test_a_value_that_contradicts_the_weights_cannot_be_forced(work: Work) -> None:
    with pytest.raises(PipelineError, match=r"missing: transformer_blocks\.1\.attn1\.norm_k\.bias"):
        assemble.run(work.config(set={"transformer": {"num_layers": 2}}, force=["transformer.num_layers"]))


def test_a_list_is_set_where_the_default_of_the_class_is_a_tuple(work: Work) -> None:
    work.edit("base/vae/config.json", lambda config: config.pop("block_out_channels"))
    with pytest.raises(PipelineError, match="vae"):
        assemble.run(work.config())
    stage = compose(["stage=assemble", "stage.set.vae.block_out_channels=[8,8,8,8]"]).stage
    assert isinstance(stage, AssembleStage)
    assemble.run(work.config(set=stage.set))
    config = json.loads((work.run / "pipeline" / "vae" / "config.json").read_text())
    assert config["block_out_channels"] == [8, 8, 8, 8]
    AutoencoderKLCogVideoX.from_pretrained(work.run / "pipeline" / "vae")


def test_the_command_line_sets_any_setting_of_a_component() -> None:
    stage = compose(
        ["stage=assemble", "stage.set.vae.scaling_factor=0.7", "stage.set.scheduler.timestep_spacing=trailing"]
    ).stage
    assert isinstance(stage, AssembleStage)
    assert stage.set == {"vae": {"scaling_factor": 0.7}, "scheduler": {"timestep_spacing": "trailing"}}
    for words, complaint in (
        (["stage.set.vea.scaling_factor=0.7"], "vea is no component"),
        (["stage.set=0.7"], "one by one"),
        (["stage.sot.vae.scaling_factor=0.7"], "no such key"),
        (["stage.set.vae=0.7"], "one by one"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            compose(["stage=assemble", *words])
