"""Test reading .pt files: which are accepted, which are refused, and that no code in them runs."""

from __future__ import annotations

import gzip
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogflow.errors import CheckpointError
from cogflow.weights.torch_file import RANDOM_STATES, InertObject, TorchFile, load_torch_file

WEIGHTS = OrderedDict(
    [
        ("a.weight", torch.arange(6.0).view(2, 3)),
        ("a.bias", torch.ones(2, dtype=torch.bfloat16)),
        ("n", torch.tensor(3)),
    ]
)


class CodeRunner:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def check(file: TorchFile) -> None:
    assert {name: (info.shape, info.dtype, info.file) for name, info in file.tensors.items()} == {
        name: (tuple(value.shape), value.dtype, file.path) for name, value in WEIGHTS.items()
    }
    assert all(torch.equal(file.read(name), value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize(
    ("wrap", "wrapper"),
    [
        (lambda w: w, "none"),
        (lambda w: {"module": w}, "module"),
        (lambda w: {"model": dict(w), "epoch": 3}, "model"),
        (lambda w: {"state_dict": w, "optimizer_states": [{"state": {0: torch.ones(2)}}]}, "state_dict"),
        (lambda w: {"state_dict": {"module": w}}, "state_dict/module"),
        (lambda w: {f"module.{name}": value for name, value in w.items()}, "module.*"),
        (lambda w: {"module": {f"module.{name}": value for name, value in w.items()}}, "module/module.*"),
        (
            lambda w: {
                "model": {name: torch.nn.Parameter(v, requires_grad=v.is_floating_point()) for name, v in w.items()}
            },
            "model",
        ),
    ],
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_wrappers_of_state_dicts_are_removed(
    tmp_path: Path, wrap: Callable[[Any], Any], wrapper: str, new: bool
) -> None:
    file = TorchFile(saved(tmp_path / "x.pt", wrap(WEIGHTS), _use_new_zipfile_serialization=new))
    check(file)
    assert file.wrapper == file.metadata["wrapper"] == wrapper
    assert type(file.read("a.bias")) is torch.Tensor and not file.read("a.weight").requires_grad


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_random_states_are_read_as_inert_objects(tmp_path: Path, module: str) -> None:
    """Random states of numpy 1 and 2 in SAT's checkpoints are read without calling numpy."""
    content = {
        "module": WEIGHTS,
        "iteration": 500,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
        "np_rng_state": np.random.RandomState(0).get_state(),
        "random_rng_state": random.Random(0).getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "optimizer": None,
        "param_shapes": [OrderedDict(a=torch.Size([2]))],
    }
    path = saved(tmp_path / "x.pt", content)
    text = path.read_bytes()
    here = b"numpy._core.multiarray" if b"numpy._core.multiarray" in text else b"numpy.core.multiarray"
    assert here in text
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(here + b"\n", module.encode() + b"\n"))
    file = TorchFile(tmp_path / "y.pt")
    check(file)
    assert file.metadata == {"iteration": 500, "mp_world_size": 1, "ds_version": "0.19.8", "wrapper": "module"}
    state = load_torch_file(tmp_path / "y.pt")["np_rng_state"]
    assert isinstance(state[1], InertObject) and not isinstance(state[1], np.ndarray)


def test_tensors_are_mapped_from_the_file(tmp_path: Path) -> None:
    """A value written to the file after opening is visible, so nothing was copied."""
    path = saved(tmp_path / "x.pt", {"a": torch.full((4096,), 7.0)})
    file = TorchFile(path)
    content = path.read_bytes()
    start = content.index(torch.full((4096,), 7.0).numpy().tobytes())
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(np.float32(9.0).tobytes())
    assert file.read("a")[0] == 9.0 and file.read("a")[1] == 7.0


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_that_needs_other_code_is_refused(tmp_path: Path, new: bool, wrapped: bool) -> None:
    trace = tmp_path / "ran"
    content = {"module": WEIGHTS, "x": CodeRunner(str(trace))} if wrapped else CodeRunner(str(trace))
    path = saved(tmp_path / "x.pt", content, _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"needs (_?io\.)?open to be read") as error:
        TorchFile(path)
    assert error.value.exit_code == 2 and not trace.exists()


def test_only_listed_classes_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(1), "random": np.random.RandomState(0)})
    with pytest.raises(CheckpointError, match=r"needs numpy\.random"):
        TorchFile(path)
    path = saved(tmp_path / "y.pt", {"a": torch.ones(1), "state": np.zeros(2)})
    assert TorchFile(path).tensors.keys() == {"a"}
    with pytest.raises(CheckpointError, match="needs numpy"):
        load_torch_file(path, inert=RANDOM_STATES[2:])


def squeezed(path: Path) -> bytes:
    """Return the archive packed again with compression."""
    target = path.with_suffix(".zip")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    return target.read_bytes()


def other_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        archive.writestr("weights/mp_rank_00_model_states.pt", b"x")
    return path.with_suffix(".zip").read_bytes()


@pytest.mark.parametrize(
    ("name", "broken", "complaint"),
    [
        ("empty", lambda p: b"", "is empty"),
        ("half", lambda p: p.read_bytes()[: p.stat().st_size // 2], "is truncated"),
        ("almost", lambda p: p.read_bytes()[:-30], "is truncated"),
        (
            "middle",
            lambda p: p.read_bytes()[:600] + p.read_bytes()[900:],
            "is (damaged|truncated)|cannot be read safely|no checkpoint",
        ),
        ("lfs", lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs pointer"),
        ("html", lambda p: b"\n<!DOCTYPE html><html>404</html>", "web page"),
        ("safetensors", lambda p: (64).to_bytes(8, "little") + b'{"a":{}}' + b" " * 100, "looks like safetensors"),
        ("gzip", lambda p: gzip.compress(p.read_bytes()), "compressed with gzip"),
        ("pickle", lambda p: pickle.dumps({"a": 1}), "a pickle that torch did not write"),
        ("json", lambda p: b'{"a": 1}', "looks like JSON"),
        ("text", lambda p: b"hello", "begins with b'hello'"),
        ("zip", other_zip, "torch did not write. It holds weights/mp_rank_00_model_states.pt"),
        ("squeezed", squeezed, "packed again with compression"),
    ],
)
def test_files_of_other_kinds_are_refused(
    tmp_path: Path, name: str, broken: Callable[[Path], bytes], complaint: str
) -> None:
    good = saved(tmp_path / "good.pt", {"module": WEIGHTS})
    path = tmp_path / f"{name}.pt"
    path.write_bytes(broken(good))
    with pytest.raises(CheckpointError, match=complaint) as error:
        TorchFile(path)
    assert str(path) in error.value.message and error.value.hint and "Traceback" not in str(error.value)


def test_truncated_old_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", WEIGHTS, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="is damaged"):
        TorchFile(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"iteration": 3, "args": {"lr": 1}}, "(?s)no tensors by name.*'iteration': int"),
        ({}, "is {}"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({0: torch.ones(1)}, "no tensors by name"),
        ({0: torch.ones(1), "a": torch.ones(1)}, "no text: 0"),
        ({"module": WEIGHTS, "state_dict": WEIGHTS}, "under module and state_dict"),
        ({"a": torch.ones(2).to_sparse()}, "a: torch.sparse_coo"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        TorchFile(saved(tmp_path / "x.pt", content))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        TorchFile(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        TorchFile(tmp_path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_random_damage_is_read_or_refused(tmp_path: Path, new: bool) -> None:
    """A pickle with random changes is read or raises CheckpointError, never another exception."""
    good = saved(
        tmp_path / "good.pt", {"module": WEIGHTS, "state": np.random.get_state()}, _use_new_zipfile_serialization=new
    )
    chance, refused = random.Random(0), 0
    for _ in range(60):
        content = bytearray(good.read_bytes())
        start = content.index(b"module") - 8
        for _ in range(3):
            content[start + chance.randrange(300)] = chance.randrange(256)
        (tmp_path / "x.pt").write_bytes(content)
        try:
            TorchFile(tmp_path / "x.pt")
        except CheckpointError:
            refused += 1
    assert refused > 20
