"""Attack the parsers of JSON, YAML, safetensors and pickles: each refuses within its limits, with exit code 2."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow.artifacts.identify import identify
from cogflow.config.sat_import import read_recipe
from cogflow.errors import CheckpointError, CogflowError, ConfigError, ConversionError
from cogflow.export.diffusers_configs import transformer_config
from cogflow.export.facts import published_facts
from cogflow.export.facts_from_yaml import read_yamls
from cogflow.export.reported_values import transformer_values_from_shapes
from cogflow.files.bounded_parsing import large_values, parse_json, read_json_object, read_yaml_file, read_yaml_text
from cogflow.files.publish import MANIFEST, check_manifest, read_manifest
from cogflow.files.record_io import parse_record
from cogflow.models.code_check import code_in, refuse_code
from cogflow.models.family import MODEL_SPECS
from cogflow.records.training_records import TrainerRecord
from cogflow.weights.foreign import part_files, read_step_folder
from cogflow.weights.strict_loading import meta_model
from cogflow.weights.tensor_source import TensorInfo, WeightsFolder, read_json
from cogflow.weights.torch_file import TorchFile, load_torch_file
from cogflow.weights.zero import ZeroCheckpoint, latest_step_folder, rank_files

JSON_BOMBS = {
    "nesting": "[" * 100_000,
    "closed nesting": '{"a":' * 3000 + "1" + "}" * 3000,
    "digits": '{"step": ' + "9" * 6000 + "}",
    "negative digits": '{"step": -' + "9" * 6000 + "}",
    "text": "no json",
}


@pytest.mark.parametrize("name", JSON_BOMBS)
def test_a_json_bomb_is_refused_by_every_reader(tmp_path: Path, name: str) -> None:
    text = JSON_BOMBS[name]
    path = tmp_path / "value.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="."):
        parse_json(text)
    assert read_json_object(path) == {}
    with pytest.raises(CheckpointError):
        read_json(path)
    with pytest.raises(CheckpointError):
        parse_record(text, TrainerRecord, "trainer.json")
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)
    assert check_manifest(tmp_path)


def test_a_json_text_of_too_many_values_or_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="values"):
        parse_json("[" + "[]," * 2000 + "[]]", max_bytes=10_000)
    with pytest.raises(ValueError, match="at most 100 are read"):
        parse_json('"' + "a" * 200 + '"', max_bytes=100)


YAML_BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "merged aliases": "a: &a {x: 1, y: 2}\n"
    + "".join(
        f"{new}: &{new} {{p: *{old}, q: *{old}}}\n" for old, new in zip("abcdefghij" * 2, "bcdefghijk" * 2, strict=True)
    ),
    "recursive alias": "a: &a [*a]\n",
    "flow nesting": "a: " + "[" * 3000 + "]" * 3000,
    "block nesting": "".join(" " * level + "a:\n" for level in range(3000)),
    "digits": "args: {train_iters: " + "9" * 6000 + "}",
    "hexadecimal digits": "args: {train_iters: 0x" + "f" * 6000 + "}",
    "sexagesimal digits": "args: {train_iters: 1" + ":59" * 3000 + "}",
    "tagged digits": "args: {train_iters: !!int '" + "9" * 6000 + "'}",
    "long text": "a: " + "x" * 100_000,
    "size": "# " + "x" * (1 << 20) + "\na: 1\n",
    "values": "a: [" + "1, " * 60_000 + "1]",
    "python tag": "a: !!python/object/apply:os.system ['true']",
    "bytes": "a: \x00",
}


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_a_yaml_bomb_is_refused_by_every_reader(tmp_path: Path, name: str) -> None:
    path = tmp_path / "training_config.yaml"
    path.write_text(YAML_BOMBS[name])
    with pytest.raises(ConfigError):
        read_yamls([path])
    assert any("cannot be read as yaml" in str(problem.text) for problem in read_recipe([str(path)]).problems)


def test_honest_yaml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("base: &base {lr: 1.0e-05, name: a}\nother: *base\nlist: [1, 2]\ntext: '${not resolved}'\n")
    assert read_yaml_file(path)["other"] == {"lr": 1e-5, "name": "a"}
    assert "base" in read_yaml_text(path)


@pytest.mark.parametrize("text", ["args: {experiment_name: '${oc.env:SECRET_KEY}'}", "'${oc.env:SECRET_KEY}': 1"])
def test_an_import_resolves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SECRET_KEY", "the-secret-value")
    path = tmp_path / "sft.yaml"
    path.write_text(text)
    problems = read_recipe([str(path)]).problems
    assert any("nothing is resolved" in problem.text for problem in problems)
    assert "the-secret-value" not in str(problems)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo" / "model.pt"
    path.parent.mkdir()
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_yamls([path]),
        load_torch_file,
        TorchFile,
        identify,
        lambda path: identify(path.parent),
        read_json,
        lambda path: read_manifest(path.parent),
        lambda path: WeightsFolder(path.parent, "model"),
    ],
)
def test_a_fifo_is_refused_at_once(fifo: Path, read: Callable[[Path], Any]) -> None:
    for name in (MANIFEST, "model.safetensors", "config.json", "latest"):
        os.mkfifo(fifo.parent / name)
    with pytest.raises(CogflowError) as caught:
        read(fifo)
    assert caught.value.exit_code == 2


# Weights


def infos(*names: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, (4,), torch.float32, Path("x.pt")) for name in names}


@pytest.mark.parametrize("number", ["1000000000", "9" * 5000])
def test_layer_numbers_do_not_set_the_work(number: str) -> None:
    problems: list[str] = []
    names = infos("transformer.layers.0.a.weight", f"transformer.layers.{number}.a.weight")
    values = transformer_values_from_shapes(names, {}, problems)
    assert problems or all(value.value == 1 for value in values if value.key == "layers")


def test_part_and_rank_numbers_do_not_set_the_work(tmp_path: Path) -> None:
    import re

    for name in ("mp_rank_00_model_states.pt", "mp_rank_999999999999_model_states.pt", "zero_9999999999_mp_1_x.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="lacks mp_rank_01_model_states.pt"):
        part_files(tmp_path)
    with pytest.raises(CheckpointError, match="lacks the files of ranks 0, 1"):
        rank_files(tmp_path, re.compile(r"zero_(\d+)_mp_(\d+)_x\.pt"), 1)


def test_missing_shards_are_named_and_not_counted(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-99999999.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is missing"):
        WeightsFolder(tmp_path, "model")


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "overlap": safetensors({"a": entry([8], 0, 32), "b": entry([8], 16, 48)}, b"\0" * 48),
    "gap": safetensors({"a": entry([4], 0, 16), "b": entry([4], 32, 48)}, b"\0" * 48),
    "beyond the end": safetensors({"a": entry([1 << 40], 0, 1 << 42)}),
    "shape product": safetensors({"a": entry([3], 0, 64)}),
    "overflowing shape": safetensors({"a": entry([1 << 32, 1 << 32], 0, 0)}, b""),
    "negative shape": safetensors({"a": entry([-16], 0, 64)}),
    "oversized header": safetensors(b"{}", b"", length=1 << 62),
    "header longer than the file": safetensors(b"{}", b"", length=1 << 20),
    "nested header": safetensors(b'{"a":' * 3000 + b"1" + b"}" * 3000, b""),
    "list": safetensors(b"[]", b""),
    "empty": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_disagrees_with_its_data_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(CheckpointError):
        WeightsFolder(tmp_path, "model")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/tmp/x.safetensors", "link.safetensors", "..", "a\0b"])
def test_a_shard_outside_of_its_folder_is_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors({"a": entry([16], 0, 64)}))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError):
        WeightsFolder(folder, "model")


def doubling(levels: int) -> Any:
    value: Any = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def containing_itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def expanded() -> torch.Tensor:
    return torch.zeros(1).expand(1 << 40)


PICKLES: dict[str, Callable[[], Any]] = {
    "doubling references": lambda: {"weight": torch.zeros(2), "beside": doubling(40)},
    "reference to itself": lambda: {"weight": torch.zeros(2), "beside": containing_itself()},
    "nesting": lambda: {"weight": torch.zeros(2), "beside": nested(300)},
    "digits": lambda: {"weight": torch.zeros(2), "iteration": 10**6000},
    "stride of zero": lambda: {"weight": expanded()},
    "code": lambda: {"weight": torch.zeros(2), "beside": os.system},
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_bomb_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(PICKLES[name](), path)
    with pytest.raises(CheckpointError):
        TorchFile(path)


def test_an_oversized_pickle_and_plain_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.zeros(2), "beside": ["x"] * 1000}, tmp_path / "a.pt")
    monkeypatch.setattr("cogflow.weights.torch_file.MOST_PICKLE_BYTES", 500)
    with pytest.raises(CheckpointError, match="more than 500 bytes"):
        TorchFile(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "latents.npz", "w") as archive:
        archive.writestr("a.npy", pickle.dumps(os.system))
    for read in (TorchFile, identify):
        with pytest.raises(CheckpointError):
            read(tmp_path / "latents.npz")


def test_an_optimizer_state_of_tensors_without_values_is_refused(tmp_path: Path) -> None:
    torch.save(
        {"module": {"a": torch.zeros(2)}, "param_shapes": [{"a": torch.Size([1 << 40])}]},
        tmp_path / "mp_rank_00_model_states.pt",
    )
    flat = {
        "optimizer_state_dict": {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [expanded()]}
    }
    torch.save(flat, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError):
        ZeroCheckpoint(tmp_path)


# Folders of other programs


@pytest.mark.parametrize("what", ["part", "step", "yaml", "configs"])
def test_parts_of_a_sat_folder_that_lead_out_are_refused(tmp_path: Path, what: str) -> None:
    private, folder = tmp_path / "private", tmp_path / "sat"
    (private / "1").mkdir(parents=True)
    folder.mkdir()
    torch.save({"module": {"transformer.layers.0.a": torch.zeros(2)}}, private / "1" / "mp_rank_00_model_states.pt")
    (private / "model.yaml").write_text("model: {}")
    (folder / "latest").write_text("1")
    if what == "step":
        (folder / "1").symlink_to(private / "1")
    else:
        (folder / "1").mkdir()
        states = (private / "1" / "mp_rank_00_model_states.pt").read_bytes()
        (folder / "1" / "mp_rank_00_model_states.pt").write_bytes(states)
    if what == "part":
        (folder / "1" / "mp_rank_00_model_states.pt").unlink()
        (folder / "1" / "mp_rank_00_model_states.pt").symlink_to(private / "1" / "mp_rank_00_model_states.pt")
    elif what == "yaml":
        (folder / "training_config.yaml").symlink_to(private / "model.yaml")
    elif what == "configs":
        (folder / "configs").symlink_to(private)
    with pytest.raises(CheckpointError, match=rf"is a link to {private}"):
        read_step_folder(latest_step_folder(folder), "auto", "auto")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_in_a_component_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(json.dumps({"base_model_name_or_path": "stranger/model"}))
    assert any("adapter" in problem for problem in code_in(folder, {}))
    with pytest.raises(CogflowError, match="adapter"):
        refuse_code(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 10**9},
        {"num_layers": 1e9},
        {"layers_per_block": 10**6},
        {"block_out_channels": [8] * 5000},
        {"sample_width": 10**6, "sample_height": 10**6},
        {"num_train_timesteps": 10**12},
        {"num_attention_heads": 10**6, "attention_head_dim": 10**4},
    ],
)
def test_a_config_of_a_giant_model_builds_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    assert code_in(tmp_path, config)
    with pytest.raises(ConversionError, match="describes no model that is built"):
        meta_model({"_class_name": "CogVideoXTransformer3DModel", **config}, "config.json")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CogflowError):
        refuse_code(tmp_path)


def test_configs_of_all_models_are_within_the_limits() -> None:
    for name in MODEL_SPECS:
        assert large_values(transformer_config(published_facts(name))) == []
    assert large_values({"model_max_length": int(1e30)}) == []  # a tokenizer without a limit
