"""Collect the clips that cannot be read, with the reasons, in ``cache/quarantine.jsonl``, and limit their number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cogflow.config.data_section import DataConfig
from cogflow.errors import DataError
from cogflow.files.atomic_write import write_text
from cogflow.files.bounded_parsing import parse_json
from cogflow.files.contained_files import open_regular
from cogflow.files.printable import one_line

QUARANTINE = "quarantine.jsonl"
MOST_LINE_BYTES = 1 << 20
MISSING = "the file is missing"
"""Reason of a clip without a file."""

FileStamp = tuple[int, int]
"""Size of a file in bytes and time of its last modification in ns."""

_EXAMPLES = 5


@dataclass(frozen=True)
class LeftOutClip:
    """A clip that was not prepared. ``size``: of its file in bytes; None for a missing file and in older files."""

    name: str
    reason: str
    size: int | None = None


class Quarantine:
    """Unreadable clips by name, with the reason, and the limit on their number."""

    def __init__(self, data: DataConfig, total: int, file: Path) -> None:
        self.rows: dict[str, str] = {}
        self.data = data
        self._total, self._file = total, file
        self._allowed = int(data.max_bad_share * total + 1e-9)

    def add(self, name: str, reason: str) -> None:
        """Add a clip. Raises :class:`DataError` when there are more than ``data.max_bad_share`` allows."""
        self.rows[name] = reason
        if len(self.rows) > self._allowed:
            limit = f"data.max_bad_share={self.data.max_bad_share:g} allows {self._allowed}"
            raise self.stop(f"{len(self.rows)} of {self._total} clips are unreadable so far; {limit}")

    def stop(self, message: str) -> DataError:
        """Write the full list and return the error that ends the run, with examples."""
        self.write()
        first = list(self.rows.items())[:_EXAMPLES]
        examples = "".join(f"\n    {one_line(name)}: {one_line(reason)}" for name, reason in first)
        return DataError(
            message + examples, f"repair or remove them (all are in {self._file}), or raise data.max_bad_share"
        )

    def write(self, sizes: Mapping[str, int] | None = None) -> None:
        """Write one JSON object per line, with name, reason and the known size; remove the file when there is nothing
        to list.
        """
        if not self.rows:
            self._file.unlink(missing_ok=True)
            return
        lines = []
        for name, reason in sorted(self.rows.items()):
            size = {"size": sizes[name]} if sizes and name in sizes else {}
            lines.append(json.dumps({"name": name, "reason": reason, **size}))
        write_text(self._file, "".join(f"{line}\n" for line in lines))


def read_quarantine(folder: Path) -> Iterator[LeftOutClip]:
    """Yield the clips that were left out of the cache in ``folder``; none where there is no list that can be read."""
    try:
        with open_regular(folder / QUARANTINE) as file:
            for line in file:
                row = parse_json(line, MOST_LINE_BYTES)
                yield LeftOutClip(row["name"], row["reason"], row.get("size"))
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return


def file_stamp(path: Path) -> FileStamp:
    """Return size and time of modification of the file at ``path``. Raises :class:`OSError`."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def stamp_or_none(path: Path) -> FileStamp | None:
    """Return the stamp of the file at ``path``, None for one that cannot be found."""
    try:
        return file_stamp(path)
    except OSError:
        return None
