"""Mutate small sound clips: each must be read or refused with a reason, within limits of memory and time.

``COGFLOW_FUZZ_SECONDS=600 pytest tests/security/test_fuzz_clips.py`` runs the long version with a random seed.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogflow.config.data_section import DataConfig
from cogflow.data.clips import read_clip
from cogflow.data.media_bytes import ClipError
from cogflow.data.video_decoding import inspect_clip

sys.path.insert(0, str(Path(__file__).parent))

from bounded import run_bounded
from hostile_media import write_sound

DATA = DataConfig(frames=5, height=32, width=32, fps=8)
SECONDS_EACH = 10
MEGABYTES = 768
BATCH = 25
FUZZ_SECONDS = int(os.environ.get("COGFLOW_FUZZ_SECONDS", "0"))
EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**24, 2**28, 2**30, 2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1)
NAMES = (
    (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"stsz", b"stsc", b"stco", b"stts", b"ctts", b"elst")
    + (b"edts", b"moof", b"traf", b"trun", b"mdat", b"free", b"cmov", b"hdlr", b"dref", b"sidx", b"\x1a\x45\xdf\xa3")
    + (b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b", b"\x11\x4d\x9b\x74", b"\x12\x54\xc3\x67", b"\x1c\x53\xbb\x6b")
)


@dataclass(frozen=True)
class Mutation:
    """One change at the share ``place`` of a file: what ``kind`` does with ``number``."""

    kind: str
    place: float
    number: int


KINDS = ("flip", "byte", "extreme", "name", "delete", "repeat", "cut", "zero")


def mutate(content: bytes, mutations: Sequence[Mutation]) -> bytes:
    """Apply mutations one after the other."""
    data = bytearray(content)
    for mutation in mutations:
        if len(data) < 16:
            break
        at, number = int(mutation.place * (len(data) - 8)), mutation.number
        length = 1 + number % 64
        if mutation.kind == "flip":
            data[at] ^= 1 << number % 8
        elif mutation.kind == "byte":
            data[at] = number % 256
        elif mutation.kind == "extreme":
            data[at : at + 4] = struct.pack(">I", EXTREMES[number % len(EXTREMES)])
        elif mutation.kind == "name":
            known = [place for name in NAMES if (place := data.find(name, at)) >= 0]
            place = min(known, default=at)
            data[place : place + 4] = NAMES[number % len(NAMES)]
        elif mutation.kind == "delete":
            del data[at : at + length]
        elif mutation.kind == "repeat":
            data[at:at] = data[at : at + length] * (1 + number % 200)
        elif mutation.kind == "cut":
            del data[at:]
        else:
            data[at : at + length] = bytes(length)
    return bytes(data)


def mutations() -> st.SearchStrategy[list[Mutation]]:
    one = st.builds(
        Mutation, st.sampled_from(KINDS), st.floats(0, 1, allow_nan=False), st.integers(min_value=0, max_value=2**16)
    )
    return st.lists(one, min_size=1, max_size=6)


@pytest.fixture(scope="module")
def sound_clips(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The content of small clips of several containers and codecs."""
    folder = tmp_path_factory.mktemp("sound")
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    paths = [
        write_sound(folder / "a.mp4"),
        write_sound(folder / "b.mp4", muxer={"movflags": "faststart"}),
        write_sound(folder / "c.mp4", muxer=fragments),
        write_sound(folder / "d.mov", codec="mpeg4"),
        write_sound(folder / "e.mkv"),
        write_sound(folder / "f.webm", codec="libvpx"),
        write_sound(folder / "g.webm", codec="libvpx", muxer={"live": "1"}),
    ]
    return [path.read_bytes() for path in paths]


def read_all(paths: Sequence[Path]) -> list[str]:
    """Return for each file the reason for which it is refused, or "read"."""
    found = []
    for path in paths:
        try:
            inspect_clip(path)
            read_clip(path, DATA)
            found.append("read")
        except ClipError as error:
            found.append(error.reason)
    return found


@settings(
    max_examples=30,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(which=st.integers(0, 6), batch=st.lists(mutations(), min_size=1, max_size=8))
def test_mutated_clips_are_read_or_refused(
    sound_clips: list[bytes], tmp_path: Path, which: int, batch: list[list[Mutation]]
) -> None:
    paths = []
    for number, changes in enumerate(batch):
        paths.append(tmp_path / f"{number}.mp4")
        paths[-1].write_bytes(mutate(sound_clips[which], changes))
    reasons = run_bounded(lambda: read_all(paths), seconds=SECONDS_EACH, megabytes=MEGABYTES)
    assert all(reasons) and len(reasons) == len(paths)


def test_sound_clips_are_read(sound_clips: list[bytes], tmp_path: Path) -> None:
    for content in sound_clips:
        (tmp_path / "a.mp4").write_bytes(content)
        assert read_all([tmp_path / "a.mp4"]) == ["read"]


@pytest.mark.slow
@pytest.mark.skipif(not FUZZ_SECONDS, reason="COGFLOW_FUZZ_SECONDS is not set")
def test_mutated_clips_are_read_or_refused_for_a_long_time(sound_clips: list[bytes], tmp_path: Path) -> None:
    """On failure the message names the file; it is kept in the temporary folder of pytest."""
    seed = int(os.environ.get("COGFLOW_FUZZ_SEED", time.time_ns()))
    rng = random.Random(seed)
    tried = refused = 0
    ends = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < ends:
        paths = [tmp_path / f"{number}.mp4" for number in range(BATCH)]
        for path in paths:
            changes = [
                Mutation(rng.choice(KINDS), rng.random(), rng.randrange(2**16)) for _ in range(rng.randint(1, 6))
            ]
            path.write_bytes(mutate(rng.choice(sound_clips), changes))
        try:
            reasons = run_bounded(lambda paths=paths: read_all(paths), SECONDS_EACH, MEGABYTES)
        except AssertionError:
            for path in paths:  # which of them it was
                try:
                    run_bounded(lambda path=path: read_all([path]), SECONDS_EACH, MEGABYTES)
                except AssertionError as error:
                    kept = path.rename(tmp_path / f"failed-{tried}.mp4")
                    raise AssertionError(f"seed {seed}, {kept}: {error}") from error
            raise
        tried += len(reasons)
        refused += sum(reason != "read" for reason in reasons)
    print(f"seed {seed}: {tried} mutated clips, {refused} refused")
    assert tried
