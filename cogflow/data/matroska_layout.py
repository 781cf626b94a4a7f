"""Walk the elements of a Matroska or WebM file, bound them, and hide those that decoding a video does not need.

libav searches a damaged file for elements at every byte, so a file whose elements do not join is refused. Elements:
RFC 9559 (Matroska) and RFC 8794 (EBML).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cogflow.data.media_bytes import ClipError, MediaBytes, MediaLayout

MAX_ELEMENTS = 2**20
"""Elements of the segment and of its clusters."""
MAX_TRACKS = 64

_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_SEEK_HEAD, _TRACKS, _CUES = 0x114D9B74, 0x1654AE6B, 0x1C53BB6B
_INFO, _TAGS, _ATTACHMENTS, _CHAPTERS = 0x1549A966, 0x1254C367, 0x1941A469, 0x1043A770
_SEEK, _SEEK_ID, _SEEK_POSITION = 0x4DBB, 0x53AB, 0x53AC
_LEVEL_1 = frozenset({_CLUSTER, _SEEK_HEAD, _TRACKS, _CUES, _INFO, _TAGS, _ATTACHMENTS, _CHAPTERS})
_FILLING = frozenset({0xEC, 0xBF})  # Void and CRC-32
_MAX_BYTES = {_SEEK_HEAD: 2**16, _INFO: 2**18, _TRACKS: 2**20, _TAGS: 2**19}
"""Bytes of all elements of a kind. libav needs up to fifty times as much for them."""
_MAX_CUES_BYTES = 2**20  # longer ones are hidden: libav then seeks by reading the file
_UNKNOWN = -1


@dataclass(frozen=True)
class _Element:
    """``start``: offset of the header; ``body``: of the content; ``end``: behind it, :data:`_UNKNOWN` in streams."""

    id: int
    start: int
    body: int
    end: int


@dataclass
class _ElementWalk:
    data: MediaBytes
    layout: MediaLayout = field(default_factory=MediaLayout)
    elements: int = 0
    size_by_id: dict[int, int] = field(default_factory=dict)
    places: set[tuple[int, int]] = field(default_factory=set)
    seek_heads: list[_Element] = field(default_factory=list)

    def hide(self, element: _Element) -> None:
        # The last byte of the four-byte ID changes, which makes it the ID of no element.
        self.layout.hidden[element.start + 3] = bytes([(element.id & 0xFF) ^ 0x08])


def read_layout(data: MediaBytes) -> MediaLayout:
    """Return which elements are hidden from libav. Raises :class:`ClipError` for a file beyond the limits."""
    walk = _ElementWalk(data)
    header = _element(walk, 0, data.size)
    place = _known_end(header, data.size)
    segment = _element(walk, place, data.size)
    while segment.id in _FILLING:
        segment = _element(walk, _known_end(segment, data.size), data.size)
    if header.id != _EBML or segment.id != _SEGMENT:
        raise ClipError("truncated or damaged: holds no Matroska segment")
    end = min(data.size, segment.end if segment.end != _UNKNOWN else data.size)
    _walk_segment(walk, segment.body, end)
    if end < data.size:
        _refuse_more_segments(walk, end)
    for seek_head in walk.seek_heads:
        if not _leads_to_known_elements(walk, seek_head, segment.body):
            walk.hide(seek_head)
    return walk.layout


def _walk_segment(walk: _ElementWalk, place: int, end: int) -> None:
    while place < end:
        element = _element(walk, place, end)
        if element.id == _CLUSTER:
            place = _walk_cluster(walk, element, end)
            continue
        place = _known_end(element, end)
        if element.id in _LEVEL_1:
            _check_level_1(walk, element, place)


def _check_level_1(walk: _ElementWalk, element: _Element, end: int) -> None:
    walk.places.add((element.id, element.start))
    total = walk.size_by_id[element.id] = walk.size_by_id.get(element.id, 0) + end - element.body
    most = _MAX_BYTES.get(element.id)
    if most is not None and total > most:
        raise ClipError(f"its header element {element.id:X} has {total:,} bytes; at most {most:,} are read")
    if element.id in (_ATTACHMENTS, _CHAPTERS) or (element.id == _CUES and total > _MAX_CUES_BYTES):
        walk.hide(element)
    if element.id == _SEEK_HEAD:
        walk.seek_heads.append(element)
    if element.id == _TRACKS:
        for number, _ in enumerate(_children(walk, element.body, end), start=1):
            if number > MAX_TRACKS:
                raise ClipError(f"its header names more than {MAX_TRACKS} tracks")


def _walk_cluster(walk: _ElementWalk, cluster: _Element, end: int) -> int:
    """Return the end of a cluster. One of unknown size ends at the next element of the segment."""
    if cluster.end != _UNKNOWN:
        inner_end = _known_end(cluster, end)
        for _ in _children(walk, cluster.body, inner_end):
            pass
        return inner_end
    place = cluster.body
    while place < end:
        child = _element(walk, place, end)
        if child.id in _LEVEL_1:
            return place
        place = _known_end(child, end)
    return place


def _children(walk: _ElementWalk, place: int, end: int) -> Iterator[_Element]:
    while place < end:
        child = _element(walk, place, end)
        place = _known_end(child, end)
        yield child


def _refuse_more_segments(walk: _ElementWalk, place: int) -> None:
    for element in _children(walk, place, walk.data.size):
        if element.id not in _FILLING:
            raise ClipError("truncated or damaged: more follows its Matroska segment")


def _leads_to_known_elements(walk: _ElementWalk, seek_head: _Element, origin: int) -> bool:
    """Return whether every entry of a seek head names an element that the walk met, or a place behind the file."""
    for entry in _children(walk, seek_head.body, seek_head.end):
        if entry.id != _SEEK:
            continue
        values = {
            child.id: int.from_bytes(walk.data.read_at(child.body, child.end - child.body), "big")
            for child in _children(walk, entry.body, entry.end)
        }
        place = origin + values.get(_SEEK_POSITION, 0)
        if values.get(_SEEK_ID) == _CLUSTER or place >= walk.data.size:
            continue
        if (values.get(_SEEK_ID, 0), place) not in walk.places:
            return False
    return True


def _known_end(element: _Element, limit: int) -> int:
    if element.end == _UNKNOWN or element.end > limit:
        raise ClipError(f"truncated or damaged: the element {element.id:X} is longer than what it is in")
    return element.end


def _element(walk: _ElementWalk, place: int, end: int) -> _Element:
    """Return the element at ``place``: its ID with the length marker, and where its content is."""
    walk.elements += 1
    if walk.elements > MAX_ELEMENTS:
        raise ClipError(f"holds more than {MAX_ELEMENTS:,} Matroska elements")
    header = walk.data.read_at(place, min(12, end - place))
    id_length = _coded_length(header[:1])
    size_length = _coded_length(header[id_length : id_length + 1])
    if not 1 <= id_length <= 4 or not size_length or len(header) < id_length + size_length:
        raise ClipError(f"truncated or damaged: no Matroska element at byte {place}")
    coded = int.from_bytes(header[id_length : id_length + size_length], "big")
    size = coded & ((1 << 7 * size_length) - 1)
    body = place + id_length + size_length
    unknown = size == (1 << 7 * size_length) - 1
    return _Element(int.from_bytes(header[:id_length], "big"), place, body, _UNKNOWN if unknown else body + size)


def _coded_length(first: bytes) -> int:
    """Return the length of an EBML number by its first byte: one more than its leading zero bits; 0: none."""
    return 9 - first[0].bit_length() if first and first[0] else 0
