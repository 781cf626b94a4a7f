"""Readers of files that a stranger may have written, each as a function of drawn input, and how to draw that.

A target may raise errors of the user only (:class:`cogflow.errors.UserError`). Everything else is a finding.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from cogflow.config.sat_import import read_recipe
from cogflow.errors import ConversionError, UserError
from cogflow.export.facts import resolve_facts, resolve_vae_facts
from cogflow.export.facts_from_yaml import read_yamls
from cogflow.files.publish import MANIFEST, check_manifest
from cogflow.files.record_io import Record, parse_record
from cogflow.models.code_check import refuse_code
from cogflow.records.cache_records import CacheIndex, StoredClip
from cogflow.records.history_records import FormerRollbacks, HistoryRecord
from cogflow.records.ladder_records import LadderRecord
from cogflow.records.pipeline_records import AssemblyRecord, ExportedTransformer
from cogflow.records.run_records import StageRecord
from cogflow.records.sample_records import SamplesRecord
from cogflow.records.training_records import LatestCheckpoint, TrainerRecord
from cogflow.weights.foreign import read_step_folder
from cogflow.weights.tensor_source import TensorInfo, WeightsFolder
from cogflow.weights.torch_file import TorchFile

RECORDS: tuple[type[Record], ...] = (
    CacheIndex,
    StoredClip,
    FormerRollbacks,
    HistoryRecord,
    LadderRecord,
    AssemblyRecord,
    ExportedTransformer,
    StageRecord,
    SamplesRecord,
    LatestCheckpoint,
    TrainerRecord,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "sat"
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**18, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
)
WORDS = st.sampled_from(
    ["", "a", "..", "../a", "/etc/passwd", "model.safetensors", "\0", "\x1b[2J", "é", "latest", "${oc.env:HOME}", "0"]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)


@dataclass(frozen=True)
class Target:
    """``read(folder, drawn)`` writes the drawn input into an empty folder and reads it."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Path, Any], object]


@st.composite
def changed_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Draw ``original`` with some bytes replaced, removed, repeated or inserted."""
    data = bytearray(original)
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = at + draw(st.integers(0, 40))
        match draw(st.integers(0, 4)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:at] = draw(st.binary(max_size=12))
            case _:
                del data[end:]
    return bytes(data)


@st.composite
def changed_value(draw: st.DrawFn, original: Any) -> Any:
    """Draw a JSON or YAML value with some of its inner values replaced, removed or added."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 4))):
        value = _change_one(draw, value)
    return value


def _change_one(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[draw(st.integers(0, len(keys) - 1))]
    match draw(st.integers(0, 9)):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[draw(WORDS)] = draw(VALUES)
        case 2 if isinstance(value, list):
            value.append(draw(VALUES))
        case _:
            value[key] = _change_one(draw, value[key])
    return value


def _safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
}
DATA = bytes(range(25))
INDEX = {"metadata": {"total_size": 25}, "weight_map": dict.fromkeys("abc", "x.safetensors")}


def read_header(folder: Path, drawn: Any) -> None:
    (folder / "m.safetensors").write_bytes(drawn if isinstance(drawn, bytes) else _safetensors(drawn, DATA))
    weights = WeightsFolder(folder, "m")
    for name, tensor in weights.items():
        assert tuple(tensor.shape) == weights.tensors[name].shape


def read_index(folder: Path, drawn: Any) -> None:
    (folder / "x.safetensors").write_bytes(_safetensors(HEADER, DATA))
    text = drawn if isinstance(drawn, bytes) else json.dumps(drawn).encode()
    (folder / "m.safetensors.index.json").write_bytes(text)
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "model.safetensors.index.json").write_bytes(text)
    with suppress(UserError):
        refuse_code(folder)
    WeightsFolder(folder, "m")


def read_record(folder: Path, drawn: Any) -> None:
    kind, value = drawn
    parse_record(value if isinstance(value, bytes) else json.dumps(value), kind, "record.json")


def read_manifest(folder: Path, drawn: Any) -> None:
    (folder / "a").write_bytes(b"a")
    (folder / MANIFEST).write_bytes(drawn if isinstance(drawn, bytes) else json.dumps(drawn).encode())
    check_manifest(folder)


MANIFEST_VALUE = {"version": 1, "files": {"a": {"sha256": "0" * 64, "bytes": 1}, "b/c": {"sha256": "", "bytes": 0}}}


def _model_states() -> dict[str, Any]:
    return {
        "module": {
            "transformer.layers.0.attention.dense.weight": torch.zeros(2, 2),
            "mixins.a": torch.ones(3, dtype=torch.bfloat16),
        },
        "iteration": 7,
        "mp_world_size": 1,
        "args": {"a": [1, "b", None, 2.5]},
        "param_shapes": [{"a": torch.Size([2, 2])}],
    }


def _torch_bytes(*, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(_model_states(), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


ZIP_FILE, LEGACY_FILE = _torch_bytes(legacy=False), _torch_bytes(legacy=True)


def _pickle_in_zip() -> bytes:
    with zipfile.ZipFile(io.BytesIO(ZIP_FILE)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _with_pickle(data: bytes) -> bytes:
    """Return a torch file whose archive is intact and whose pickle is ``data``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIP_FILE)) as original, zipfile.ZipFile(buffer, "w") as archive:
        for entry in original.infolist():
            content = data if entry.filename.endswith("data.pkl") else original.read(entry)
            archive.writestr(entry.filename, content)
    return buffer.getvalue()


def read_pickle(folder: Path, drawn: bytes) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    path.write_bytes(drawn)
    with suppress(UserError):
        file = TorchFile(path)
        json.dumps(file.metadata)
        for name in file.tensors:
            file.read(name).clone()
    read_step_folder(folder, "auto", "auto")


def _yaml_values() -> list[Any]:
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(GOLDEN.glob("*/**/*.yaml"))]


def read_sat_yaml(folder: Path, drawn: Any) -> None:
    path = folder / "model.yaml"
    path.write_bytes(drawn if isinstance(drawn, bytes) else yaml.safe_dump(drawn, allow_unicode=True).encode())
    assert isinstance(read_recipe([str(path)]).problems, list)
    yamls = read_yamls([path])
    for name in ("transformer.layers.0.attention.dense.weight", "encoder.down.0.block.0.conv1.conv.weight"):
        infos = {name: TensorInfo(name, (1920, 1920), torch.bfloat16, path)}
        with suppress(UserError):
            resolve_facts(infos, yamls)
        with suppress(UserError):
            resolve_vae_facts(infos, yamls)


NAMES = st.one_of(
    st.from_regex(r"(transformer\.layers|encoder\.down|decoder\.up)\.[0-9]{1,30}\.[a-z0-9.]{0,20}", fullmatch=True),
    st.sampled_from(
        [
            "mixins.patch_embed.proj.weight",
            "mixins.patch_embed.text_proj.weight",
            "mixins.pos_embed.freqs_sin",
            "mixins.pos_embed.pos_embedding",
            "mixins.adaln_layer.query_layernorm_list.0.weight",
            "mixins.final_layer.linear.weight",
            "time_embed.0.weight",
            "time_embed.2.weight",
            "ofs_embed.0.weight",
            "transformer.layers.0.attention.query_key_value.weight",
            "transformer.layers.0.attention.query_key_value.matrix_A.0",
            "encoder.conv_in.conv.weight",
            "decoder.conv_out.conv.weight",
        ]
    ),
)
SHAPES = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)


def read_names(folder: Path, drawn: Mapping[str, tuple[int, ...]]) -> None:
    infos = {name: TensorInfo(name, shape, torch.bfloat16, Path("x.pt")) for name, shape in drawn.items()}
    for resolve in (resolve_facts, resolve_vae_facts):
        with suppress(UserError, ConversionError):
            resolve(infos, [], "auto", {})


RECORD_TEXTS: dict[type[Record], Any] = {
    LatestCheckpoint: {"version": 1, "step": 1, "name": "step-1", "bytes": 1},
    HistoryRecord: {
        "version": 1,
        "lines": [{"number": 1, "began": "", "reason": "", "command": "", "settings": {}, "replaced": "replaced/01"}],
    },
    FormerRollbacks: {
        "rollbacks": [{"number": 1, "start": 2, "to": 1, "learning_rate_ratio": 1.0, "reason": "", "moved": False}]
    },
    LadderRecord: {"rungs": {"3": {"panels": {}, "facts": {}, "watch": []}}, "findings": [{"kind": "a"}]},
    TrainerRecord: {"step": 1, "validation": {"kinds": [], "line": ""}, "trend": {"told": {}}, "heldout": None},
    StoredClip: {"panel": {"a": 1.0}, "source": {"panel": {}}, "detail": 1.0},
}


@st.composite
def records(draw: st.DrawFn) -> tuple[type[Record], Any]:
    kind = draw(st.sampled_from(RECORDS))
    original = RECORD_TEXTS.get(kind, {"version": 1})
    if draw(st.booleans()):
        return kind, draw(changed_value(original))
    return kind, draw(changed_bytes(json.dumps(original).encode()))


def _either(value: Any, text: bytes) -> st.SearchStrategy[Any]:
    return st.one_of(changed_value(value), changed_bytes(text))


TARGETS = {
    "safetensors header": Target(_either(HEADER, _safetensors(HEADER, DATA)), read_header),
    "safetensors index": Target(_either(INDEX, json.dumps(INDEX).encode()), read_index),
    "records": Target(records(), read_record),
    "manifest": Target(_either(MANIFEST_VALUE, json.dumps(MANIFEST_VALUE).encode()), read_manifest),
    "sat yaml": Target(
        st.sampled_from(_yaml_values()).flatmap(
            lambda value: _either(value, yaml.safe_dump(value, default_flow_style=True).encode())
        ),
        read_sat_yaml,
    ),
    "tensor names": Target(st.dictionaries(NAMES, SHAPES, max_size=8), read_names),
    "pickle": Target(
        st.one_of(
            changed_bytes(ZIP_FILE), changed_bytes(LEGACY_FILE), changed_bytes(_pickle_in_zip()).map(_with_pickle)
        ),
        read_pickle,
    ),
}
