"""Read and write JSON records: dataclasses with a version, checked against their field types by pydantic.

A record file is a JSON object with the key ``version`` and one key for each field of its dataclass. A file without
``version`` is of version 0, the layout before versions were written.

* A record of an older version is converted by :meth:`Record.upgrade` before it is checked.
* A record of a newer version is refused.
* Keys that the dataclass does not know are ignored.
* Field types are checked strictly: JSON strings do not become numbers, and numbers do not become strings.
* NaN and infinity are written as null, because JSON has neither. A field of type :data:`Measured` reads null as NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar

import pydantic
from pydantic import BeforeValidator, Field, TypeAdapter

from cogflow.errors import CheckpointError, DataError, UserError
from cogflow.files.atomic_write import write_json
from cogflow.files.bounded_parsing import parse_json
from cogflow.files.contained_files import read_regular

if TYPE_CHECKING:
    JsonValue: TypeAlias = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
else:
    JsonValue = pydantic.JsonValue
"""Any JSON value, for content that another program defines."""

JsonObject: TypeAlias = Mapping[str, JsonValue]
"""A JSON object whose keys another program defines, such as a ``config.json`` of diffusers."""

ForeignObject: TypeAlias = Mapping[str, Any]
"""An object from a file that another program defines. Each value is checked where it is used."""

RawRecord: TypeAlias = dict[str, Any]
"""The JSON object of a record before it is checked."""

Measured: TypeAlias = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A measured number, which may be NaN. The file holds null for NaN and for infinity; both are read as NaN."""

OMIT_NONE = Field(default=None, exclude_if=lambda value: value is None)
"""Annotation of an optional field whose key is left out of the file when the value is None."""

MAX_PROBLEMS = 5
"""Type errors of one file that the message lists."""


class Record:
    """Base class of the dataclasses that cogflow stores as JSON files.

    ``file_name``: the file's name in its folder. ``advice``: what the user can do about a file that cannot be read.
    ``error``: the exception of a file that cannot be read. ``max_bytes``: larger files are refused unread.
    """

    version: ClassVar[int] = 1
    file_name: ClassVar[str] = ""
    advice: ClassVar[str] = "Restore the file from a copy, or run the stage that writes it again."
    error: ClassVar[type[UserError]] = CheckpointError
    max_bytes: ClassVar[int] = 1 << 26

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Return the JSON object ``values`` of the older ``version`` in the layout of ``cls.version``."""
        return values


RecordT = TypeVar("RecordT", bound=Record)


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Return the record in the file ``path``.

    Raises ``kind.error`` for a file that is missing, too large, no JSON object, newer than this cogflow, or of other
    types.
    """
    try:
        text = read_regular(path, kind.max_bytes)
    except FileNotFoundError as error:
        raise kind.error(f"{path} is missing.", kind.advice) from error
    except OSError as error:
        raise kind.error(f"{path} cannot be read: {error}", kind.advice) from error
    except DataError as error:
        raise kind.error(error.message, kind.advice) from error
    return parse_record(text, kind, str(path))


def parse_record(text: bytes | str, kind: type[RecordT], origin: str) -> RecordT:
    """Return the record in the JSON ``text``. ``origin`` names its place in error messages. Raises ``kind.error``."""
    try:
        values = parse_json(text, kind.max_bytes)
    except ValueError as error:
        raise kind.error(f"{origin} holds no valid JSON: {error}", kind.advice) from error
    if not isinstance(values, dict):
        raise kind.error(f"{origin} holds no JSON object.", kind.advice)
    version = values.get("version", 0)
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise kind.error(f"{origin}: version is {version!r}, which is no version number.", kind.advice)
    if version > kind.version:
        raise kind.error(
            f"{origin} was written by a newer cogflow (version {version}); this one reads up to {kind.version}.",
            f"Update cogflow. Otherwise: {kind.advice}",
        )
    if version < kind.version:
        try:
            text = json.dumps(kind.upgrade(values, version))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise kind.error(
                f"{origin} is no valid record of version {version}: {type(error).__name__}: {error}", kind.advice
            ) from error
    try:
        record: RecordT = _adapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise kind.error(f"{origin} is no valid record: {_problems(error)}", kind.advice) from error
    return record


def write_record(path: Path, record: Record) -> None:
    """Write ``record`` to the file ``path`` in one step: the file holds the old content or all of the new.

    Raises :class:`cogflow.errors.StorageError` when the disk refuses, and ``pydantic_core.PydanticSerializationError``
    for a field whose value is not of the field's type: such a file could not be read again.
    """
    write_json(path, record_values(record))


def record_values(record: Record) -> RawRecord:
    """Return ``record`` as the JSON object that its file holds."""
    values: RawRecord = _adapter(type(record)).dump_python(record, by_alias=True, warnings="error")
    return {"version": record.version, **values}


_ADAPTERS: dict[type[Record], TypeAdapter[Any]] = {}


def _adapter(kind: type[Record]) -> TypeAdapter[Any]:
    """Return the validator of ``kind``, which takes milliseconds to build."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _problems(error: pydantic.ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)
    lines = [
        f"{'.'.join(map(str, one['loc'])) or 'the record'}: {one['msg'][:1].lower()}{one['msg'][1:]}"
        + ("" if one["type"] == "missing" else f", found {_short(one['input'])}")
        for one in found[:MAX_PROBLEMS]
    ]
    more = len(found) - MAX_PROBLEMS
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
