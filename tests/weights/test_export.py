"""Test the export of cogflow's own checkpoints: the same weights in diffusers' layout, or nothing is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from saving import TRAINED_WITH, small_transformer

from cogflow.artifacts.identify import identify
from cogflow.errors import CheckpointError, ConfigError, ConversionError, QualityGateError
from cogflow.export.export_plan import ExportRequest, prepare_export
from cogflow.export.origin import find_transformer, open_origin
from cogflow.export.to_diffusers import export_diffusers
from cogflow.files.hashing import hash_file
from cogflow.files.publish import MANIFEST, check_manifest, write_manifest
from cogflow.files.record_io import record_values
from cogflow.weights.tensor_source import STEM, WeightsFolder

WEIGHTS = f"{STEM}.safetensors"
Save = Callable[..., Path]


def export(
    source: Path, output: Path, weights: str = "auto", dtype: str = "auto", shard: str = "5GB"
) -> dict[str, Any]:
    origin = open_origin(identify(source), ["transformer"], weights=weights)
    prepared = prepare_export(origin, ExportRequest(["transformer"], dtype=dtype))
    return record_values(export_diffusers(prepared, origin, output, shard))


def load(output: Path) -> CogVideoXTransformer3DModel:
    model, info = CogVideoXTransformer3DModel.from_pretrained(output, subfolder="transformer", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def assert_nothing_published(output: Path) -> None:
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


def edit(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None], rehash: bool = True) -> None:
    """Change the tensors of a checkpoint. ``rehash``: update its manifest, too."""
    file = checkpoint / "transformer" / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if rehash:
        write_manifest(checkpoint)


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_from_pretrained_loads_an_exported_checkpoint_to_the_bit(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel, shard: str
) -> None:
    report = export(save_checkpoint(100, transformer), tmp_path / "out", shard=shard)
    loaded, expected = load(tmp_path / "out").state_dict(), transformer.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(
        torch.equal(loaded[name], expected[name]) and loaded[name].dtype == expected[name].dtype for name in expected
    )
    files = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(files) == 1 if shard == "5GB" else len(files) > 1
    assert check_manifest(tmp_path / "out") == []
    assert report["source_weights_sha256"] == report["weights_sha256"]
    assert report["step"] == 100 and report["trained_with"] == TRAINED_WITH and report["dtype"] == "fp32"
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == json.loads(json.dumps(report))


def test_sharded_sources_export_to_the_same_files(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    export(save_checkpoint(1, transformer), tmp_path / "one")
    export(save_checkpoint(2, transformer, shard="60KB"), tmp_path / "two")
    assert hash_file(tmp_path / "one" / "transformer" / WEIGHTS) == hash_file(
        tmp_path / "two" / "transformer" / WEIGHTS
    )


def test_dtype_auto_casts_to_the_dtype_of_training_and_reports_the_change(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    report = export(save_checkpoint(1, transformer, dtype="bf16"), tmp_path / "out")
    loaded = dict(WeightsFolder(tmp_path / "out" / "transformer").items())
    facts = {fact["name"]: fact for fact in report["tensors"]}
    assert report["dtype"] == "bf16" and facts.keys() == loaded.keys()
    assert report["source_weights_sha256"] != report["weights_sha256"]
    for name, tensor in transformer.state_dict().items():
        assert loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], tensor.bfloat16())
        fact, out = facts[name], tensor.bfloat16().double()
        assert (fact["dtype_in"], fact["dtype_out"], fact["shape"]) == ("float32", "bfloat16", list(tensor.shape))
        assert fact["changed"] == pytest.approx(float((tensor.double() - out).abs().max()), abs=1e-12)
        assert fact["mean_in"] == pytest.approx(float(tensor.double().mean()), abs=1e-9)
        assert fact["std_out"] == pytest.approx(float(out.std(correction=0)), abs=1e-9)
        assert fact["absmax_in"] == pytest.approx(float(tensor.abs().max()))
    assert report["summary"]["changed"] > 0


def test_the_newest_complete_checkpoint_of_a_run_is_exported(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    for step in (9, 50, 100):
        newest = save_checkpoint(step, transformer)
    assert find_transformer(identify(tmp_path / "run")).step == 100
    (newest / "deepspeed" / "states.pt").write_bytes(b"optimizes")
    source = find_transformer(identify(tmp_path / "run"))
    assert source.step == 50
    assert source.passed_over == ["step-000100/deepspeed/states.pt: content changed (sha256 differs)"]


def test_weights_selects_ema_or_model(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    average = small_transformer()
    torch.nn.init.constant_(average.proj_out.bias, 0.5)
    checkpoint = save_checkpoint(1, transformer, ema=average)
    assert export(checkpoint, tmp_path / "auto")["weights"] == "ema"
    assert load(tmp_path / "auto").proj_out.bias[0] == 0.5
    assert export(checkpoint, tmp_path / "model", weights="model")["weights"] == "model"
    assert load(tmp_path / "model").proj_out.bias[0] != 0.5
    with pytest.raises(CheckpointError, match="ema"):
        export(save_checkpoint(2, transformer), tmp_path / "none", weights="ema")


def test_a_plain_transformer_folder_keeps_its_dtype(tmp_path: Path, transformer: CogVideoXTransformer3DModel) -> None:
    transformer.to(torch.float16).save_pretrained(tmp_path / "plain" / "transformer")
    for place in (tmp_path / "plain", tmp_path / "plain" / "transformer"):
        report = export(place, tmp_path / "out")
        assert report["dtype"] == "fp16" and report["trained_with"] is None
        assert {info.dtype for info in WeightsFolder(tmp_path / "out" / "transformer").tensors.values()} == {
            torch.float16
        }


def test_an_export_of_an_export_keeps_trained_with(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    export(save_checkpoint(7, transformer), tmp_path / "one")
    report = export(tmp_path / "one", tmp_path / "two", dtype="bf16")
    assert report["trained_with"] == TRAINED_WITH and report["step"] == 7


def test_a_changed_shard_is_refused_before_it_is_read(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    checkpoint = save_checkpoint(1, transformer)
    file = checkpoint / "transformer" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"transformer/{WEIGHTS}: content changed"):
        export(checkpoint, tmp_path / "out")
    with pytest.raises(CheckpointError, match="step-000001/transformer"):
        export(tmp_path / "run", tmp_path / "out")
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=MANIFEST):
        export(checkpoint, tmp_path / "out")
    assert_nothing_published(tmp_path / "out")


def test_all_missing_extra_and_misshapen_tensors_are_listed(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    checkpoint = save_checkpoint(1, transformer)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["proj_out.bias"]
        tensors["encoder.stray"] = torch.zeros(3)
        tensors["norm_final.bias"] = torch.zeros(5)

    edit(checkpoint, change)
    with pytest.raises(ConversionError) as caught:
        export(checkpoint, tmp_path / "out")
    for line in (
        "missing: proj_out.bias [64]",
        "extra: encoder.stray [3]",
        "shape: norm_final.bias is [5], its config asks for [32]",
    ):
        assert line in caught.value.message
    assert caught.value.exit_code == 2
    assert_nothing_published(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stop_the_export(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel, value: float
) -> None:
    checkpoint = save_checkpoint(1, transformer)
    edit(checkpoint, lambda tensors: tensors["transformer_blocks.1.attn1.to_q.weight"].view(-1)[3:5].fill_(value))  # type: ignore[arg-type]
    with pytest.raises(QualityGateError, match=r"transformer_blocks.1.attn1.to_q.weight: 2 values") as caught:
        export(checkpoint, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert_nothing_published(tmp_path / "out")


def test_overflow_in_fp16_stops_the_export_and_underflow_is_counted(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    checkpoint = save_checkpoint(1, transformer)
    edit(checkpoint, lambda tensors: tensors["proj_out.bias"][:2].copy_(torch.tensor([1e5, 1e-10])))  # type: ignore[arg-type]
    with pytest.raises(QualityGateError, match="proj_out.bias: 1 values beyond float16"):
        export(checkpoint, tmp_path / "out", dtype="fp16")
    assert_nothing_published(tmp_path / "out")
    fact = next(
        f for f in export(checkpoint, tmp_path / "out", dtype="bf16")["tensors"] if f["name"] == "proj_out.bias"
    )
    assert (fact["became_inf"], fact["became_zero"]) == (0, 0)
    edit(checkpoint, lambda tensors: tensors["proj_out.bias"][:1].fill_(0.0))  # type: ignore[arg-type]
    assert export(checkpoint, tmp_path / "out", dtype="fp16")["summary"]["became_zero"] >= 1


def test_a_second_export_replaces_the_first_and_a_failed_one_keeps_it(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    export(save_checkpoint(1, transformer), tmp_path / "out")
    broken = save_checkpoint(3, transformer)
    edit(broken, lambda tensors: tensors["proj_out.bias"].fill_(float("nan")))  # type: ignore[arg-type]
    with pytest.raises(QualityGateError):
        export(broken, tmp_path / "out")
    assert check_manifest(tmp_path / "out") == [] and load(tmp_path / "out").proj_out.bias.isfinite().all()
    torch.nn.init.constant_(transformer.proj_out.bias, 2.0)
    export(save_checkpoint(2, transformer), tmp_path / "out")
    assert (load(tmp_path / "out").proj_out.bias == 2.0).all()


def test_a_folder_with_custom_code_or_of_another_class_is_refused(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    checkpoint = save_checkpoint(1, transformer)
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for change in (
        {"_class_name": ["my_code", "Mine"]},
        {"auto_map": {"AutoModel": "x.Y"}},
        {"_class_name": "Other"},
        {"num_layer": 3},
    ):
        path.write_text(json.dumps(config | change))
        write_manifest(checkpoint)
        with pytest.raises(ConversionError):
            export(checkpoint, tmp_path / "out")
    assert_nothing_published(tmp_path / "out")


def test_wrong_options_and_paths_are_refused(
    tmp_path: Path, save_checkpoint: Save, transformer: CogVideoXTransformer3DModel
) -> None:
    checkpoint = save_checkpoint(1, transformer)
    for wrong in ({"weights": "best"}, {"dtype": "fp8"}, {"shard": "lots"}):
        with pytest.raises(ConfigError):
            export(checkpoint, tmp_path / "out", **wrong)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(CheckpointError):
            export(place, tmp_path / "out")
    assert_nothing_published(tmp_path / "out")
