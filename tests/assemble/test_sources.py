"""Test components from runs, checkpoints, exports, pipelines, component folders and SAT checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from assembling import Work
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogflow.errors import PipelineError
from cogflow.files.atomic_write import write_json
from cogflow.files.publish import check_manifest, publish_folder
from cogflow.stages import assemble
from tests.random_parts import new_text_encoder

SAT = Path(__file__).resolve().parent.parent / "golden" / "sat"


@pytest.fixture
def wide(work: Work) -> Work:
    """A base whose text encoder has the width of the SAT checkpoints."""
    shutil.rmtree(work.base / "text_encoder")
    new_text_encoder(200, d_model=32).save_pretrained(work.base / "text_encoder")
    return work


def assembled(work: Work, **stage: Any) -> dict[str, Any]:
    assemble.run(work.config(**stage))
    assert check_manifest(work.run / "pipeline") == []
    found: dict[str, Any] = json.loads((work.run / "pipeline" / "assembly.json").read_text())
    return found


def test_a_sat_checkpoint_is_exported_first_and_its_yaml_decides(wide: Work) -> None:
    """A 2B transformer beside the VAE and the scheduler of 5B."""
    with pytest.raises(PipelineError) as caught:
        assemble.run(wide.config(transformer=str(SAT / "2b")))
    report = wide.run / "parts" / "transformer" / "export.json"
    vae, scheduler = wide.base / "vae/config.json", wide.base / "scheduler/scheduler_config.json"
    for line in (
        f"vae.scaling_factor is 0.7 ({vae}); the transformer was trained with 1.15258426 ({report}, which has it from ",
        f"scheduler.snr_shift_scale is 1.0 ({scheduler}); the transformer was trained with 3.0 ({report}, ",
        "training_config.yaml",
        "discretization_config.params.shift_scale",
        "stage.set.vae.scaling_factor=1.15258426",
    ):
        assert line in caught.value.message
    # The scheduler it was trained with comes with it.
    chosen = {
        "transformer": str(SAT / "2b"),
        "scheduler": str(SAT / "2b"),
        "set": {"vae": {"scaling_factor": 1.15258426}},
    }
    assembly = assembled(wide, **chosen)
    pipe = CogVideoXPipeline.from_pretrained(wide.run / "pipeline")
    assert pipe.scheduler.config.snr_shift_scale == 3.0 and not pipe.transformer.config.use_rotary_positional_embeddings
    assert assembly["made"]["trained_with"]["scaling_factor"] == 1.15258426 and len(assembly["made"]["facts"]) > 10


def test_a_whole_sat_checkpoint_becomes_an_image_to_video_pipeline(wide: Work) -> None:
    """One file with transformer, VAE, T5 and scheduler. Its VAE has two levels, and its T5 a hundred tokens."""
    everything = {name: str(SAT / "5b-i2v") for name in ("transformer", "vae", "text_encoder", "scheduler")}
    with pytest.raises(PipelineError, match=r"vae\.spatial_compression is 2 .*every CogVideoX: 8") as caught:
        assemble.run(wide.config(**everything, base=None, tokenizer=str(wide.base)))
    assert "tokenizer has 183 tokens; text_encoder's vocab_size is 100" in caught.value.message
    everything["text_encoder"] = str(wide.base)
    assembly = assembled(wide, **everything, base=None, tokenizer=str(wide.base), force=["vae.spatial_compression"])
    assert (
        len(
            {part["from"] for name, part in assembly["components"].items() if name not in ("tokenizer", "text_encoder")}
        )
        == 3
    )
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(wide.run / "pipeline", torch_dtype=torch.float32)
    assert pipe.transformer.config.use_learned_positional_embeddings and pipe.transformer.config.in_channels == 32
    assert "CogVideoXImageToVideoPipeline" in (wide.run / "pipeline" / "README.md").read_text()


def test_an_image_to_video_checkpoint_of_1_5_becomes_a_pipeline(wide: Work) -> None:
    chosen = {"transformer": str(SAT / "1.5-5b-i2v"), "set": {"vae": {"invert_scale_latents": True}}}
    assembly = assembled(wide, **chosen)
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(wide.run / "pipeline")
    assert (pipe.transformer.config.patch_size_t, pipe.transformer.config.ofs_embed_dim) == (2, 64)
    assert pipe.vae.config.invert_scale_latents and assembly["verify"]["status"] == "skipped"


@pytest.fixture
def checkpointed(work: Work) -> Work:
    """The run with two checkpoints as training saves them; its export is of the second."""
    report = json.loads((work.run / "export" / "export.json").read_text())
    for step in (2, 4):
        with publish_folder(work.run / "checkpoints" / f"step-{step:06d}") as folder:
            shutil.copytree(work.base / "transformer", folder / "transformer")
            model = {"name": "tiny", "path": str(work.base), "dtype": "auto"}
            write_json(
                folder / "trainer.json",
                {"step": step, "family": None, "model": model, "trained_with": report["trained_with"]},
            )
    (work.base / "model_index.json").write_text("{}")
    return work


def test_a_run_gives_its_newest_checkpoint_and_the_model_it_was_trained_from(checkpointed: Work) -> None:
    work = checkpointed
    assembly = assembled(work, transformer=str(work.run), base=str(work.run))
    assert assembly["made"]["step"] == 4 and assembly["made"]["source"] == str(work.run / "checkpoints" / "step-000004")
    origins = {name: Path(part["from"]).parent for name, part in assembly["components"].items()}
    assert origins.pop("transformer") == work.run / "parts" / "transformer" and set(origins.values()) == {work.base}
    # Without stage.base the checkpoint names the model.
    again = assembled(work, transformer=str(work.run), base=None)
    assert again["components"]["vae"]["from"] == str(work.base / "vae")


def test_a_named_checkpoint_is_exported(checkpointed: Work) -> None:
    work = checkpointed
    assembly = assembled(work, transformer=str(work.run / "checkpoints" / "step-000002"), output=None)
    assert assembly["made"]["step"] == 2


def test_the_runs_export_of_the_newest_checkpoint_is_used(
    checkpointed: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    work = checkpointed
    report = json.loads((work.run / "export" / "export.json").read_text()) | {
        "source": str(work.run / "checkpoints" / "step-000004")
    }
    with publish_folder(work.run / "export", replace=True) as folder:
        shutil.copytree(work.base / "transformer", folder / "transformer")
        write_json(folder / "export.json", report)
    assembly = assembled(work, transformer=str(work.run))
    assert assembly["components"]["transformer"]["from"] == str(work.run / "export" / "transformer")
    assert "is exported already" in capfd.readouterr().out and not (work.run / "parts").exists()
    assert assembled(work, transformer=str(work.run), dtype="bf16")["made"]["dtype"] == "bf16"
    weights = load_file(work.run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_run_without_checkpoints_gives_its_export_and_pipeline(work: Work) -> None:
    assembled(work)
    assembly = assembled(work, transformer=str(work.run), vae=str(work.run), output=str(work.run / "pipeline"))
    origins = {name: Path(part["from"]).parent.name for name, part in assembly["components"].items()}
    assert (origins["transformer"], origins["vae"], origins["scheduler"]) == ("export", "pipeline", "base")


def test_all_paths_without_a_component_are_named(work: Work, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    torch.save({"module": {"nothing": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(PipelineError) as caught:
        assemble.run(
            work.config(
                vae=str(tmp_path / "empty"), transformer=str(tmp_path / "other.pt"), scheduler=str(tmp_path / "gone")
            )
        )
    for line in ("stage.vae=", "stage.transformer: ", "stage.scheduler=", "does not exist"):
        assert line in caught.value.message
    assert not (work.run / "pipeline").exists()


def test_component_folders_may_have_any_name(checkpointed: Work) -> None:
    work = checkpointed
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (work.base / name).rename(work.folder / f"my-{name}")
    assembled(
        work,
        base=None,
        **{
            name: str(work.folder / f"my-{name}")
            for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
        },
    )
    model = CogVideoXTransformer3DModel.from_pretrained(work.run / "pipeline", subfolder="transformer")
    expected = load_file(work.folder / "my-transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
