"""Test that streamed files equal those of the libraries and that statistics match the values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogflow.errors import ConfigError
from cogflow.records.export_records import TensorStatistics
from cogflow.weights.torch_file import TorchFile
from cogflow.weights.weights_writer import PlannedTensor, SafetensorsFormat, write_safetensors, write_torch_file

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"of.{str(dtype)[6:]}": (torch.randn(37, 5) * 50).to(dtype) for dtype in DTYPES}
    made |= {
        "yes": torch.tensor([True, False]),
        "é": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "cut": torch.randn(6, 8)[:, ::2],
    }
    return made


def outputs(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]  # type: ignore[misc]


def write(
    tensors: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None = None, shard: str = "5GB"
) -> dict[str, TensorStatistics]:
    facts: list[TensorStatistics] = []
    hashes = write_safetensors(outputs(tensors), SafetensorsFormat(folder, dtype, "model", shard), facts.append)
    for name, sha256 in hashes.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
    return {fact.name: fact for fact in facts}


def test_a_file_equals_that_of_safetensors_byte_for_byte(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tensors, tmp_path)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        tmp_path / "theirs.safetensors",
        metadata={"format": "pt"},
    )
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_hold_every_tensor_once_and_the_index_names_its_file(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(30, 30) for i in range(7)}
    write(tensors, tmp_path, shard="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4 and index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
        assert (tmp_path / file).stat().st_size < 9000


def test_an_invalid_shard_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        write({"x": torch.zeros(2)}, tmp_path, shard="lots")


def test_the_statistics_of_a_cast_equal_those_computed_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(70_001) * 3 + 1  # more than one chunk, and not a multiple of the chunk size
    x[:4] = torch.tensor([1e-42, 1e-7, 7e4, 0.0])
    fact = write({"x": x}, tmp_path, torch.float16)["x"]
    out = load_file(tmp_path / "model.safetensors")["x"]
    finite = out.isfinite()
    change = (out.double() - x.double()).abs()
    assert torch.equal(out, x.half())
    assert fact.mean_in == pytest.approx(float(x.double().mean()), rel=1e-12)
    assert fact.std_in == pytest.approx(float(x.double().std(correction=0)), rel=1e-9)
    assert fact.absmax_in == 7e4 and fact.absmax_out == float(out[finite].abs().max())
    assert fact.changed == float(change[finite].max())
    assert fact.relative == 1.0  # a value that became zero changed by all of itself
    subnormal = int(((out != 0) & (out.abs().double() < torch.finfo(torch.float16).tiny)).sum())
    assert (fact.became_inf, fact.became_zero, fact.nonfinite) == (1, 1, 0) and fact.became_subnormal == subnormal >= 1
    assert fact.sha256 == hashlib.sha256(out.numpy().tobytes()).hexdigest() != fact.sha256_in
    assert fact.sha256_in == hashlib.sha256(x.numpy().tobytes()).hexdigest()


def test_earlier_rounding_is_detected(tmp_path: Path) -> None:
    torch.manual_seed(2)
    x = torch.randn(5000)
    facts = write({"free": x, "bf16": x.bfloat16().float(), "fp16": x.half().float(), "zero": torch.zeros(9)}, tmp_path)
    assert {name: fact.holds_only for name, fact in facts.items()} == {
        "free": None,
        "bf16": "bfloat16",
        "fp16": "float16",
        "zero": None,
    }


def test_nan_and_infinity_are_counted_separately(tmp_path: Path) -> None:
    x = torch.ones(100_000)
    x[7], x[99_999], x[50_000] = float("nan"), float("inf"), -3.0
    fact = write({"x": x}, tmp_path, torch.bfloat16)["x"]
    assert (fact.nonfinite, fact.became_inf, fact.absmax_in) == (2, 0, 3.0)
    assert fact.mean_in == pytest.approx((99_997 - 3) / 99_998)


def test_a_torch_file_loads_in_torch_and_is_deterministic(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_torch_file(
            tmp_path / name / "x.pt",
            outputs(tensors),
            key="module",
            beside={"iteration": 7},
            dtype_of=lambda output: output.dtype,
            on_tensor=lambda statistics: None,
        )
    assert (tmp_path / "one" / "x.pt").read_bytes() == (tmp_path / "two" / "x.pt").read_bytes()
    loaded = torch.load(tmp_path / "one" / "x.pt", weights_only=True)
    assert loaded["iteration"] == 7 and list(loaded["module"]) == list(tensors)
    mapped = TorchFile(tmp_path / "one" / "x.pt")
    for name, tensor in tensors.items():
        assert torch.equal(loaded["module"][name], tensor) and torch.equal(mapped.read(name), tensor)


def test_a_torch_file_is_written_in_the_requested_dtype(tmp_path: Path) -> None:
    x = torch.randn(11, 3)
    write_torch_file(
        tmp_path / "x.pt",
        outputs({"x": x}),
        key="state_dict",
        beside={},
        dtype_of=lambda output: torch.bfloat16,
        on_tensor=lambda statistics: None,
    )
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["state_dict"]["x"], x.bfloat16())
