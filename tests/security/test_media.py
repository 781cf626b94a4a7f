"""Test that no video or picture opens a second file, blocks, or takes memory and time out of proportion.

Each test makes the hostile file itself and reads it in a child process with limits of the operating system.
"""

from __future__ import annotations

import functools
import http.server
import io
import os
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cogflow.config.data_section import DataConfig
from cogflow.data import matroska_layout, media, mp4_layout, video_decoding
from cogflow.data.clip_index import ClipEntry
from cogflow.data.clips import read_clip
from cogflow.data.encode import read_source_clip
from cogflow.data.media import open_picture
from cogflow.data.media_bytes import ClipError
from cogflow.data.video import read_video
from cogflow.data.video_decoding import inspect_clip
from cogflow.errors import DataError
from cogflow.sampling.clip_files import read_clips

sys.path.insert(0, str(Path(__file__).parent))

from bounded import run_bounded
from hostile_media import TABLES, box, change_box, element, full_box, split_matroska, write_sound

DATA = DataConfig(frames=5, height=32, width=32, fps=8)
READERS: dict[str, Callable[[Path], Any]] = {
    "read_clip": lambda path: read_clip(path, DATA),
    "inspect_clip": inspect_clip,
    "read_video": read_video,
}


def outcome(path: Path, read: Callable[[Path], Any] = READERS["read_clip"]) -> str:
    """Return the reason for which ``path`` is refused, or "read"."""
    try:
        read(path)
    except ClipError as error:
        return error.reason
    return "read"


def bounded_outcome(path: Path, reader: str = "read_clip") -> str:
    return str(run_bounded(lambda: outcome(path, READERS[reader])))


def grey_levels(path: Path) -> list[int]:
    """Return the mean grey level of each of the five frames."""
    return [round(float(frame.float().mean())) for frame in read_clip(path, DATA).frames]


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A video outside of the folder of clips, which no clip may show."""
    (tmp_path / "private").mkdir()
    return write_sound(tmp_path / "private" / "secret.mp4")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


# Files that name other files


@pytest.mark.parametrize("reader", READERS)
def test_a_concat_text_that_names_a_playlist_is_refused(clips: Path, private: Path, reader: str) -> None:
    (clips / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.5,\n{private}\n#EXT-X-ENDLIST\n")
    (clips / "a.mp4").write_text("ffconcat version 1.0\nfile list.m3u8\n")
    assert "neither MP4 or MOV nor Matroska or WebM" in bounded_outcome(clips / "a.mp4", reader)


def test_a_concat_text_that_names_a_link_or_a_pipe_is_refused(clips: Path, private: Path) -> None:
    (clips / "link.mp4").symlink_to(private)
    os.mkfifo(clips / "pipe.mp4")
    for name in ("link.mp4", "pipe.mp4"):
        (clips / "a.mp4").write_text(f"ffconcat version 1.0\nfile {name}\n")
        assert "neither MP4 or MOV nor Matroska or WebM" in bounded_outcome(clips / "a.mp4")


def test_a_concat_text_of_two_million_lines_is_refused_at_once(clips: Path) -> None:
    (clips / "a.mp4").write_text("ffconcat version 1.0\n" + "file a.mp4\n" * 2_000_000)
    assert "neither" in run_bounded(lambda: outcome(clips / "a.mp4"), seconds=2, megabytes=64)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.5,\nfile://{private}\n#EXT-X-ENDLIST\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{private}</BaseURL></MPD>',
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "<!doctype html><video src='{private}'></video>",
        "YUV4MPEG2 W64 H64 F8:1 C420\nFRAME\n",
        "\x89PNG\r\n\x1a\n",
    ],
    ids=["hls", "dash", "sdp", "html", "y4m", "png"],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_formats_that_are_not_documented_are_refused(clips: Path, private: Path, text: str, suffix: str) -> None:
    (clips / f"a{suffix}").write_text(text.replace("{private}", str(private)), encoding="latin-1")
    assert "not a readable video" in bounded_outcome(clips / f"a{suffix}")


@contextmanager
def loopback_server() -> Iterator[tuple[int, list[str]]]:
    """Serve HTTP; yield the port and the list of requests."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], requests
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_named_like_a_url_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback_server() as (port, requests):
        folder = tmp_path / "http:" / f"127.0.0.1:{port}"
        folder.mkdir(parents=True)
        write_sound(folder / "a.mp4")
        monkeypatch.chdir(tmp_path)
        assert bounded_outcome(Path(f"http:/127.0.0.1:{port}/a.mp4")) == "read"
        # Path makes one slash of two; a name that reaches libav as text would be a URL.
        assert "missing" in bounded_outcome(Path(f"http:/127.0.0.1:{port}/b.mp4"))
    assert requests == []


@pytest.mark.parametrize("kind", [b"url ", b"alis", b"urn "])
def test_frames_in_another_file_are_refused(clips: Path, private: Path, kind: bytes) -> None:
    """A data reference of an MP4 or MOV file may name the file that holds the frames."""
    sound = write_sound(clips / "a.mp4").read_bytes()
    name = str(private).encode() + b"\0"
    alias = bytes(150) + struct.pack(">HH", 2, len(name)) + name + struct.pack(">h", -1)
    entry = full_box(kind, alias if kind == b"alis" else name)
    reference = box(b"dinf", full_box(b"dref", struct.pack(">I", 1), entry))
    (clips / "b.mp4").write_bytes(change_box(sound, (*TABLES[:4], b"dinf"), lambda _: reference))
    assert "refers to another file" in bounded_outcome(clips / "b.mp4")


def test_linked_segments_chapters_and_attachments_of_matroska_are_ignored(clips: Path) -> None:
    sound = write_sound(clips / "a.mkv").read_bytes()
    (clips / "other.mkv").write_bytes(sound)
    header, content = split_matroska(sound)
    uid = bytes(range(16))
    link = element(
        0x1549A966, element(0x2AD7B1, b"\x0f\x42\x40"), element(0x3EB923, uid), element(0x3E83BB, b"other.mkv")
    )
    atom = element(0xB6, element(0x73C4, b"\1"), element(0x91, b"\0"), element(0x92, b"\7"), element(0x6E67, uid))
    chapters = element(0x1043A770, element(0x45B9, element(0x45DD, b"\1"), atom))
    attached = element(0x61A7, element(0x466E, b"../a"), element(0x4660, b"video/mp4"), element(0x465C, bytes(999)))
    more = chapters + element(0x1941A469, attached)
    (clips / "b.mkv").write_bytes(header + element(0x18538067, content + more))
    (clips / "c.mkv").write_bytes(header + element(0x18538067, link + more + content))
    expected = run_bounded(lambda: grey_levels(clips / "a.mkv"))
    assert run_bounded(lambda: grey_levels(clips / "b.mkv")) == expected
    (clips / "other.mkv").unlink()
    os.mkfifo(clips / "other.mkv")
    assert run_bounded(lambda: grey_levels(clips / "c.mkv")) == expected


# Files that are no regular files


@pytest.fixture
def special(clips: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that makes a file of a kind in the folder of clips."""
    sockets: list[socket.socket] = []

    def make(kind: str) -> Path:
        path = clips / "a.mp4"
        if kind == "a named pipe":
            os.mkfifo(path)
        elif kind == "a socket":
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[0].bind(os.path.relpath(path))
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return path

    yield make
    for one in sockets:
        one.close()


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a folder"])
def test_special_files_are_refused_at_once(special: Callable[[str], Path], kind: str) -> None:
    path = special(kind)
    expected = f"{kind}, not a regular file"
    for reader in READERS:
        assert bounded_outcome(path, reader) == expected
    found = run_bounded(lambda: read_source_clip(ClipEntry(path, "text", "a.mp4"), DATA).reason)
    assert found == expected
    assert run_bounded(lambda: picture_outcome(path)) == expected


def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_refused(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, pipe = write_sound(clips / "a.mp4"), clips / "pipe.mp4"
    os.mkfifo(pipe)
    monkeypatch.setattr(media, "file_size", lambda path: sound.stat().st_size)
    assert bounded_outcome(pipe, "read_video") == "a named pipe, not a regular file"


# Tables out of proportion


def test_a_table_that_names_one_frame_many_times_is_refused(clips: Path) -> None:
    with av.open(str(clips / "a.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = 640, 640, "yuvj420p"
        noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    sound = (clips / "a.mp4").read_bytes()
    with av.open(str(clips / "a.mp4")) as container:
        packet = next(container.demux(video=0))
        size, place = packet.size, packet.pos
    assert size > 100_000
    count = 20_000
    stbl = TABLES
    hostile = change_box(sound, (*stbl, b"stsz"), lambda _: full_box(b"stsz", struct.pack(">II", size, count)))
    hostile = change_box(hostile, (*stbl, b"stts"), lambda _: full_box(b"stts", struct.pack(">III", 1, count, 64)))
    hostile = change_box(hostile, (*stbl, b"stsc"), lambda _: full_box(b"stsc", struct.pack(">IIII", 1, 1, 1, 1)))
    places = struct.pack(">I", count) + struct.pack(">I", place) * count
    hostile = change_box(hostile, (*stbl, b"stco"), lambda _: full_box(b"stco", places))
    (clips / "b.mp4").write_bytes(hostile)
    for reader in ("read_clip", "inspect_clip"):
        assert "name the same bytes many times" in bounded_outcome(clips / "b.mp4", reader)


@pytest.mark.parametrize("count", [10**7, 2**32 - 1])
def test_a_table_of_ten_million_frames_is_refused(clips: Path, count: int) -> None:
    sound = write_sound(clips / "a.mp4").read_bytes()
    hostile = change_box(sound, (*TABLES, b"stsz"), lambda _: full_box(b"stsz", struct.pack(">II", 1, count)))
    (clips / "b.mp4").write_bytes(hostile)
    assert f"name {count:,} frames" in run_bounded(lambda: outcome(clips / "b.mp4"), seconds=5, megabytes=64)


def test_a_table_of_ten_million_sizes_that_is_really_there_is_refused(clips: Path) -> None:
    sound = write_sound(clips / "a.mp4").read_bytes()
    sizes = struct.pack(">II", 0, 10**7) + bytes(4 * 10**7)
    (clips / "b.mp4").write_bytes(change_box(sound, (*TABLES, b"stsz"), lambda _: full_box(b"stsz", sizes)))
    assert "name 10,000,000 frames" in run_bounded(lambda: outcome(clips / "b.mp4"), seconds=5, megabytes=64)


@pytest.mark.parametrize("table", [b"stts", b"stsc", b"stco", b"stss", b"ctts"])
def test_a_table_that_claims_more_entries_than_it_has_is_refused(clips: Path, table: bytes) -> None:
    sound = write_sound(clips / "a.mp4").read_bytes()
    hostile = change_box(sound, (*TABLES, table), lambda _: full_box(table, struct.pack(">I", 2**28), bytes(24)))
    (clips / "b.mp4").write_bytes(hostile)
    assert "claims 268,435,456 entries" in run_bounded(lambda: outcome(clips / "b.mp4"), seconds=5, megabytes=64)


def test_an_edit_list_that_repeats_the_clip_is_refused(clips: Path) -> None:
    sound = write_sound(clips / "a.mp4").read_bytes()
    count = 10**6
    hostile = change_box(sound, (*TABLES, b"stsz"), lambda _: full_box(b"stsz", struct.pack(">II", 1, count)))
    edits = full_box(b"elst", struct.pack(">I", 200), struct.pack(">IIHH", 10**9, 0, 1, 0) * 200)
    hostile = change_box(hostile, (b"moov", b"trak", b"edts"), lambda _: box(b"edts", edits))
    (clips / "b.mp4").write_bytes(hostile)
    assert "edit list shows 1,000,000 frames up to 200 times" in bounded_outcome(clips / "b.mp4")


def test_tables_in_unusual_places_do_not_reach_libav(clips: Path) -> None:
    """libav reads a table wherever it is; here it is in metadata, in a sample description and in a compressed box."""
    sound = write_sound(clips / "a.mp4").read_bytes()
    bomb = full_box(b"stsz", struct.pack(">II", 1, 2**27))
    packed = zlib.compress(bytes(2**27))
    compressed = box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", struct.pack(">I", 2**27), packed))
    in_metadata = box(b"udta", bomb, box(b"trak", bomb), compressed)
    expected = run_bounded(lambda: grey_levels(clips / "a.mp4"))
    for names in ((b"moov", b"trak", b"tkhd"), (b"moov", b"mvhd"), (*TABLES, b"stts")):
        hostile = change_box(sound, names, lambda known: known + in_metadata)
        (clips / "b.mp4").write_bytes(hostile)
        assert run_bounded(lambda: grey_levels(clips / "b.mp4"), megabytes=256) == expected
    described = change_box(
        sound,
        (*TABLES, b"stsd"),
        lambda known: box(b"stsd", known[8:16], box(known[20:24], known[24:], bomb)),
    )
    (clips / "c.mp4").write_bytes(described)
    assert run_bounded(lambda: grey_levels(clips / "c.mp4"), megabytes=256) == expected
    only_compressed = change_box(sound, (b"moov",), lambda known: box(b"moov", compressed))
    (clips / "d.mp4").write_bytes(only_compressed)
    assert "no video stream" in bounded_outcome(clips / "d.mp4")


def test_an_endless_fragmented_file_is_refused(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4_layout, "MAX_FRAGMENTS", 2_000)
    sound = write_sound(clips / "a.mp4", muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof"}).read_bytes()
    at = sound.index(b"moof") - 4
    header, size = sound[:at], struct.unpack(">I", sound[at : at + 4])[0]
    fragment = sound[at : at + size]
    (clips / "b.mp4").write_bytes(header + (fragment + box(b"mdat", bytes(64))) * 2_001)
    assert bounded_outcome(clips / "b.mp4") == "holds more than 2,000 fragments"
    run = full_box(b"trun", struct.pack(">I", 2**30))
    hostile = change_box(sound, (b"moof", b"traf", b"trun"), lambda _: run)
    (clips / "c.mp4").write_bytes(hostile)
    assert "name 1,073,741,824 frames" in run_bounded(lambda: outcome(clips / "c.mp4"), seconds=5, megabytes=64)


def test_headers_of_matroska_out_of_proportion_are_refused(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matroska_layout, "MAX_ELEMENTS", 50_000)  # the real limit takes five seconds to reach
    header, content = split_matroska(write_sound(clips / "a.mkv").read_bytes())
    hostile = {
        "tracks": element(0x1654AE6B, b"\xae\x80" * 500_000),
        "its header element": element(0x1254C367, b"\x73\x73\x80" * 2_000_000),
        "Matroska elements": b"\xec\x80" * 100_000,
    }
    for reason, bomb in hostile.items():
        (clips / "b.mkv").write_bytes(header + element(0x18538067, bomb + content))
        assert reason in bounded_outcome(clips / "b.mkv")
    chapters = element(0x1043A770, element(0x45B9, b"\xb6\x80" * 1_000_000))
    (clips / "c.mkv").write_bytes(header + element(0x18538067, content + chapters))
    assert run_bounded(lambda: outcome(clips / "c.mkv"), megabytes=256) == "read"


def test_elements_that_only_a_seek_head_leads_to_do_not_reach_libav(clips: Path) -> None:
    """libav follows a seek head to any byte, here into a Void element that hides 500,000 tracks' tags."""
    header, content = split_matroska(write_sound(clips / "a.mkv").read_bytes())
    info = b"\x15\x49\xa9\x66"  # first in its own seek head
    tags = element(0x1254C367, b"\x73\x73\x80" * 2_000_000)
    place = len(element(0x114D9B74, element(0x4DBB, element(0x53AB, bytes(4)), element(0x53AC, bytes(4))))) + 9
    seek = element(0x4DBB, element(0x53AB, b"\x12\x54\xc3\x67"), element(0x53AC, struct.pack(">I", place)))
    hostile = element(0x114D9B74, seek) + element(0xEC, tags) + content[content.index(info, content.index(info) + 4) :]
    (clips / "b.mkv").write_bytes(header + element(0x18538067, hostile))
    assert run_bounded(lambda: outcome(clips / "b.mkv"), megabytes=256) == "read"


@functools.cache
def png(width: int, height: int) -> bytes:
    """Return a black picture of one bit per pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    fields = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@functools.cache
def jpeg(width: int, height: int) -> bytes:
    """Return a black grey-scale picture."""
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG", quality=1, progressive=True)
    return file.getvalue()


def write_pictures(path: Path, stated: tuple[int, int], pictures: list[bytes]) -> Path:
    """Write PNG or JPEG pictures as the frames of a video whose header states another size (width, height)."""
    with av.open(str(path), "w") as container:
        is_png = pictures[0][1:4] == b"PNG"
        stream = container.add_stream("png" if is_png else "mjpeg", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = *stated, "rgb24" if is_png else "yuvj420p"
        for index, picture in enumerate(pictures):
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.duration = stream, index, index, 1
            packet.time_base, packet.is_keyframe = Fraction(1, 8), True
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
@pytest.mark.parametrize("first", [(8192, 8192), (64, 64)])
def test_frames_far_larger_than_the_header_states_are_refused(clips: Path, suffix: str, first: tuple[int, int]) -> None:
    make = png if suffix == ".mov" else jpeg
    path = write_pictures(clips / f"a{suffix}", (64, 64), [make(*first), *[make(8192, 8192)] * 11])
    assert path.stat().st_size < 5_000_000
    found = bounded_outcome(path)
    assert found != "read"
    assert run_bounded(lambda: outcome(path), megabytes=512) == found


def test_far_too_narrow_frames_are_refused(clips: Path) -> None:
    path = write_pictures(clips / "a.mov", (8192, 2), [png(8192, 2)] * 12)
    assert bounded_outcome(path) == "too narrow: 8192x2 for 32x32"


def test_decoding_ends_when_a_small_file_needs_too_many_frames(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sound(clips / "a.mp4", frames=28)
    monkeypatch.setattr(video_decoding, "_DECODED_PIXELS_PER_BYTE", 0)
    monkeypatch.setattr(video_decoding, "_DECODED_PIXELS", 28 * 64 * 64)
    assert outcome(path) == "read"
    monkeypatch.setattr(video_decoding, "_DECODED_PIXELS", 4 * 64 * 64)
    assert "pixels are decoded" in outcome(path)


@pytest.mark.parametrize(
    ("seconds", "fps", "size", "kilobits"),
    [(600, 60, (3840, 2160), 8_000), (300, 24, (7680, 4320), 10_000), (1800, 30, (1920, 1080), 200)],
    ids=["4K", "8K", "screen recording"],
)
def test_the_pixel_budget_covers_long_real_clips(seconds: int, fps: int, size: tuple[int, int], kilobits: int) -> None:
    """Decoding all of the clip fits, as with one key frame at its start and the window at its end."""
    assert seconds * fps * size[0] * size[1] < video_decoding.pixel_budget(seconds * kilobits * 1000 // 8)


# Pictures


def picture_outcome(path: Path) -> str:
    try:
        with open_picture(path) as picture:
            picture.load()
    except ClipError as error:
        return error.reason
    return "read"


def test_pictures_of_other_formats_and_bombs_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert picture_outcome(tmp_path / "a.png") == "read"
    (tmp_path / "b.png").write_bytes(png(16384, 16384))
    assert "pixels" in run_bounded(lambda: picture_outcome(tmp_path / "b.png"), megabytes=64) or "too large" in str(
        run_bounded(lambda: picture_outcome(tmp_path / "b.png"))
    )
    (tmp_path / "c.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "not a readable picture" in run_bounded(lambda: picture_outcome(tmp_path / "c.png"))
    with pytest.raises(DataError, match="not one clip"):
        next(read_clips(tmp_path))


def test_a_folder_of_videos_reports_a_hostile_one(clips: Path) -> None:
    (clips / "a.mp4").write_text("ffconcat version 1.0\nfile b.mp4\n")
    with pytest.raises(DataError, match="neither MP4"):
        next(read_clips(clips))


def test_metadata_that_is_not_utf_8_does_not_end_the_run(clips: Path) -> None:
    sound = write_sound(clips / "a.mp4").read_bytes()
    assert b"isom" in sound[8:40]
    (clips / "a.mp4").write_bytes(sound.replace(b"iso2", b"\xff\xfeo2", 1))
    assert bounded_outcome(clips / "a.mp4") == "read"


def decoded(container: av.container.InputContainer) -> list[tuple[int | None, bytes]]:
    """Return time stamp and pixels of each frame."""
    return [(frame.pts, frame.to_ndarray(format="rgb24").tobytes()) for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("name", "codec", "muxer"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mp4", "libx264", {"movflags": "dash+frag_keyframe+global_sidx"}),
        ("a.mov", "libx264", {}),
        ("a.mkv", "libx264", {}),
        ("a.mkv", "libx264", {"cluster_size_limit": "500", "cues_to_front": "1", "reserve_index_space": "2000"}),
        ("a.webm", "libvpx", {}),
        ("a.webm", "libvpx", {"live": "1"}),
        ("a.mov", "png", {}),
    ],
)
def test_sound_files_are_read_as_libav_reads_them(clips: Path, name: str, codec: str, muxer: dict[str, str]) -> None:
    path = clips / name
    if codec == "png":
        write_pictures(path, (64, 64), [png(64, 64)] * 12)
    else:
        write_sound(path, codec=codec, muxer=muxer)
    with av.open(str(path)) as container:
        direct = decoded(container)
    with media.open_media(path) as container:
        assert decoded(container) == direct
    assert outcome(path) == "read"
