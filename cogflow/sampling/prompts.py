"""Read the prompts to sample from a file, or choose them from the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogflow.data.shapes import Scene
from cogflow.errors import DataError
from cogflow.files.bounded_parsing import parse_json
from cogflow.files.contained_files import read_regular

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
FROM_DATA = 4


@dataclass(frozen=True)
class Prompt:
    """A prompt. Its ``id`` names the files of its samples and, with the seed, determines their noise."""

    id: str
    text: str


SHAPES_PROMPTS = (
    Prompt("purple-star", Scene("purple", "star", "right", "light", 0).caption),
    Prompt("orange-square", Scene("orange", "square", "down", "dark", 0).caption),
    Prompt("red-circle", Scene("red", "circle", "left", "light", 0).caption),
    Prompt("blue-triangle", Scene("blue", "triangle", "up", "dark", 0).caption),
)
"""Prompts for drawn clips: two concepts that finetuning adds and two that the model already knows."""


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a ``.txt`` file (one per line) or a ``.jsonl`` file (objects with ``id`` and ``text``).

    The id of a prompt in a ``.txt`` file is ``prompt-<line number>``. Ids must be plain names, because files are named
    after them. Raise :class:`DataError` that names each bad line.
    """
    try:
        lines = [line.strip() for line in read_regular(path).decode("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(
            f"Prompts cannot be read from {path}: {error}", "Give a .txt (one prompt a line) or a .jsonl."
        ) from error
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(
            f"{path} is neither a .txt nor a .jsonl file.",
            "Give a .txt (one prompt a line) or a .jsonl (id, text).",
        )
    prompts, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        if path.suffix == ".txt":
            prompts.append(Prompt(f"prompt-{number:03d}", line))
            continue
        try:
            prompts.append(_parse_prompt(line, {prompt.id for prompt in prompts}))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise DataError(f"{path}: " + "; ".join(problems), 'A line is {"id": "name", "text": "the prompt"}.')
    if not prompts:
        raise DataError(f"{path} holds no prompt.", "Write one prompt a line.")
    return prompts


def prompts_for(path: str | None, data_name: str, captions: Sequence[str]) -> list[Prompt]:
    """Return the prompts of ``path``; without it those of drawn clips, or the first four distinct ``captions``."""
    if path is not None:
        return read_prompts(Path(path).expanduser())
    if data_name == "shapes":
        return list(SHAPES_PROMPTS)
    return [
        Prompt(f"caption-{index:03d}", text) for index, text in enumerate(list(dict.fromkeys(captions))[:FROM_DATA])
    ]


def _parse_prompt(line: str, taken: set[str]) -> Prompt:
    """Return the prompt of a line of a ``.jsonl`` file. Raise ``ValueError`` for a bad line or an id in ``taken``."""
    try:
        entry = parse_json(line)
        prompt = Prompt(str(entry["id"]), str(entry["text"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError("not an object with id and text") from None
    if not IDENTIFIER.match(prompt.id):
        raise ValueError(f"id {prompt.id!r} is not a plain name (letters, digits, . _ -, at most 64)")
    if prompt.id in taken:
        raise ValueError(f"id {prompt.id} is there twice")
    return prompt
