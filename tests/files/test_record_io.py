"""Test that JSON records keep their values, their version and their types."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from pydantic import Field
from pydantic_core import PydanticSerializationError

from cogflow.errors import CheckpointError, DataError
from cogflow.files.record_io import (
    OMIT_NONE,
    JsonObject,
    Measured,
    RawRecord,
    Record,
    parse_record,
    read_record,
    write_record,
)


@dataclass(frozen=True)
class Piece:
    origin: Annotated[str, Field(alias="from")]
    scores: dict[str, Measured]
    shape: tuple[int, ...] = ()
    note: Annotated[str | None, OMIT_NONE] = None


@dataclass(frozen=True)
class Sheet(Record):
    version: ClassVar[int] = 2
    file_name: ClassVar[str] = "sheet.json"
    advice: ClassVar[str] = "Write the sheet again."
    error: ClassVar[type[DataError]] = DataError
    max_bytes: ClassVar[int] = 4096

    step: int
    pieces: list[Piece]
    settings: JsonObject = field(default_factory=dict)
    seconds: float | None = None

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Version 0 held one piece; version 1 named the step ``number``."""
        if version == 0:
            values = {**values, "pieces": [values["piece"]]}
        return {**values, "step": values["number"]}


SHEET = Sheet(3, [Piece("a", {"blur": 0.5}, (2, 3), "soft")], {"nested": [1, {"deep": None}]}, 1.5)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path / "sheet.json", SHEET)
    assert read_record(tmp_path / "sheet.json", Sheet) == SHEET


def test_a_file_holds_the_version_the_aliases_and_no_omitted_keys(tmp_path: Path) -> None:
    write_record(tmp_path / "sheet.json", Sheet(1, [Piece("b", {})]))
    assert json.loads((tmp_path / "sheet.json").read_text()) == {
        "version": 2,
        "step": 1,
        "pieces": [{"from": "b", "scores": {}, "shape": []}],
        "settings": {},
        "seconds": None,
    }


def test_nan_and_infinity_are_written_as_null_and_read_as_nan(tmp_path: Path) -> None:
    write_record(tmp_path / "sheet.json", Sheet(1, [Piece("b", {"blur": math.nan, "grain": math.inf})]))
    assert json.loads((tmp_path / "sheet.json").read_text())["pieces"][0]["scores"] == {"blur": None, "grain": None}
    scores = read_record(tmp_path / "sheet.json", Sheet).pieces[0].scores
    assert all(math.isnan(scores[name]) for name in ("blur", "grain"))


def test_a_value_of_another_type_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PydanticSerializationError, match="step"):
        write_record(tmp_path / "sheet.json", Sheet("3", []))  # type: ignore[arg-type]
    assert not (tmp_path / "sheet.json").exists()


def test_older_versions_are_upgraded() -> None:
    piece = {"from": "a", "scores": {}}
    first = parse_record(json.dumps({"number": 4, "piece": piece}), Sheet, "old.json")
    second = parse_record(json.dumps({"version": 1, "number": 4, "pieces": [piece]}), Sheet, "old.json")
    assert first == second == Sheet(4, [Piece("a", {})])


def test_unknown_keys_are_ignored() -> None:
    text = json.dumps({"version": 2, "step": 1, "pieces": [], "later": {}})
    assert parse_record(text, Sheet, "x.json") == Sheet(1, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 3}', r"x.json was written by a newer cogflow \(version 3\); this one reads up to 2"),
        ('{"version": true}', "version is True, which is no version number"),
        ('{"version": -1}', "version is -1, which is no version number"),
        ("{", "x.json holds no valid JSON"),
        ("[" * 300, "x.json holds no valid JSON: recursion limit"),
        ("[]", "x.json holds no JSON object"),
        ('{"pieces": []}', "x.json is no valid record of version 0: KeyError"),
        ('{"version": 2, "pieces": []}', "step: field required"),
        ('{"version": 2, "step": "3", "pieces": []}', "step: input should be a valid integer, found '3'"),
        ('{"version": 2, "step": 3.0, "pieces": []}', "step: input should be a valid integer, found 3.0"),
        ('{"version": 2, "step": 3, "pieces": [{"from": 1, "scores": {}}]}', "pieces.0.from: input should be a valid"),
        ('{"version": 2, "step": 3, "pieces": [{"from": "a", "scores": {"b": "c"}}]}', "pieces.0.scores.b: input"),
    ],
)
def test_a_file_that_is_no_record_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_record(text, Sheet, "x.json")


def test_a_missing_file_and_a_large_file_are_refused_with_the_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sheet.json is missing.\n  Write the sheet again"):
        read_record(tmp_path / "sheet.json", Sheet)
    (tmp_path / "sheet.json").write_text(" " * 5000)
    with pytest.raises(DataError, match="has 5000 bytes; at most 4096 are read"):
        read_record(tmp_path / "sheet.json", Sheet)


def test_the_default_error_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        read_record(tmp_path / "any.json", Record)
