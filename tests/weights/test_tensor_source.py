"""Test reading safetensors folders: broken files and paths outside the folder are refused before they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file

from cogflow.errors import CheckpointError
from cogflow.weights.tensor_source import SAFETENSORS_DTYPES, STEM, WeightsFolder, contained_file

INDEX = f"{STEM}.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path, transformer: CogVideoXTransformer3DModel) -> Path:
    transformer.save_pretrained(tmp_path / "t", max_shard_size="60KB")
    assert len(list((tmp_path / "t").glob("*.safetensors"))) >= 2
    return tmp_path / "t"


def edit_index(folder: Path, name: str, shard: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    if shard is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


def test_every_tensor_of_all_shards_is_read(sharded: Path, transformer: CogVideoXTransformer3DModel) -> None:
    weights = WeightsFolder(sharded)
    expected = transformer.state_dict()
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name])
        assert weights.tensors[name].shape == tuple(tensor.shape) and weights.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/secret.safetensors", "..\\secret.safetensors"])
def test_an_index_that_leads_outside_is_refused(sharded: Path, name: str) -> None:
    save_file({"proj_out.bias": torch.zeros(64)}, sharded.parent / "secret.safetensors")
    edit_index(sharded, "proj_out.bias", name)
    with pytest.raises(CheckpointError, match=r"leads out|absolute"):
        WeightsFolder(sharded)


def test_a_shard_that_is_a_link_to_the_outside_is_refused(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.rename(sharded.parent / "elsewhere.safetensors")
    shard.symlink_to(sharded.parent / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="link"):
        WeightsFolder(sharded)


def test_links_inside_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    component = repo / "snapshots" / "abc" / "transformer"
    component.mkdir(parents=True)
    (repo / "blobs").mkdir()
    save_file({"a": torch.zeros(2)}, repo / "blobs" / "1234")
    (component / f"{STEM}.safetensors").symlink_to("../../../blobs/1234")
    assert list(WeightsFolder(component).tensors) == ["a"]
    (tmp_path / "outside").write_bytes(b"")
    (component / "x.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="link"):
        contained_file(component, "x.safetensors")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        WeightsFolder(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        WeightsFolder(sharded)


def test_an_index_in_conflict_with_shards_is_refused(sharded: Path) -> None:
    edit_index(sharded, "proj_out.bias", None)
    with pytest.raises(CheckpointError, match=r"proj_out.bias: in .*, not in the index"):
        WeightsFolder(sharded)


def test_one_name_in_two_files_is_refused(sharded: Path) -> None:
    save_file({"norm_final.weight": torch.zeros(32)}, sharded / "more.safetensors")
    edit_index(sharded, "extra", "more.safetensors")
    with pytest.raises(CheckpointError, match="in two files"):
        WeightsFolder(sharded)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"safetensors only|holds no"):
        WeightsFolder(tmp_path)


def test_a_single_file_beside_an_index_is_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(1)}, sharded / f"{STEM}.safetensors")
    with pytest.raises(CheckpointError, match="unclear"):
        WeightsFolder(sharded)


def test_values_equal_those_that_safetensors_reads(tmp_path: Path) -> None:
    """Test every dtype, empty tensors, scalars, and tensors that are not aligned in the file."""
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        **{str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in SAFETENSORS_DTYPES.values()},
    }
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    folder = WeightsFolder(tmp_path)
    assert folder.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = folder.read(name)
        assert found.dtype == tensor.dtype == folder.tensors[name].dtype and torch.equal(found, tensor), name
    data = b"\x07" + torch.tensor([1.0, 2.0]).numpy().tobytes()
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert torch.equal(WeightsFolder(tmp_path).read("b"), torch.tensor([1.0, 2.0]))
