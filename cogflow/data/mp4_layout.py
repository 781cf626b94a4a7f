"""Walk the boxes of an MP4 or MOV file, bound its tables, and hide all boxes that decoding one video does not need.

libav sees the first video track, its tables and its fragments. Other tracks, metadata and unknown boxes appear to it as
``free`` boxes. Layout of the boxes: ISO/IEC 14496-12, and Apple's QuickTime File Format Specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cogflow.data.media_bytes import MAX_FRAMES, ClipError, MediaBytes, MediaLayout

MAX_BOXES = 2**19
MAX_FRAGMENTS = 2**16
MAX_SEGMENT_REFERENCES = 2**14
"""Entries of all ``sidx`` boxes. libav sorts them by insertion."""
MAX_EDITS = 256
MAX_SAMPLE_ENTRIES = 16

_CHILDREN: dict[bytes, frozenset[bytes]] = {
    b"": frozenset({b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"sidx"}),
    b"moov": frozenset({b"mvhd", b"trak", b"mvex"}),
    b"trak": frozenset({b"tkhd", b"edts", b"mdia"}),
    b"edts": frozenset({b"elst"}),
    b"mdia": frozenset({b"mdhd", b"hdlr", b"minf"}),
    b"minf": frozenset({b"vmhd", b"dinf", b"stbl"}),
    b"stbl": frozenset(
        {b"stsd", b"stts", b"ctts", b"stss", b"stps", b"stsc", b"stsz", b"stz2", b"stco", b"co64", b"sgpd", b"sbgp"}
    ),
    b"mvex": frozenset({b"mehd", b"trex"}),
    b"moof": frozenset({b"mfhd", b"traf"}),
    b"traf": frozenset({b"tfhd", b"tfdt", b"trun"}),
}
"""Boxes that libav may see, by the box they are in. A box that is itself a key is walked."""
_SEVERAL = frozenset({b"", b"trak", b"trex", b"moof", b"traf", b"trun", b"mdat", b"sidx", b"styp", b"sgpd", b"sbgp"})
"""Boxes that may be in their parent more than once; repetitions of others are hidden."""
_SAMPLE_ENTRY_CHILDREN = frozenset(
    {b"avcC", b"hvcC", b"av1C", b"vpcC", b"esds", b"colr", b"pasp", b"fiel", b"clap", b"mdcv", b"clli", b"SmDm"}
    | {b"CoLL", b"btrt", b"gama", b"dvcC", b"dvvC", b"glbl", b"d263"}
)
_SAMPLE_ENTRY_BYTES = 86  # header, reserved bytes, and the fields of a VisualSampleEntry
_ENTRY_BYTES = {b"stts": 8, b"ctts": 8, b"stss": 4, b"stps": 4, b"stsc": 12, b"stco": 4, b"co64": 8}
_FREE = b"free"


@dataclass(frozen=True)
class _Box:
    """``start``: offset of the header; ``body`` to ``end``: offsets of the content."""

    type: bytes
    start: int
    body: int
    end: int


@dataclass
class _BoxWalk:
    """State of one walk. ``track``: number of the shown video track; ``frames``: samples that libav would index."""

    data: MediaBytes
    layout: MediaLayout = field(default_factory=MediaLayout)
    boxes: int = 0
    frames: int = 0
    fragments: int = 0
    references: int = 0
    edits: int = 1
    track: bytes | None = None

    def hide(self, box: _Box) -> None:
        self.layout.hidden[box.start + 4] = _FREE

    def content(self, box: _Box, count: int, at: int = 0) -> bytes:
        """Return ``count`` bytes of the box from its byte ``at`` on. Raises :class:`ClipError` when it ends before."""
        found = self.data.read_at(box.body + at, min(count, box.end - box.body - at))
        if len(found) < count:
            raise ClipError(f"truncated or damaged: the box {_name(box)} is too short")
        return found


def read_layout(data: MediaBytes) -> MediaLayout:
    """Return which boxes are hidden from libav. Raises :class:`ClipError` for a file beyond the limits."""
    walk = _BoxWalk(data)
    _walk_children(walk, _Box(b"", 0, 0, data.size))
    if walk.track is None:
        raise ClipError("truncated, or holds no video stream (or its header is damaged)")
    return walk.layout


def _walk_children(walk: _BoxWalk, parent: _Box) -> None:
    shown = _CHILDREN[parent.type]
    seen: set[bytes] = set()
    for box in _boxes(walk, parent):
        if box.type not in shown or (box.type in seen and box.type not in _SEVERAL):
            walk.hide(box)
            continue
        seen.add(box.type)
        if box.type in _CHECKS:
            _CHECKS[box.type](walk, box)
        elif box.type in _CHILDREN:
            _walk_children(walk, box)


def _boxes(walk: _BoxWalk, parent: _Box) -> Iterator[_Box]:
    """Yield the boxes in ``parent``. Raises :class:`ClipError` for a box that is longer than its parent."""
    place = parent.body
    while place + 8 <= parent.end:
        header = walk.data.read_at(place, 16)
        size = int.from_bytes(header[:4], "big")
        length = 8
        if size == 1:
            size = int.from_bytes(header[8:], "big")
            length = 16
        elif size == 0:
            if parent.type:  # QuickTime ends some lists with four zero bytes.
                return
            size = parent.end - place
        box = _Box(header[4:8], place, place + length, place + size)
        if size < length:
            raise ClipError(f"truncated or damaged: a box of {size} bytes at byte {place}")
        if box.end > parent.end:
            if parent.type or box.type != b"mdat":
                raise ClipError(f"truncated or damaged: the box {_name(box)} is longer than what it is in")
            box = _Box(box.type, place, box.body, parent.end)
        walk.boxes += 1
        if walk.boxes > MAX_BOXES:
            raise ClipError(f"holds more than {MAX_BOXES:,} boxes")
        yield box
        place = box.end


def _check_track(walk: _BoxWalk, box: _Box) -> None:
    """Walk the first video track; hide every other track."""
    if walk.track is not None or _handler(walk, box) != b"vide":
        walk.hide(box)
        return
    header = next((child for child in _boxes(walk, box) if child.type == b"tkhd"), None)
    if header is None:
        raise ClipError("truncated or damaged: the video track has no header")
    version = walk.content(header, 1)[0]
    walk.track = walk.content(header, 4, at=20 if version == 1 else 12)
    _walk_children(walk, box)
    if walk.edits * walk.frames > 2 * MAX_FRAMES:
        raise ClipError(f"its edit list shows {walk.frames:,} frames up to {walk.edits:,} times")


def _handler(walk: _BoxWalk, track: _Box) -> bytes:
    for media in _boxes(walk, track):
        if media.type == b"mdia":
            for box in _boxes(walk, media):
                if box.type == b"hdlr":
                    return walk.content(box, 4, at=8)
            return b""
    return b""


def _check_data_reference(walk: _BoxWalk, box: _Box) -> None:
    """Check that the frames are in this file, and hide the box."""
    for references in _boxes(walk, box):
        if references.type != b"dref":
            continue
        entries = _Box(b"dref", references.start, references.body + 8, references.end)
        for entry in _boxes(walk, entries):
            if not walk.content(entry, 4)[3] & 1:
                raise ClipError("refers to another file for its frames (data reference), which is not opened")
    walk.hide(box)


def _check_sample_entries(walk: _BoxWalk, box: _Box) -> None:
    count = int.from_bytes(walk.content(box, 8)[4:], "big")
    entries = list(_boxes(walk, _Box(b"stsd", box.start, box.body + 8, box.end)))
    if not count or count > MAX_SAMPLE_ENTRIES or count != len(entries):
        raise ClipError(f"truncated or damaged: {count:,} sample descriptions")
    for entry in entries:
        fields = walk.content(entry, _SAMPLE_ENTRY_BYTES - 8)
        width, height = int.from_bytes(fields[24:26], "big"), int.from_bytes(fields[26:28], "big")
        walk.layout.stated_pixels = max(walk.layout.stated_pixels, width * height)
        if int.from_bytes(fields[74:76], "big") & 0x1F in (1, 2, 4, 8):
            raise ClipError("a QuickTime video with a colour palette, which is not read")
        inner = _Box(b"stsd", entry.start, entry.start + _SAMPLE_ENTRY_BYTES, entry.end)
        for child in _boxes(walk, inner):
            if child.type not in _SAMPLE_ENTRY_CHILDREN:
                walk.hide(child)


def _check_table(walk: _BoxWalk, box: _Box) -> None:
    """Check that a table holds the entries that it claims: libav allocates them before it reads them."""
    count = int.from_bytes(walk.content(box, 8)[4:], "big")
    if count * _ENTRY_BYTES[box.type] > box.end - box.body - 8:
        raise ClipError(f"truncated or damaged: the table {_name(box)} claims {count:,} entries")


def _check_group(walk: _BoxWalk, box: _Box) -> None:
    """Check the count of a sample group: the third or fourth number of the box, by its version."""
    version = walk.content(box, 1)[0]
    count = int.from_bytes(walk.content(box, 4, at=12 if version else 8), "big")
    if count * (8 if box.type == b"sbgp" else 1) > box.end - box.body:
        raise ClipError(f"truncated or damaged: the table {_name(box)} claims {count:,} entries")


def _check_sample_sizes(walk: _BoxWalk, box: _Box) -> None:
    fields = walk.content(box, 12)
    count = int.from_bytes(fields[8:], "big")
    _add_frames(walk, count)
    bits = 32 if box.type == b"stsz" else fields[7]
    constant = int.from_bytes(fields[4:8], "big") if box.type == b"stsz" else 0
    if not constant and count * bits > 8 * (box.end - box.body - 12):
        raise ClipError(f"truncated or damaged: the table {_name(box)} claims {count:,} entries")


def _check_edits(walk: _BoxWalk, box: _Box) -> None:
    fields = walk.content(box, 8)
    count = int.from_bytes(fields[4:], "big")
    if count > MAX_EDITS or count * (20 if fields[0] == 1 else 12) > box.end - box.body - 8:
        raise ClipError(f"its edit list has {count:,} entries; at most {MAX_EDITS} are read")
    walk.edits = max(1, count)


def _check_fragment(walk: _BoxWalk, box: _Box) -> None:
    walk.fragments += 1
    if walk.fragments > MAX_FRAGMENTS:
        raise ClipError(f"holds more than {MAX_FRAGMENTS:,} fragments")
    _walk_children(walk, box)


def _check_track_fragment(walk: _BoxWalk, box: _Box) -> None:
    header = next((child for child in _boxes(walk, box) if child.type == b"tfhd"), None)
    if header is None or walk.content(header, 4, at=4) != walk.track:
        walk.hide(box)
    else:
        _walk_children(walk, box)


def _check_run(walk: _BoxWalk, box: _Box) -> None:
    """Check a list of samples of a fragment. Each of four flags adds a number to every sample."""
    fields = walk.content(box, 8)
    flags, count = int.from_bytes(fields[1:4], "big"), int.from_bytes(fields[4:], "big")
    _add_frames(walk, count)
    bytes_each = 4 * sum(bool(flags & flag) for flag in (0x100, 0x200, 0x400, 0x800))
    if count * bytes_each > box.end - box.body - 8:
        raise ClipError(f"truncated or damaged: a fragment claims {count:,} frames")


def _check_segment_index(walk: _BoxWalk, box: _Box) -> None:
    version = walk.content(box, 1)[0]
    walk.references += int.from_bytes(walk.content(box, 2, at=30 if version else 22), "big")
    if walk.references > MAX_SEGMENT_REFERENCES:
        raise ClipError(f"its index names more than {MAX_SEGMENT_REFERENCES:,} segments")


def _add_frames(walk: _BoxWalk, count: int) -> None:
    walk.frames += count
    if walk.frames > MAX_FRAMES:
        raise ClipError(f"its tables name {walk.frames:,} frames; at most {MAX_FRAMES:,} are read")


def _name(box: _Box) -> str:
    return box.type.decode("ascii", "backslashreplace")


_CHECKS = {
    b"trak": _check_track,
    b"dinf": _check_data_reference,
    b"stsd": _check_sample_entries,
    b"sgpd": _check_group,
    b"sbgp": _check_group,
    b"stsz": _check_sample_sizes,
    b"stz2": _check_sample_sizes,
    b"elst": _check_edits,
    b"moof": _check_fragment,
    b"traf": _check_track_fragment,
    b"trun": _check_run,
    b"sidx": _check_segment_index,
} | dict.fromkeys(_ENTRY_BYTES, _check_table)
