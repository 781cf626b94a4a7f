"""The prompts that are sampled: from a file, or chosen from the data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogflow.data.shapes import Scene
from cogflow.errors import DataError

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
FROM_DATA = 4


@dataclass(frozen=True)
class Prompt:
    """``id`` names files and settles the noise; ``text`` is what the model is asked for."""

    id: str
    text: str


SHAPES_PROMPTS = (
    Prompt("purple-star", Scene("purple", "star", "right", "light", 0).caption),
    Prompt("orange-square", Scene("orange", "square", "down", "dark", 0).caption),
    Prompt("red-circle", Scene("red", "circle", "left", "light", 0).caption),
    Prompt("blue-triangle", Scene("blue", "triangle", "up", "dark", 0).caption),
)
"""For drawn clips: two concepts that finetuning brings, two that the model knew before."""


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a ``.txt`` (one a line, named by their place) or a ``.jsonl`` (objects with ``id`` and ``text``).

    Raises :class:`DataError` naming each bad line; ids must be plain names, since files are named after them.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Prompts cannot be read from {path}: {error}", "Give a .txt (one prompt a line) or a .jsonl."
        ) from error
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(
            f"{path} has the ending {path.suffix or 'of no kind'}.",
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
            entry = json.loads(line)
            prompt = Prompt(str(entry["id"]), str(entry["text"]))
        except (ValueError, KeyError, TypeError):
            problems.append(f"line {number}: not an object with id and text")
            continue
        if not IDENTIFIER.match(prompt.id):
            problems.append(f"line {number}: id {prompt.id!r} is not a plain name (letters, digits, . _ -, at most 64)")
        elif prompt.id in {other.id for other in prompts}:
            problems.append(f"line {number}: id {prompt.id} is there twice")
        else:
            prompts.append(prompt)
    if problems:
        raise DataError(f"{path}: " + "; ".join(problems), 'A line is {"id": "name", "text": "the prompt"}.')
    if not prompts:
        raise DataError(f"{path} holds no prompt.", "Write one prompt a line.")
    return prompts


def prompts_for(path: str | None, data_name: str, captions: Sequence[str]) -> list[Prompt]:
    """The prompts of ``path``; without one, those of drawn clips, or the first few distinct ``captions``."""
    if path is not None:
        return read_prompts(Path(path).expanduser())
    if data_name == "shapes":
        return list(SHAPES_PROMPTS)
    return [
        Prompt(f"caption-{index:03d}", text) for index, text in enumerate(list(dict.fromkeys(captions))[:FROM_DATA])
    ]
