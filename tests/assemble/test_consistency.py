"""Test that contradictions between components are refused before anything is written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from assembling import Work
from safetensors.torch import load_file, save_file

from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.consistency import check_components
from cogflow.assemble.expectations import ARCHITECTURE, expectations, family_of
from cogflow.config.model_section import ModelConfig
from cogflow.errors import PipelineError
from cogflow.files.hashing import hash_file
from cogflow.files.publish import publish_folder, write_manifest
from cogflow.models.family import MODEL_SPECS
from cogflow.records.pipeline_records import TransformerOrigin
from cogflow.stages import assemble


def refused(work: Work, **stage: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        assemble.run(work.config(**stage))
    assert caught.value.exit_code == 2
    assert not (work.run / "pipeline").exists() and not list(work.run.glob(".pipeline*"))
    return caught.value.message


def test_every_wrong_value_is_named_at_once(work: Work) -> None:
    """The config has the values that CogVideo's converter wrote in 2024: those of 2B beside weights of 5B."""
    work.edit(
        "base/vae/config.json", lambda config: config.update(scaling_factor=1.15258426, invert_scale_latents=True)
    )
    work.edit(
        "base/scheduler/scheduler_config.json", lambda c: c.update(snr_shift_scale=3.0, timestep_spacing="linspace")
    )
    vae, scheduler, export = (
        work.base / "vae/config.json",
        work.base / "scheduler/scheduler_config.json",
        work.run / "export/export.json",
    )
    trained, right = "the transformer was trained with", "To correct it: stage.set"
    message = refused(work)
    for line in (
        f"vae.scaling_factor is 1.15258426 ({vae}); {trained} 0.7 ({export}). {right}.vae.scaling_factor=0.7",
        f"vae.invert_scale_latents is true ({vae}); {trained} false ({export}). {right}.vae.invert_scale_latents=false",
        f"scheduler.snr_shift_scale is 3.0 ({scheduler}); {trained} 1.0 ({export}). "
        f"{right}.scheduler.snr_shift_scale=1.0",
        f"scheduler.timestep_spacing is linspace ({scheduler}); {trained} trailing ({export}). "
        f"{right}.scheduler.timestep_spacing=trailing",
    ):
        assert line in message
    assert message.count("\n") == 4


def test_a_missing_value_counts_as_the_default_of_diffusers(work: Work) -> None:
    work.edit("base/vae/config.json", lambda config: config.pop("scaling_factor"))
    work.edit(
        "base/scheduler/scheduler_config.json",
        lambda config: [config.pop(key) for key in ("prediction_type", "rescale_betas_zero_snr")],
    )
    message = refused(work)
    vae, scheduler = (
        f"{work.base / name} does not set it: the default of its class"
        for name in ("vae/config.json", "scheduler/scheduler_config.json")
    )
    assert f"vae.scaling_factor is 1.15258426 ({vae}); the transformer was trained with 0.7" in message
    assert f"scheduler.prediction_type is epsilon ({scheduler}); " in message
    assert f"scheduler.rescale_betas_zero_snr is false ({scheduler}); " in message


def test_other_widths_and_channels_are_refused(work: Work) -> None:
    work.edit("base/vae/config.json", lambda config: config.update(latent_channels=4))
    work.edit("base/text_encoder/config.json", lambda config: config.update(d_model=4096, vocab_size=10))
    message = refused(work)
    own, vae, text = (
        work.folder / name / "config.json" for name in ("run/export/transformer", "base/vae", "base/text_encoder")
    )
    assert (
        f"transformer.in_channels is 16 ({own}); latent channels of the VAE (twice that for image to video): 4 ({vae})"
        in message
    )
    assert (
        f"transformer.out_channels is 16 ({own}); latent channels of the VAE: 4 ({vae}). "
        "To correct it: stage.vae=FOLDER" in message
    )
    assert f"transformer.text_embed_dim is 8 ({own}); width of the text encoder: 4096 ({text})" in message
    assert f"text_encoder: the tensors in {text.parent} are not those of its config" in message
    assert ", 8], the config requires [10, 4096]" in message


def test_another_text_length_than_in_training_is_refused(work: Work) -> None:
    export = work.run / "export"
    with publish_folder(export, replace=True) as partial:
        for path in (work.base / "transformer").iterdir():
            (partial / "transformer").mkdir(exist_ok=True)
            (partial / "transformer" / path.name).write_bytes(path.read_bytes())
        (partial / "export.json").write_text(
            (export / "export.json").read_text().replace('"max_sequence_length": 16', '"max_sequence_length": 226')
        )
    assert (
        "transformer.max_text_seq_length is 16" in (message := refused(work))
        and "text tokens in training: 226" in message
    )


@pytest.mark.parametrize("component", ["vae", "text_encoder", "scheduler", "tokenizer"])
def test_code_is_refused(work: Work, component: str) -> None:
    (work.base / component / "modeling.py").write_text("raise SystemExit('it ran')")
    assert f"{component}: modeling.py" in refused(work)


def test_configs_that_require_code_are_refused(work: Work) -> None:
    work.edit(
        "base/scheduler/scheduler_config.json", lambda config: config.update(_class_name=["my_scheduler", "Mine"])
    )
    work.edit("base/text_encoder/config.json", lambda config: config.update(auto_map={"AutoModel": "x.Y"}))
    message = refused(work)
    assert "my_scheduler" in message and "auto_map" in message


def test_another_class_is_refused(work: Work) -> None:
    work.edit("base/vae/config.json", lambda config: config.update(_class_name="AutoencoderKL"))
    assert "is of class 'AutoencoderKL', not AutoencoderKLCogVideoX" in refused(work)


def test_pickled_weights_and_links_that_lead_outside_are_refused(work: Work, tmp_path: Path) -> None:
    weights = work.base / "text_encoder" / "model.safetensors"
    weights.rename(work.base / "text_encoder" / "pytorch_model.bin")
    vae = work.base / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(tmp_path / "elsewhere.safetensors")
    vae.symlink_to(tmp_path / "elsewhere.safetensors")
    message = refused(work)
    assert "text_encoder: " in message and "never pickled weights" in message
    assert "vae: " in message and "is a link to" in message


def test_broken_weights_and_an_index_that_leads_outside_are_refused(work: Work) -> None:
    file = work.base / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    vae = work.base / "vae" / "diffusion_pytorch_model.safetensors"
    vae.unlink()
    vae.with_suffix(".safetensors.index.json").write_text('{"weight_map": {"a": "../text_encoder/model.safetensors"}}')
    message = refused(work)
    assert "text_encoder/model.safetensors is not a complete safetensors file" in message
    assert "../text_encoder/model.safetensors leads out of its folder" in message


def test_a_changed_export_is_refused(work: Work) -> None:
    file = work.run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert "transformer.diffusion_pytorch_model.safetensors is sha256" in refused(work)


def test_all_missing_paths_are_named(work: Work) -> None:
    message = refused(work, vae=str(work.folder / "nowhere"), scheduler=str(work.base / "vae"))
    assert "stage.vae" in message and "stage.scheduler" in message
    assert "stage=export" in _error(work, transformer=None, export=False)


def _error(work: Work, export: bool, **stage: Any) -> str:
    if not export:
        (work.run / "export").rename(work.run / "gone")
    with pytest.raises(PipelineError) as caught:
        assemble.run(work.config(**stage))
    return str(caught.value)


@pytest.mark.parametrize("name", list(MODEL_SPECS))
def test_a_transformer_without_a_record_must_fit_its_family(name: str) -> None:
    member = MODEL_SPECS[name]
    settings = {key: getattr(member, field) for key, field in ARCHITECTURE.items()}
    transformer = PipelineComponent("transformer", Path("t"), "CogVideoXTransformer3DModel", settings)
    assert family_of(transformer) == member
    expected = expectations(transformer, member)
    assert expected["scaling_factor"].value == member.scaling_factor
    assert expected["snr_shift_scale"].value == member.snr_shift_scale


def test_an_export_must_have_the_positions_of_its_family() -> None:
    member = MODEL_SPECS["cogvideox-5b"]
    settings = {key: getattr(member, field) for key, field in ARCHITECTURE.items()} | {
        "use_rotary_positional_embeddings": False,
        "out_channels": 16,
        "text_embed_dim": 4096,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
    }
    parts = {
        "transformer": PipelineComponent(
            "transformer",
            Path("t"),
            "CogVideoXTransformer3DModel",
            settings,
            training=TransformerOrigin(family="cogvideox-5b"),
        ),
        "vae": PipelineComponent(
            "vae",
            Path("v"),
            "AutoencoderKLCogVideoX",
            {"latent_channels": 16, "scaling_factor": 0.7, "temporal_compression_ratio": 4},
        ),
        "scheduler": PipelineComponent("scheduler", Path("s"), "CogVideoXDDIMScheduler", member.scheduler_config()),
        "text_encoder": PipelineComponent("text_encoder", Path("e"), "T5EncoderModel", {"d_model": 4096}),
    }
    with pytest.raises(
        PipelineError, match=r"use_rotary_positional_embeddings is false \(t/config.json\); its family has true"
    ):
        check_components(parts, ["a problem found before"])


def test_another_16_bit_dtype_than_in_training_is_refused(work: Work) -> None:
    """fp16 weights of a model trained in bf16 lose their range, and an fp16 VAE overflows."""

    def trained_in_bf16(report: dict[str, Any]) -> None:
        report["trained_with"]["dtype"] = "bf16"
        report["source"] = "/runs/a/checkpoints/step-000100"

    work.edit("run/export/export.json", trained_in_bf16)
    for path in (work.run / "export" / "transformer", work.base / "vae"):
        file = path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        save_file(tensors | {first: tensors[first].half()}, file, metadata={"format": "pt"})
    write_manifest(work.run / "export")
    message = refused(work)
    count = len(load_file(work.run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert f"transformer.dtype is fp16 (1 of {count} " in message
    assert "the transformer was trained in bf16" in message
    assert "To correct it: stage.transformer=/runs/a/checkpoints/step-000100 stage.dtype=bf16" in message
    assert "vae.dtype is fp16" in message and "text_encoder.dtype" not in message


def test_wider_and_requested_dtypes_are_accepted(work: Work) -> None:
    """fp32 weights of a model trained in bf16, and fp16 weights of a model trained in fp32."""
    work.edit("run/export/export.json", lambda report: report["trained_with"].update(dtype="bf16"))
    write_manifest(work.run / "export")
    assemble.run(work.config())
    file = work.run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    work.edit("run/export/export.json", lambda report: report["trained_with"].update(dtype="fp32"))
    write_manifest(work.run / "export")
    assemble.run(work.config())


def test_every_change_against_a_manifest_is_refused(work: Work) -> None:
    """An earlier pipeline with a changed, an additional and a missing file."""
    assemble.run(work.config(output=str(work.folder / "first")))
    first = work.folder / "first"
    file = first / "vae" / "diffusion_pytorch_model.safetensors"
    other = {name: tensor * 2 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(other, file, metadata={"format": "pt"})
    (first / "text_encoder" / "generation_config.json").write_text("{}")
    (first / "tokenizer" / "spiece.model").unlink()
    message = refused(work, base=str(first), vae=None)
    assert f"vae.{file.name} is sha256 {hash_file(file)} ({file}); it was published with sha256" in message
    assert "text_encoder.generation_config.json is sha256" in message and "published with no such file" in message
    assert "tokenizer.spiece.model is missing" in message
    (first / "manifest.json").write_text("{")
    assert "vae.manifest.json is unreadable" in refused(work, base=str(first))


def test_a_changed_file_of_the_hubs_cache_is_refused(work: Work) -> None:
    cache = work.folder / "models--zai--CogVideoX"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    shutil.copytree(work.base / "vae", snapshot / "vae")
    file = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    sha256 = hash_file(file)
    file.rename(blobs / sha256)
    file.symlink_to(f"../../../blobs/{sha256}")
    assemble.run(work.config(vae=str(snapshot)))
    assert hash_file(work.run / "pipeline" / "vae" / file.name) == sha256
    shutil.rmtree(work.run / "pipeline")
    data = bytearray((blobs / sha256).read_bytes())
    data[-3] ^= 1
    (blobs / sha256).unlink()
    (blobs / sha256).write_bytes(data)
    assert f"it was downloaded as sha256 {sha256}" in refused(work, vae=str(snapshot))


def test_missing_and_extra_tensors_are_refused(work: Work) -> None:
    """Diffusers loads both: it fills a missing tensor with noise and drops an extra one."""
    file = work.base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_more.weight"] = tensors.pop("decoder.conv_out.conv.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(work)
    assert "missing: decoder.conv_out.conv.bias [3]" in message and "extra: decoder.conv_more.weight [3]" in message


def test_a_tokenizer_with_a_shorter_length_is_refused(work: Work) -> None:
    work.edit("base/tokenizer/tokenizer_config.json", lambda config: config.update(model_max_length=8))
    assert (
        "tokenizer.model_max_length is 8" in (message := refused(work))
        and "text tokens of the transformer: 16" in message
    )
    assert "stage.set.tokenizer.model_max_length=16" in message


@pytest.mark.parametrize("name", [name for name in MODEL_SPECS if name != "tiny"])
def test_a_wrong_position_flag_does_not_hide_the_family(name: str) -> None:
    """All other keys identify the family."""
    member = MODEL_SPECS[name]
    settings = {key: getattr(member, field) for key, field in ARCHITECTURE.items()}
    settings["use_rotary_positional_embeddings"] = not settings["use_rotary_positional_embeddings"]
    part = PipelineComponent("transformer", Path("t"), "CogVideoXTransformer3DModel", settings)
    assert family_of(part) == member


def test_the_positions_of_the_checkpoint_are_preferred(work: Work) -> None:
    fact = {"fact": "position", "value": "sincos", "from": "2b.yaml"}
    work.edit("run/export/export.json", lambda report: report.update(facts=[fact]))
    write_manifest(work.run / "export")
    message = refused(work)
    assert "transformer.use_rotary_positional_embeddings is true" in message
    assert "the checkpoint has false" in message and "which has it from 2b.yaml" in message


def test_the_family_of_the_command_is_preferred(work: Work) -> None:
    config = dataclasses.replace(work.config(), model=ModelConfig(name="cogvideox-2b"))
    with pytest.raises(PipelineError) as caught:
        assemble.run(config)
    assert "transformer.use_rotary_positional_embeddings is true" in caught.value.message
    assert "the facts of cogvideox-2b" in caught.value.message
