"""Test the whole export of folders that SAT wrote, as ``stage=export`` runs it, in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from golden_sets import GoldenSet, kept, set_name, sets
from safetensors.torch import load_file

from cogflow.artifacts.identify import identify
from cogflow.errors import ConfigError, ConversionError, QualityGateError, StorageError
from cogflow.export import sat_tables
from cogflow.export.export_plan import ExportRequest, check_computed_tables, prepare_export
from cogflow.export.origin import open_origin
from cogflow.export.tensor_operations import Rename
from cogflow.export.to_diffusers import export_diffusers
from cogflow.export.to_sat import export_sat
from cogflow.files.publish import check_manifest
from cogflow.files.record_io import record_values
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.weights.torch_file import TorchFile

SETS = pytest.mark.parametrize("golden", sets(), ids=set_name)


def export(
    source: Path,
    output: Path,
    wanted: tuple[str, ...] = ("transformer",),
    dtype: str = "auto",
    to: str = "diffusers",
    **more: Any,
) -> dict[str, Any]:
    given = more.get("given", {})
    origin = open_origin(identify(source), wanted, configs=more.get("configs", []))
    request = ExportRequest(wanted, more.get("family", "auto"), given, dtype, more.get("separate", False))
    prepared = prepare_export(origin, request)
    if to == "sat":
        return record_values(export_sat(prepared, origin, output, given))
    return record_values(
        export_diffusers(prepared, origin, output, more.get("shard", "5GB"), more.get("verify", "auto"))
    )


@SETS
def test_an_fp32_export_computes_sats_output(golden: GoldenSet, tmp_path: Path) -> None:
    report = export(golden.folder, tmp_path / "out", dtype="fp32")
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer").eval()
    recorded = golden.recorded()
    latents = recorded["forward.latents"]
    if "forward.concat_latents" in recorded:
        latents = torch.cat([latents, recorded["forward.concat_latents"]], dim=2)
    _, frames, _, height, width = latents.shape
    per_t = model.config.patch_size_t or 1
    rotary = rotary_tables(model, frames, height, width, latents.device)
    assert rotary is None or len(rotary[0]) == frames // per_t * (height // 2) * (width // 2)
    with torch.no_grad():
        output = model(
            latents,
            recorded["forward.text_embeds"],
            recorded["forward.timesteps"],
            ofs=recorded.get("forward.ofs"),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    assert float((output - recorded["forward.output"]).abs().max()) < 5e-5
    (run,) = report["proof"]["transformer"]["runs"]
    assert run["difference"] < 5e-6 < run["eps_difference"] < 5e-5
    assert run["layers"] == list(range(model.config.num_layers))
    assert check_manifest(tmp_path / "out") == []


@SETS
def test_verify_ends_compares_the_first_and_the_last_block(golden: GoldenSet, tmp_path: Path) -> None:
    runs = export(golden.folder, tmp_path / "out", verify="ends")["proof"]["transformer"]["runs"]
    assert [run["layers"] for run in runs] == [[0], [len(golden.network()) and golden.network()["num_layers"] - 1]]
    assert all(run["difference"] < 5e-6 and run["absmax"] > 0.5 for run in runs)


def test_every_source_tensor_is_used_or_dropped(tmp_path: Path) -> None:
    report = export(kept("5b-i2v").folder, tmp_path / "out", ("transformer", "text_encoder", "vae"))
    source = kept("5b-i2v").checkpoint().tensors
    used = {name for fact in report["tensors"] for name in fact["sources"]}
    assert used | {entry["source"] for entry in report["dropped"]} == {
        name.removeprefix("model.diffusion_model.") for name in source if name.startswith("model.diffusion_model.")
    }
    assert report["summary"]["operations"] == {"regroup": 8, "rename": 45, "split": 12}
    assert len(report["components"]["vae"]["tensors"]) == sum(name.startswith("first_stage_model.") for name in source)
    # The embedding is stored under two names and written once.
    assert (
        len(report["components"]["text_encoder"]["tensors"])
        == sum(name.startswith("conditioner.") for name in source) - 1
    )
    assert report["trained_with"]["scaling_factor"] == 0.7 and report["trained_with"]["max_sequence_length"] == 10
    assert json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())["snr_shift_scale"] == 1.0
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"] == 0.7


def test_unrequested_components_are_counted_as_ignored(tmp_path: Path) -> None:
    report = export(kept("5b-i2v").folder, tmp_path / "out")
    assert report["ignored"] == {"vae": 148, "text_encoder": 13}


@pytest.mark.parametrize("separate", [False, True])
def test_the_same_source_gives_the_same_bytes(tmp_path: Path, separate: bool) -> None:
    source = kept("5b-lora").folder
    reports = [export(source, tmp_path / name, shard="100KB", separate=separate) for name in ("one", "two")]
    assert reports[0]["files"] == reports[1]["files"]
    assert (tmp_path / "one" / "export.json").read_bytes() == (tmp_path / "two" / "export.json").read_bytes()


def test_the_output_comparison_finds_a_swapped_pair_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two swapped norms of one shape load strictly but change the output."""
    table = sat_tables.transformer_table
    one, other = "transformer_blocks.1.attn1.norm_q.weight", "transformer_blocks.1.attn1.norm_k.weight"

    def swapped(config: Any, rows: int = 64) -> Any:
        names = {one: other, other: one}
        return tuple(
            Rename(row.source, names[row.target]) if isinstance(row, Rename) and row.target in names else row
            for row in table(config, rows)
        )

    monkeypatch.setattr(sat_tables, "transformer_table", swapped)
    with pytest.raises(QualityGateError, match="does not compute"):
        export(kept("5b-i2v").folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_position_table_of_another_grid_is_refused(tmp_path: Path) -> None:
    origin = open_origin(identify(kept("2b").folder), ["transformer"])
    prepared = prepare_export(origin, ExportRequest(["transformer"]))
    (component,) = prepared.components
    assert check_computed_tables(component) == {"mixins.pos_embed.pos_embedding": 0.0}
    wrong = prepare_export(origin, ExportRequest(["transformer"])).components[0]
    source = wrong.source
    assert source is not None
    read = source.read
    source.read = lambda name: read(name) * (1.01 if "pos_embedding" in name else 1.0)  # type: ignore[method-assign]
    with pytest.raises(ConversionError, match="pos_embedding"):
        check_computed_tables(wrong)


def test_non_finite_values_stop_the_export(tmp_path: Path) -> None:
    folder = kept("5b-lora").folder
    content = torch.load(folder / "500" / "mp_rank_00_model_states.pt", weights_only=False)
    content["module"]["model.diffusion_model.time_embed.0.bias"][2] = float("nan")
    torch.save({"module": content["module"]}, tmp_path / "bad.pt")
    with pytest.raises(QualityGateError, match="time_embedding.linear_1.bias: 1 values") as caught:
        export(tmp_path / "bad.pt", tmp_path / "out", configs=[str(folder / "training_config.yaml")])
    assert caught.value.exit_code == 3 and not (tmp_path / "out").exists()


def test_lora_is_merged_or_written_separately(tmp_path: Path) -> None:
    folder = kept("5b-lora").folder
    merged = export(folder, tmp_path / "merged", dtype="fp32")
    separate = export(folder, tmp_path / "separate", dtype="fp32", separate=True)
    # SAT reads alpha only from the yaml; its default is 1.
    content = yaml.safe_load((folder / "training_config.yaml").read_text())
    content["model"]["network_config"]["params"]["modules"]["lora_config"]["params"]["lora_alpha"] = 2
    (tmp_path / "alpha.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(folder / "500" / "mp_rank_00_model_states.pt", tmp_path / "alone.pt")
    twice = export(tmp_path / "alone.pt", tmp_path / "alpha", dtype="fp32", configs=[str(tmp_path / "alpha.yaml")])
    assert (
        merged["lora"]["scale"] == 1 / 8 and twice["lora"]["scale"] == 2 / 8 and separate["lora"]["how"] == "separate"
    )
    adapters = load_file(tmp_path / "separate" / "lora" / "pytorch_lora_weights.safetensors")
    name = "transformer_blocks.1.attn1.to_k"
    weights = [
        load_file(tmp_path / which / "transformer" / "diffusion_pytorch_model.safetensors")
        for which in ("merged", "separate", "alpha")
    ]
    delta = (
        adapters[f"transformer.{name}.lora_B.weight"].float() @ adapters[f"transformer.{name}.lora_A.weight"].float()
    )
    assert float(delta.abs().max()) > 1e-3
    assert torch.allclose(weights[1][f"{name}.weight"] + delta, weights[0][f"{name}.weight"], atol=1e-6)
    assert torch.allclose(weights[1][f"{name}.weight"] + 2 * delta, weights[2][f"{name}.weight"], atol=1e-6)


@SETS
def test_export_to_sat_restores_the_checkpoint(golden: GoldenSet, tmp_path: Path) -> None:
    export(golden.folder, tmp_path / "there")
    report = export(tmp_path / "there", tmp_path / "back", to="sat")
    (folder,) = (path for path in (tmp_path / "back").iterdir() if path.name == "500")
    again = TorchFile(folder / "mp_rank_00_model_states.pt")
    before = golden.checkpoint()
    ours = {name for name in before.tensors if name.startswith("model.diffusion_model.")}
    adapters = any("matrix_A" in name for name in ours)
    if not adapters:
        assert set(again.tensors) == ours
        for name in ours - {
            "model.diffusion_model.transformer.position_embeddings.weight"
        }:  # SAT never reads this table
            assert torch.equal(again.read(name).to(before.tensors[name].dtype), before.read(name)), name
    assert (tmp_path / "back" / "latest").read_text() == "500" and report["step"] == 500
    assert "equal to the bit" in report["proof"]["transformer"]["what"]
    # The written folder can be exported without facts from the user.
    once_more = export(tmp_path / "back", tmp_path / "more")
    first = json.loads((tmp_path / "there" / "export.json").read_text())
    assert once_more["weights_sha256"] == first["weights_sha256"]
    assert once_more["trained_with"] == first["trained_with"]


def test_missing_facts_are_requested_by_name(tmp_path: Path) -> None:
    folder = kept("5b-i2v").folder
    content = torch.load(folder / "500" / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save(content["module"], tmp_path / "bare.pt")
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "bare.pt", tmp_path / "out")
    assert (
        "scaling_factor" in str(caught.value) and "snr_shift_scale" in str(caught.value) and caught.value.exit_code == 2
    )
    given = {
        "scaling_factor": 0.7,
        "snr_shift_scale": 1.0,
        "dtype": "bf16",
        "latent_frames": 3,
        "latent_height": 8,
        "latent_width": 12,
        "temporal_compression": 4,
    }
    report = export(tmp_path / "bare.pt", tmp_path / "out", given=given)
    assert report["trained_with"]["scaling_factor"] == 0.7


def test_a_missing_component_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"holds no vae.*transformer"):
        export(kept("2b").folder, tmp_path / "out", ("transformer", "vae"))


def test_too_little_disk_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogflow.files.atomic_write.shutil.disk_usage", lambda path: type("usage", (), {"free": 10})())
    with pytest.raises(StorageError, match="GB"):
        export(kept("5b-lora").folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
