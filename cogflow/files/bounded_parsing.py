"""Parse JSON and YAML that somebody else may have written, within limits on size, depth and number of values.

A parser without limits can be made to use all memory or time: by aliases that expand to billions of values, by
thousands of nested brackets, or by numbers of thousands of digits. Everything beyond a limit raises ``ValueError``,
as text that is no JSON does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic_core

from cogflow.errors import DataError
from cogflow.files.contained_files import MOST_BYTES, read_regular

BYTES_PER_VALUE = 8
"""A JSON text may hold one value for this many bytes of its reader's limit. Files of cogflow and diffusers have more
bytes for each value."""
MOST_YAML_BYTES = 1 << 20
"""Bytes of a yaml file. SAT's largest has 6,000."""
MOST_YAML_DEPTH = 40
MOST_YAML_VALUES = 50_000
"""Values of a yaml file after its aliases are expanded."""
MOST_YAML_TEXT = 1 << 16
"""Characters of one text in a yaml file."""
MOST_DIGITS = 400
"""Characters of a number in a yaml file. The largest float has 309 digits."""

LAYER_KEYS = ("num_layers", "num_decoder_layers", "layers_per_block", "num_hidden_layers")
"""Keys of a model's config that state how often something is built."""
MOST_LAYERS = 1024
MOST_NUMBER = 1 << 24
"""Largest number in a model's config. T5's vocabulary has 32,128 entries."""
NOT_ALLOCATED = ("model_max_length",)
"""Numbers of any size: transformers writes int(1e30) for a tokenizer without a limit."""
TABLE_KEYS = {
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "num_attention_heads": 1,
    "attention_head_dim": 1,
}
"""Keys that the size of the transformer's table of positions follows from, and their defaults."""
MOST_TABLE = 1 << 32
"""Largest product of these. That of CogVideoX-5B-I2V is 8e8."""


def parse_json(text: bytes | str, max_bytes: int = MOST_BYTES) -> Any:
    """Return the value of a JSON text.

    Raises ``ValueError`` for a text of more than ``max_bytes``, of more than 200 nested brackets, with a number of more
    than 4,300 digits, with too many values, and for anything that is no JSON.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > max_bytes:
        raise ValueError(f"it has {len(raw)} bytes; at most {max_bytes} are read")
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > max_bytes // BYTES_PER_VALUE:
        raise ValueError(f"it has about {values} values; at most {max_bytes // BYTES_PER_VALUE} are read")
    return pydantic_core.from_json(raw)


def read_json_file(path: Path, max_bytes: int = MOST_BYTES) -> Any:
    """Return the value of a JSON file.

    Raises ``ValueError`` as :func:`parse_json` does, also for a file that is too large or no regular file, and
    ``OSError`` for a file that cannot be read.
    """
    try:
        content = read_regular(path, max_bytes)
    except DataError as error:
        raise ValueError(error.message) from error
    return parse_json(content, max_bytes)


def read_json_object(path: Path, max_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file, empty for a file that is missing, broken, beyond the limits, or no object."""
    try:
        value = read_json_file(path, max_bytes)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml_text(path: Path) -> str:
    """Return the text of a yaml file that is within the limits: size, depth, number of values, length of texts.

    Aliases count as often as they repeat the value they name. Raises ``ValueError`` beyond a limit and for a file that
    is no yaml, and ``OSError`` for a file that cannot be read.
    """
    try:
        text = read_regular(path, MOST_YAML_BYTES).decode("utf-8-sig")
    except DataError as error:
        raise ValueError(error.message) from error
    check_yaml(text)
    return text


def read_yaml_file(path: Path) -> Any:
    """Return the value of a yaml file, plain values only. Raises ``ValueError`` and ``OSError`` as
    :func:`read_yaml_text` does.
    """
    import yaml

    text = read_yaml_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, OverflowError, TypeError) as error:
        raise ValueError(first_line(error)) from error


def check_yaml(text: str) -> None:
    """Raise ``ValueError`` for a yaml text beyond the limits. No value is built.

    PyYAML reads a text as a stream of events without recursion, so that the check itself needs no memory for nesting.
    """
    import yaml

    counter = _YamlCounter()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            counter.add(event)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(first_line(error)) from error


class _YamlCounter:
    """Counts the values of a yaml text. ``_open``: for each open collection its anchor and the count before it."""

    def __init__(self) -> None:
        self._values = 0
        self._open: list[tuple[str | None, int]] = []
        self._sizes: dict[str, int] = {}

    def add(self, event: Any) -> None:
        import yaml

        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, self._values))
            self._values += 1
            if len(self._open) > MOST_YAML_DEPTH:
                raise ValueError(f"line {_line(event)}: more than {MOST_YAML_DEPTH} nested levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self._open.pop()
            if anchor is not None:
                self._sizes[anchor] = self._values - before
        elif isinstance(event, yaml.ScalarEvent):
            self._values += 1
            self._check_scalar(event)
            if event.anchor is not None:
                self._sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._sizes:
                raise ValueError(f"line {_line(event)}: the alias *{event.anchor} names a value that is not complete")
            self._values += self._sizes[event.anchor]
        if self._values > MOST_YAML_VALUES:
            raise ValueError(f"line {_line(event)}: more than {MOST_YAML_VALUES} values, with aliases expanded")

    def _check_scalar(self, event: Any) -> None:
        if len(event.value) > MOST_YAML_TEXT:
            raise ValueError(f"line {_line(event)}: a text of {len(event.value)} characters")
        is_number = event.style is None and event.value[:1] in "+-.0123456789" and " " not in event.value
        if is_number and len(event.value) > MOST_DIGITS:
            raise ValueError(f"line {_line(event)}: a number of {len(event.value)} digits")
        if event.tag is not None and event.tag.endswith(":int") and len(event.value) > MOST_DIGITS:
            raise ValueError(f"line {_line(event)}: a number of {len(event.value)} digits")


def reject_references(value: Any, where: str = "") -> None:
    """Raise ``ValueError`` for a text or key with ``${``, which OmegaConf would replace by a value of this machine."""
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{where or 'a value'} contains ${{...}}; nothing is resolved in it")
    if isinstance(value, Mapping):
        for key, item in value.items():
            reject_references(key, where)
            reject_references(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            reject_references(item, where)


def large_values(config: Mapping[str, Any]) -> list[str]:
    """Return a line for each number of a model's config that would make its class build far more than any model has.

    Classes of diffusers and transformers build one layer after another, and tables of positions in memory, before they
    look at the weights.
    """
    problems = [
        f"{key} is {value}; at most {MOST_LAYERS if key in LAYER_KEYS else MOST_NUMBER} is read"
        for key, value in config.items()
        if isinstance(value, int | float)
        and value > (MOST_LAYERS if key in LAYER_KEYS else MOST_NUMBER)
        and key not in NOT_ALLOCATED
    ]
    problems += [
        f"{key} has {len(value)} entries; at most {MOST_LAYERS} are read"
        for key, value in config.items()
        if isinstance(value, list) and len(value) > MOST_LAYERS
    ]
    table = math.prod(
        value for key, default in TABLE_KEYS.items() if type(value := config.get(key, default)) is int and value > 0
    )
    builds_table = not config.get("use_rotary_positional_embeddings") or config.get("use_learned_positional_embeddings")
    if builds_table and table > MOST_TABLE and not problems:
        problems.append(f"its table of positions has {table} values ({', '.join(TABLE_KEYS)}); at most {MOST_TABLE}")
    return problems


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
