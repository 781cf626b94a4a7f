"""Read the list of clips and captions of a folder, in the four layouts that are in use around CogVideoX."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogflow.errors import DataError
from cogflow.files.bounded_parsing import parse_json
from cogflow.files.contained_files import open_regular, read_regular
from cogflow.files.paths import contained
from cogflow.files.printable import one_line

EXTENSIONS = (".mp4", ".mov", ".webm", ".mkv")
VIDEO_EXTENSIONS = (*EXTENSIONS, ".avi", ".flv", ".gif", ".m4v", ".mpeg", ".mpg", ".ogv", ".ts", ".wmv")
"""Extensions of files that look like clips, also of those that are not read."""

LAYOUTS = """a folder of clips has one of:
    metadata.jsonl    one object a line: {"file_name": "clip.mp4", "text": "what it shows"}
    metadata.csv      columns file_name,text
    prompts.txt and videos.txt    one caption and one path a line, line by line together
    videos/ and labels/    labels/<name>.txt holds the caption of videos/<name>.mp4"""

_EXAMPLES = 10
MOST_LIST_BYTES = 1 << 30
"""Bytes of a list of clips; millions of captions fit."""
MOST_ROW_BYTES = 1 << 20
"""Bytes and characters of one line of a list of clips."""


@dataclass(frozen=True)
class ClipEntry:
    """One clip of the index: its path, its caption, and its name (the path inside the folder, with forward slashes)."""

    path: Path
    text: str
    name: str


def read_index(folder: Path) -> list[ClipEntry]:
    """Return the clips of ``folder`` in the order of its index.

    The clips are not opened: a file may be missing, or not a video. Raises :class:`DataError` that lists every problem
    of the index itself: no layout or several, a bad line, no caption, another kind of file, a path that leaves the
    folder, a clip named twice with the same caption.
    """
    layout = find_layout(folder)
    return _collect(folder, layout, _READERS[layout][1](folder))


def iterate_index(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and caption of each clip of ``folder`` in the order of its index, one at a time.

    Unlike :func:`read_index` it checks no single row and keeps none in memory. Raises :class:`DataError` where the
    index cannot be read.
    """
    for _, name, text in _READERS[find_layout(folder)][1](folder):
        yield Path(name.strip()).as_posix(), text.strip()


def find_layout(folder: Path) -> str:
    """Return the layout of the index of ``folder``. Raises :class:`DataError` for none and for several."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"the folder of clips {what}: {folder}", "set data.path to a folder of clips; " + LAYOUTS)
    found = [layout for layout, (present, _) in _READERS.items() if present(folder)]
    if not found:
        raise DataError(f"no list of clips and captions in {folder}", LAYOUTS + _guess(folder))
    if len(found) > 1:
        raise DataError(
            f"{folder} holds more than one list of clips: {'; '.join(found)}",
            "keep the one that is right and move the others away",
        )
    return found[0]


def unlisted_videos(folder: Path, listed: Set[str]) -> Iterator[str]:
    """Yield the names of video files below ``folder`` that are not in ``listed``; hidden files and folders are left
    out.
    """
    for path in _files_below(folder):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() in VIDEO_EXTENSIONS and not hidden and relative.as_posix() not in listed:
            yield relative.as_posix()


def _collect(folder: Path, layout: str, rows: Iterator[tuple[str, str, str]]) -> list[ClipEntry]:
    entries: list[ClipEntry] = []
    problems: list[str] = []
    seen: set[tuple[str, str]] = set()
    for where, name, text in rows:
        name, text = name.strip(), text.strip()
        if not name:
            problems.append(f"{where}: no file name")
        elif not text:
            problems.append(f"{where}: no caption for {name}")
        elif Path(name).suffix.lower() not in EXTENSIONS:
            problems.append(f"{where}: {name} is none of {' '.join(EXTENSIONS)}")
        elif (name, text) in seen:
            problems.append(f"{where}: {name} is named twice with the same caption")
        else:
            seen.add((name, text))
            try:
                entries.append(ClipEntry(path=contained(folder, name), text=text, name=Path(name).as_posix()))
            except DataError as error:
                problems.append(f"{where}: {error.message}")
    if problems:
        more = f"\n    and {len(problems) - _EXAMPLES} more" if len(problems) > _EXAMPLES else ""
        raise DataError(
            f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'} in {layout} of {folder}:\n    "
            + "\n    ".join(map(one_line, problems[:_EXAMPLES]))
            + more,
            f"each clip needs a caption and a path below {folder}; {' '.join(EXTENSIONS)} are read",
        )
    if not entries:
        raise DataError(f"{layout} of {folder} names no clip", LAYOUTS)
    return entries


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, one at a time. Raises :class:`DataError`."""
    try:
        # Lines end at line feeds alone: JSON allows other separators of Unicode inside a string.
        with open_regular(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig")
            while line := text.readline(MOST_ROW_BYTES + 1):
                if len(line) > MOST_ROW_BYTES:
                    raise DataError(f"{path} has a line of more than {MOST_ROW_BYTES} characters", LAYOUTS)
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {_first_bad_byte(path)})", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", "it should be a text file that you may read"
        ) from error


def _first_bad_byte(path: Path) -> int:
    try:
        read_regular(path, MOST_LIST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _lines_without_trailing_blanks(path: Path) -> Iterator[str]:
    blanks: list[str] = []
    for line in _lines(path):
        if not line.strip():
            blanks.append(line)
            continue
        yield from blanks
        blanks.clear()
        yield line


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below ``folder`` in the order of their paths, without hidden files.

    Links to folders are not followed. Raises :class:`DataError` for a folder that cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        hint = "it should be a folder that you may read"
        raise DataError(f"{folder} cannot be read: {error.strerror}", hint) from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        elif not entry.name.startswith("."):
            yield Path(entry.path)


def _columns(path: Path, where: str, row: dict[str, Any], number: int) -> tuple[str, str, str]:
    missing = [key for key in ("file_name", "text") if key not in row]
    if missing:
        raise DataError(
            f"{path.name} {where} {number} has no {' and no '.join(missing)}; "
            f"it has: {', '.join(map(str, row)) or 'nothing'}",
            f"{path} needs file_name (path of the clip below the folder) and text (its caption)",
        )
    bad = [key for key in ("file_name", "text") if not isinstance(row[key], str)]
    if bad:
        raise DataError(
            f"{path.name} {where} {number}: {bad[0]} is no text: {row[bad[0]]!r}", "file_name and text are strings"
        )
    return f"{where} {number}", row["file_name"], row["text"]


def _jsonl(folder: Path) -> Iterator[tuple[str, str, str]]:
    path = folder / "metadata.jsonl"
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, MOST_ROW_BYTES)
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is not JSON: {error}",
                'each line is like {"file_name": "clip.mp4", "text": "..."}',
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number} is not an object", 'each line is like {"file_name": "clip.mp4", "text": "..."}'
            )
        yield _columns(path, "line", row, number)


def _csv(folder: Path) -> Iterator[tuple[str, str, str]]:
    path = folder / "metadata.csv"
    reader = csv.DictReader(_lines(path), restval="", strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(
                    f"{path} row {number} has more columns than the header", 'put captions with commas in "quotes"'
                )
            yield _columns(path, "row", row, number)
    except csv.Error as error:
        raise DataError(
            f"{path} is not well-formed csv: {error}", "columns file_name,text; captions with commas in quotes"
        ) from error


def _line_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    prompts, videos = folder / "prompts.txt", folder / "videos.txt"
    counts = [sum(1 for _ in _lines_without_trailing_blanks(path)) for path in (prompts, videos)]
    if counts[0] != counts[1]:
        raise DataError(
            f"prompts.txt has {counts[0]} lines and videos.txt {counts[1]} in {folder}",
            "line n of prompts.txt is the caption of the clip on line n of videos.txt; a caption holds no line break",
        )
    pairs = zip(_lines_without_trailing_blanks(videos), _lines_without_trailing_blanks(prompts), strict=True)
    for number, (video, prompt) in enumerate(pairs, start=1):
        yield f"line {number}", video, prompt


def _labels(folder: Path) -> Iterator[tuple[str, str, str]]:
    for path in _files_below(folder / "videos"):
        if path.suffix.lower() not in EXTENSIONS:
            continue
        label = (folder / "labels" / path.relative_to(folder / "videos")).with_suffix(".txt")
        name = path.relative_to(folder).as_posix()
        if label.is_file():
            contained(folder, label.relative_to(folder).as_posix())
        # A caption over several lines is one caption.
        caption = " ".join(" ".join(_lines(label)).split()) if label.is_file() else ""
        yield str(label.relative_to(folder)), name, caption


def _guess(folder: Path) -> str:
    """Return a hint at the intended folder or file, from the files in and below ``folder``."""
    halves = [name for name in ("prompts.txt", "videos.txt", "videos", "labels") if (folder / name).exists()]
    if halves:
        return f"\n  here is only {' and '.join(halves)}"
    below = sorted(
        p.parent for pattern in ("*/metadata.jsonl", "*/metadata.csv", "*/prompts.txt") for p in folder.glob(pattern)
    )
    return f"\n  did you mean {below[0]} ?" if below else ""


_READERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Iterator[tuple[str, str, str]]]]] = {
    "metadata.jsonl": (lambda f: (f / "metadata.jsonl").exists(), _jsonl),
    "metadata.csv": (lambda f: (f / "metadata.csv").exists(), _csv),
    "prompts.txt and videos.txt": (lambda f: (f / "prompts.txt").exists() and (f / "videos.txt").exists(), _line_files),
    "videos/ and labels/": (lambda f: (f / "videos").is_dir() and (f / "labels").is_dir(), _labels),
}
