"""Test stage=prepare with bad clips, ranks that die or hang, and full disks: published clips are correct."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import av
import pytest

from cogflow.data.latent_cache import LatentCache
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from tests.faults.conftest import server_says
from tests.faults.server import Done, Server

pytestmark = pytest.mark.slow

GOOD = 6


@dataclass(frozen=True)
class Place:
    """Runs below ``root``."""

    root: Path
    server: Server


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("preparing"), server)


def listed(folder: Path, names: list[str]) -> Path:
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": f"what {name} shows"}) + "\n" for name in names)
    )
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return ten good clips and one of each bad kind."""
    folder = tmp_path_factory.mktemp("clips")
    for number, scene in enumerate(scenes(GOOD, 0)):
        write_video(folder / f"good-{number}.mp4", draw(scene, 20, 64, 96), 8)
    whole = (folder / "good-0.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "truncated.mp4").write_bytes(whole[: int(0.6 * len(whole))])
    (folder / "text.mp4").write_text("this is a text that somebody renamed\n" * 50)
    write_video(folder / "one-frame.mp4", draw(scenes(1, 0)[0], 1, 64, 96), 8)
    lying(folder / "good-0.mp4", folder / "lying.mkv")
    return folder


def lying(source: Path, target: Path) -> None:
    """Write the frames of ``source`` with a header that claims a minute more."""
    with av.open(str(source)) as taken, av.open(str(target), "w") as made:
        stream = taken.streams.video[0]
        copy = made.add_stream_from_template(stream)
        for packet in taken.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                made.mux(packet)
    original = target.read_bytes()
    changed = original.replace(b"00:00:02.", b"00:01:02.")
    assert changed != original, "the header states no length"
    target.write_bytes(changed)


BAD = {
    "empty.mp4": "0 bytes",
    "truncated.mp4": "truncated: the header lists frames beyond the end",
    "text.mp4": "not a readable video",
    "one-frame.mp4": "one frame only",
    "lying.mkv": "claims 62.50 s",
}


def prepare(place: Place, name: str, clips: Path, *more: str, root: Path | None = None, **order: object) -> Done:
    return place.server.run(
        "stage=prepare",
        "data=folder",
        f"data.path={clips}",
        f"run.root={root or place.root}",
        f"run.name={name}",
        "data.holdout=2",
        "data.frames=5",
        "data.height=32",
        "data.width=32",
        "stage.shard_clips=2",
        *more,
        **order,
    )


def tensors(cache: Path) -> dict[str, tuple[bytes, ...]]:
    """Return every tensor of a cache by the name of its clip."""
    held = LatentCache(cache)
    entries = (held.entry(position) for position in range(len(held)))
    return {
        entry.name: tuple(one.numpy().tobytes() for one in (entry.mean, entry.logvar, entry.embeds.float()))
        for entry in entries
    }


@pytest.fixture(scope="module")
def whole(place: Place, clips: Path) -> str:
    """Return a run prepared by one rank without a fault."""
    server_says(prepare(place, "folder-whole", listed(clips, [f"good-{number}.mp4" for number in range(GOOD)])), 0)
    return "folder-whole"


@pytest.fixture
def only_good(clips: Path) -> Path:
    return listed(clips, [f"good-{number}.mp4" for number in range(GOOD)])


def quarantined(place: Place, name: str) -> dict[str, str]:
    lines = (place.root / name / "cache/quarantine.jsonl").read_text().splitlines()
    return {row["name"]: row["reason"] for row in map(json.loads, lines)}


def test_bad_clips_are_left_out_alike_by_two_ranks(place: Place, whole: str, clips: Path) -> None:
    names = [f"good-{number}.mp4" for number in range(GOOD)]
    for number, name in enumerate(BAD):
        names.insert(2 * number + 1, name)
    done = prepare(place, "some-bad", listed(clips, names), "data.max_bad_share=0.5", ranks=2)
    assert done.codes == [0, 0] and "5 clips are unreadable" in done.text, done.text[-3000:]
    found = quarantined(place, "some-bad")
    assert found.keys() == BAD.keys()
    assert {name: reason for name, reason in found.items() if BAD[name] not in reason} == {}
    assert tensors(place.root / "some-bad/cache") == tensors(place.root / whole / "cache")


def test_too_many_bad_clips_on_one_rank_end_both_ranks(place: Place, clips: Path) -> None:
    """All bad clips are on rank 1, which alone counts them."""
    names = [name for number, bad in enumerate(BAD) for name in (f"good-{number}.mp4", bad)]
    done = prepare(place, "too-bad", listed(clips, names), "data.max_bad_share=0.2", ranks=2, seconds=60)
    assert done.codes[1] == 2 and done.codes[0] != 0 and not done.timed_out, done.text[-3000:]
    assert "rank 1: DataError: 3 of 10 clips are unreadable so far; data.max_bad_share=0.2 allows 2" in done.text
    assert set(quarantined(place, "too-bad")) < set(BAD) and not (place.root / "too-bad/cache/index.json").exists()


def test_a_wholly_bad_data_set_stops_both_ranks_in_seconds(place: Place, tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.mp4").write_text(f"no video {number}\n" * 50)
    done = prepare(
        place, "all-bad", listed(tmp_path, [f"{number}.mp4" for number in range(200)]), "data.max_bad_share=1", ranks=2
    )
    assert done.codes == [2, 2] and done.seconds < 20, (done.codes, done.text[-3000:])
    assert "clips can be read" in done.text and quarantined(place, "all-bad")["0.mp4"].startswith(
        "not a readable video"
    )


def test_a_killed_rank_is_named_and_finished_work_is_reused(place: Place, whole: str, only_good: Path) -> None:
    done = prepare(place, "killed-rank", only_good, ranks=2, fault="kill@encoding#3/1", seconds=60)
    assert done.fired == ["kill@encoding#3/1"] and done.codes == [1, -9] and not done.timed_out, (
        done.codes,
        done.text[-3000:],
    )
    assert "rank 1 (" in done.text and "is gone; its last phase: " in done.text
    assert not (place.root / "killed-rank/cache/index.json").exists()
    again = prepare(place, "killed-rank", only_good, ranks=2)
    # Rank 0 had encoded its three; of rank 1's, the shard of the first two was published.
    assert again.codes == [0, 0] and "1 encoded, 5 reused" in again.text, again.text[-3000:]
    assert tensors(place.root / "killed-rank/cache") == tensors(place.root / whole / "cache")


def test_a_rank_that_hangs_while_encoding_is_named(place: Place, only_good: Path) -> None:
    done = prepare(
        place, "hung-rank", only_good, "stage.stall_minutes=0.15", ranks=2, fault="hang@encoding#2/1", seconds=60
    )
    assert done.fired == ["hang@encoding#2/1"] and done.codes == [1, 1] and not done.timed_out, (
        done.codes,
        done.text[-3000:],
    )
    assert "rank 1 (" in done.text and "phase: encoding clips" in done.text


def test_a_disk_that_fills_up_keeps_the_published_shards(place: Place, whole: str, only_good: Path) -> None:
    cache = place.root / "limited-prepare/cache"
    done = prepare(place, "limited-prepare", only_good, "stage.shard_clips=1", fault="full@shard#11")
    assert done.fired == ["full@shard#11"]
    server_says(done, 2, "StorageError", str(cache), "free")
    kept = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert kept and not [name for name in kept if name.startswith(".")]
    server_says(prepare(place, "limited-prepare", only_good, "stage.shard_clips=1"), 0, "reused")
    assert {name: (cache / name).read_bytes() for name in kept} == kept
    assert tensors(cache) == tensors(place.root / whole / "cache")


def test_a_disk_without_room_names_path_needed_and_free(
    place: Place, whole: str, only_good: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in (place.root / whole / "cache").iterdir())
    if os.system(f"mount -t tmpfs -o size={needed // 2} none {disk} 2>/dev/null") != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        done = prepare(place, "small", only_good, root=disk)
        server_says(done, 2, "StorageError", str(disk / "small/cache"), "needs", "are free")
        assert not (disk / "small/cache/index.json").exists()
        assert os.system(f"mount -o remount,size=64M {disk}") == 0
        server_says(prepare(place, "small", only_good, root=disk), 0, "reused")
        assert tensors(disk / "small/cache") == tensors(place.root / whole / "cache")
    finally:
        os.system(f"umount {disk}")
