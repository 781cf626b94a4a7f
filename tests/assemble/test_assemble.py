"""Test the assembled folder: files and index, loading by diffusers, verification against the run's videos,
rejection.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import diffusers
import pytest
import torch
from assembling import TOKENS, TRAINED_WITH, Work
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from safetensors.torch import load_file, save_file

from cogflow.assemble import verification
from cogflow.assemble.verification import sample_difference
from cogflow.config.sampling_section import SamplingConfig
from cogflow.errors import PipelineError, QualityGateError
from cogflow.files import linking
from cogflow.files.hashing import hash_file
from cogflow.files.publish import check_manifest, write_manifest
from cogflow.models import loading
from cogflow.records.pipeline_records import VerifiedSample
from cogflow.records.sample_records import SampledWeights
from cogflow.sampling import sample_folder
from cogflow.sampling.prompts import Prompt
from cogflow.sampling.sample_record import read_sample_record
from cogflow.sampling.sampler import Sampler, requests
from cogflow.stages import assemble

CAPTION = "a red circle moves left over a light background"


def test_a_folder_that_gives_the_runs_videos_is_published(work: Work, capfd: pytest.CaptureFixture[str]) -> None:
    assemble.run(work.config(verify=True))
    pipeline = work.run / "pipeline"
    assembly = json.loads((pipeline / "assembly.json").read_text())
    assert "fresh process: 1/1 circle-seed0" in capfd.readouterr().out
    assert assembly["verify"]["status"] == "passed" and assembly["verify"]["samples"][0]["psnr"] >= 50
    assert assembly["made"]["trained_with"] == TRAINED_WITH
    assert check_manifest(pipeline) == []
    for name, component in assembly["components"].items():
        assert component["files"].keys() == {path.name for path in (pipeline / name).iterdir()}
        assert all(file["sha256"] == hash_file(pipeline / name / path) for path, file in component["files"].items())
    record = json.loads((work.run / "assemble.json").read_text())
    assert record["results"]["where"] == str(pipeline)


def test_a_folder_that_gives_other_videos_is_rejected(work: Work) -> None:
    """The VAE has other weights and the right config, so only the frames differ."""
    file = work.base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.conv.weight"] *= 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QualityGateError, match="circle-seed0: PSNR") as caught:
        assemble.run(work.config(verify=True))
    assert caught.value.exit_code == 3 and "pipeline.rejected" in str(caught.value)
    rejected = work.run / "pipeline.rejected"
    assert not (work.run / "pipeline").exists() and not list(work.run.glob(".pipeline*"))
    assert json.loads((rejected / "assembly.json").read_text())["verify"]["status"] == "failed"
    assert (rejected / "model_index.json").is_file() and (rejected / "verify-frames.safetensors").is_file()


def test_a_folder_that_diffusers_cannot_run_is_rejected(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fresh.py"
    script.write_text(
        "import os, sys\nsys.exit('cannot be loaded ' + str('PYTHONPATH' in os.environ and '' in sys.path))"
    )
    monkeypatch.setattr(verification, "SCRIPT", script)
    with pytest.raises(QualityGateError, match=r"(?s)does not load or run.*cannot be loaded False"):
        assemble.run(work.config(verify=True))
    assert not (work.run / "pipeline").exists() and (work.run / "pipeline.rejected").is_dir()


def test_from_pretrained_loads_every_component(work: Work) -> None:
    assemble.run(work.config())
    pipeline = work.run / "pipeline"
    index = json.loads((pipeline / "model_index.json").read_text())
    assert index == {
        "_class_name": "CogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
    }
    pipe = CogVideoXPipeline.from_pretrained(pipeline)
    expected = load_file(work.run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert pipe.vae.config.scaling_factor == 0.7 and pipe.scheduler.config.snr_shift_scale == 1.0
    card = (pipeline / "README.md").read_text()
    assert "max_sequence_length=16" in card and "use_dynamic_cfg=True" in card and "num_frames=5" in card
    assert str(work.folder) not in card


def test_weights_are_linked_and_configs_copied(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linking, "SMALLEST_LINKED", 1)
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    assemble.run(work.config())
    components = json.loads((work.run / "pipeline" / "assembly.json").read_text())["components"]
    for name, file in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        placed = work.run / "pipeline" / name / file
        assert placed.samefile(work.base / name / file) and placed.stat().st_mode & 0o222 == 0
        assert components[name]["shared"] == {file: str((work.base / name / file).resolve())}
    assert not (work.run / "pipeline" / "vae" / "config.json").samefile(work.base / "vae" / "config.json")


def test_small_weights_and_those_of_the_package_share_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    assemble.run(work.config(link="hard"))
    files = [path for path in (work.run / "pipeline").rglob("*") if path.is_file()]
    assert files and all(path.stat().st_nlink == 1 for path in files)
    monkeypatch.setattr(linking, "SMALLEST_LINKED", 1)
    monkeypatch.setattr(linking, "PACKAGE", work.base.resolve())
    assemble.run(work.config(link="hard"))
    file = work.run / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_nlink == 1 and file.stat().st_mode & 0o200


def test_weights_are_copied_where_hard_links_fail(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(linking, "SMALLEST_LINKED", 1)
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    monkeypatch.setattr(os, "link", refuse)
    assemble.run(work.config())
    file = work.run / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    assert hash_file(file) == hash_file(work.base / "vae" / file.name) and file.stat().st_nlink == 1


def test_components_from_another_folder_and_from_an_earlier_pipeline_are_the_same(work: Work) -> None:
    assemble.run(work.config())
    first = json.loads((work.run / "pipeline" / "assembly.json").read_text())
    own = work.folder / "own"
    (work.base / "vae").rename(own)
    for place in (str(own), str(work.run / "pipeline")):
        assemble.run(work.config(output=str(work.folder / "second"), vae=place, transformer=str(work.run / "pipeline")))
        second = json.loads((work.folder / "second" / "assembly.json").read_text())
        assert second["components"]["vae"]["files"] == first["components"]["vae"]["files"]
        assert second["made"] == first["made"]


def test_the_default_base_is_the_model_that_was_trained(work: Work) -> None:
    with pytest.raises(PipelineError, match="does not say which model"):
        assemble.run(work.config(base=None))
    work.edit(
        "run/export/export.json",
        lambda report: report.update(model={"name": "small", "path": str(work.base), "dtype": "auto"}),
    )
    write_manifest(work.run / "export")
    assemble.run(work.config(base=None))
    assembly = json.loads((work.run / "pipeline" / "assembly.json").read_text())
    assert assembly["components"]["vae"]["from"] == str(work.base / "vae")


@pytest.mark.parametrize("reason", ["samples", "weights", "sampler"])
def test_a_skipped_verification_is_recorded_with_its_reason(
    work: Work, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if reason == "samples":
        (work.run / "samples" / "step-000004" / "frames.safetensors").unlink()
        expected = "has no samples with raw frames"
    elif reason == "sampler":
        work.edit("run/samples/step-000004/samples.json", lambda record: record["sampling"].update(sampler="sat_dpm"))
        expected = "was sampled with sampling.sampler=sat_dpm"
    else:
        work.edit(
            "run/samples/step-000004/samples.json", lambda record: record.update(weights="ema", weights_sha256="0" * 64)
        )
        expected = "was sampled with other weights (ema of step 4)"
    # The samples of the run that the export names would be found, too: hide them.
    exported = json.loads((work.run / "export" / "export.json").read_text())["source"]
    assert not Path(exported).is_relative_to(work.folder)
    (Path(exported).parent.parent / "samples").rename(Path(exported).parent.parent / "hidden")
    try:
        assemble.run(work.config(verify=True))
    finally:
        (Path(exported).parent.parent / "hidden").rename(Path(exported).parent.parent / "samples")
    verified = json.loads((work.run / "pipeline" / "assembly.json").read_text())["verify"]
    assert verified["status"] == "skipped" and expected in verified["reason"]
    assert expected in capfd.readouterr().out
    assert "not compared" in (work.run / "pipeline" / "README.md").read_text()


def test_a_stochastic_scheduler_gives_the_same_videos(work: Work) -> None:
    """DPM adds noise between its steps; the run and the fresh process draw the same noise."""
    source = str(work.run / "checkpoints" / "step-000004")
    work.edit("run/export/export.json", lambda report: report.update(source=source))
    write_manifest(work.run / "export")
    work.edit("base/scheduler/scheduler_config.json", lambda config: config.update(_class_name="CogVideoXDPMScheduler"))
    scheduler = loading.load_scheduler(work.base)
    assert isinstance(scheduler, CogVideoXDPMScheduler)
    samples = work.run / "samples" / "step-000004"
    record = read_sample_record(samples)
    transformer = loading.load_transformer(work.run / "export", torch.float32).eval()
    embeds = loading.encode_prompts(
        loading.load_tokenizer(work.base), loading.load_text_encoder(work.base), [CAPTION, ""], TOKENS
    )
    sampler = Sampler(
        transformer,
        loading.load_vae(work.base),
        scheduler,
        embeds[-1],
        SamplingConfig(steps=3),
        frames=5,
        height=32,
        width=32,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    weights = SampledWeights(record.weights_sha256, record.step, record.weights)
    sample_folder.write_samples(
        samples, sampler, requests([Prompt("circle", CAPTION)], embeds, [0]), fps=8.0, weights=weights, title="samples"
    )
    assemble.run(work.config(verify=True))
    verified = json.loads((work.run / "pipeline" / "assembly.json").read_text())["verify"]
    assert verified["status"] == "passed" and verified["samples"][0]["psnr"] >= 50


def test_the_sample_difference_is_psnr_and_the_largest_difference() -> None:
    clip = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    assert sample_difference("a", clip, clip) == VerifiedSample("a", 100.0, 0)
    brighter = sample_difference("a", clip + 5, clip)
    assert brighter.psnr == pytest.approx(34.151, abs=1e-3)
    assert brighter.max_difference == 5
    assert sample_difference("a", clip - 5, clip).max_difference == 5


def test_a_missing_clip_and_a_clip_of_another_shape_have_no_psnr() -> None:
    clip = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    assert sample_difference("a", None, clip) == sample_difference("a", clip[:1], clip) == VerifiedSample("a", 0.0, 255)
