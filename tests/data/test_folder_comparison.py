"""Test the comparison of the folder of clips with the prepared ones, and the description of what changed."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from preparing import DATA, HASHES, Bar, Work, run

from cogflow.data.data_changes import DataChanges, NameList, compare_indexes, pair_by_name
from cogflow.data.folder_comparison import FolderComparison, compare_with_folder
from cogflow.data.latent_cache import LatentCache
from cogflow.files.record_io import read_record, write_record
from cogflow.records.cache_records import CacheIndex
from tests.data.conftest import WriteClip, drawn_clips

COUNT = 6


@pytest.fixture
def clips(tmp_path: Path, write_clip: WriteClip) -> Path:
    return drawn_clips(tmp_path / "clips", COUNT, write_clip)


@pytest.fixture
def folder(tmp_path: Path, clips: Path) -> Path:
    """The cache of the clips."""
    run(clips, tmp_path / "cache", Work(), holdout=1)
    return tmp_path / "cache"


def compared(clips: Path, folder: Path, seconds: float = 60.0) -> FolderComparison:
    data = replace(DATA, path=str(clips), holdout=1)
    return compare_with_folder(LatentCache(folder).index, folder, data, lambda *_: nullcontext(Bar()), seconds)


def edit_captions(clips: Path, **captions: str) -> None:
    path = clips / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"text": captions.get(f"c{row['file_name'][0]}", row["text"])} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_unchanged_folder_is_compared_by_size_and_time(clips: Path, folder: Path) -> None:
    found = compared(clips, folder)
    assert found.changes.lines() == []
    assert f"the captions of {COUNT} clips in metadata.jsonl by their text" in found.summary
    assert f"{COUNT} files by size and time of modification" in found.summary and "content" not in found.summary


def test_a_copied_folder_is_no_change_until_prepare_knows_its_times(tmp_path: Path, clips: Path, folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(clips, copy)
    for path in copy.glob("*.mp4"):
        os.utime(path, ns=(1, 1))
    found = compared(copy, folder)
    assert found.changes.lines() == [] and f"{COUNT} files by content" in found.summary
    work = Work()
    assert run(copy, folder, work, holdout=1).changes == [] and work.clips == 0
    assert f"{COUNT} files by size and time" in compared(copy, folder).summary


def test_each_kind_of_change_is_named(clips: Path, folder: Path) -> None:
    edit_captions(clips, c1="another caption")
    content = (clips / "2.mp4").read_bytes()
    (clips / "2.mp4").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the same size
    (clips / "3.mp4").write_bytes((clips / "4.mp4").read_bytes() + b"\0")
    (clips / "5.mp4").unlink()
    rows = (clips / "metadata.jsonl").read_text().splitlines()
    new = json.dumps({"file_name": "new.mp4", "text": "a new clip"})
    (clips / "metadata.jsonl").write_text("\n".join([new, *rows[1:]]) + "\n")
    found = compared(clips, folder)
    found.changes.clips.names.sort()
    assert found.changes.lines() == [
        "1 caption changed: 1.mp4",
        "2 clips changed: 2.mp4, 3.mp4",
        "1 clip listed without a file: 5.mp4",
        "1 clip added: new.mp4",
        "1 clip removed: 0.mp4",
    ]


def test_a_folder_on_another_machine_is_not_compared(tmp_path: Path, clips: Path, folder: Path) -> None:
    found = compared(tmp_path / "nowhere", folder)
    assert found.changes.lines() == [] and "data.path was not compared with the prepared clips: " in found.summary
    for path in clips.glob("*.mp4"):
        path.unlink()
    found = compared(clips, folder)
    assert found.changes.lines() == [] and "no file, because the clips are not on this machine" in found.summary


def test_the_comparison_stops_when_time_is_up_and_says_so(clips: Path, folder: Path) -> None:
    edit_captions(clips, c1="another caption")
    found = compared(clips, folder, seconds=-1.0)
    assert found.changes.lines() == [] and "time was up before the end of the list" in found.summary


def test_clips_that_were_left_out_are_not_added(tmp_path: Path, clips: Path) -> None:
    (clips / "1.mp4").write_bytes(b"")
    (clips / "2.mp4").unlink()
    run(clips, tmp_path / "cache", Work(), holdout=1)
    assert compared(clips, tmp_path / "cache").changes.lines() == []
    for name in ("1.mp4", "2.mp4"):
        shutil.copy(clips / "0.mp4", clips / name)
    assert compared(clips, tmp_path / "cache").changes.lines() == ["2 clips added: 1.mp4, 2.mp4"]


def test_a_cache_without_sizes_is_compared_by_content(clips: Path, folder: Path) -> None:
    index = read_record(folder / "index.json", CacheIndex)
    entries = [replace(entry, size=None, modified_ns=None) for entry in index.entries]
    write_record(folder / "index.json", replace(index, entries=entries))
    found = compared(clips, folder)
    assert found.changes.lines() == [] and f"{COUNT} files by content" in found.summary


def test_prepare_names_what_it_updates(clips: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_captions(clips, c0="another caption")
    shutil.copy(clips / "1.mp4", clips / "2.mp4")
    result = run(clips, folder, Work(), holdout=1)
    assert result.changes == ["1 caption changed: 0.mp4", "1 clip changed: 2.mp4"] and result.trained_step is None
    out = capsys.readouterr().out
    assert f"updating the prepared clips in {folder}:" in out and "1 caption changed: 0.mp4" in out
    assert not (folder / "former").exists()  # no checkpoint was trained on the former clips
    changes = run(clips, folder, Work(), HASHES | {"vae": "vae-2"}, holdout=1, height=48).changes
    assert changes == ["data.height: 32 then, 48 now", "the clips were encoded with another VAE"]


def test_a_missing_shard_is_written_again_and_replaces_no_clips(
    clips: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = folder.parent / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.json").write_text("{}")  # it cannot be read, so that the clips may be its own
    next(folder.glob("texts-*")).unlink()
    result = run(clips, folder, Work(), holdout=1)
    assert "are missing" in result.changes[0] and result.trained_step is None
    edit_captions(clips, c0="another caption")
    result = run(clips, folder, Work(), holdout=1)
    assert result.trained_step == 3 and "trained up to step 3 on the clips before" in capsys.readouterr().out
    assert len(list((folder / "former").iterdir())) == 1


def test_indexes_that_differ_in_the_order_alone_say_so(clips: Path, folder: Path) -> None:
    former = read_record(folder / "index.json", CacheIndex)
    rows = (clips / "metadata.jsonl").read_text().splitlines()
    (clips / "metadata.jsonl").write_text("\n".join(reversed(rows)))
    run(clips, folder, Work(), holdout=1)
    changes = compare_indexes(former, read_record(folder / "index.json", CacheIndex))
    assert changes.lines() == ["the order of the clips, or which of them are held out"]


def test_clips_are_paired_by_name_wherever_they_are() -> None:
    former = [("a", 1), ("b", 2), ("b", 3), ("c", 4)]
    present = [("x", 9), ("b", 5), ("a", 6), ("b", 7)]
    expected = [("a", 1, 6), ("b", 2, 5), ("b", 3, 7), ("c", 4, None), ("x", None, 9)]
    assert sorted(pair_by_name(former, present), key=str) == expected
    assert list(pair_by_name(former, former)) == [(name, value, value) for name, value in former]


def test_at_most_ten_names_are_shown() -> None:
    names = NameList()
    for number in range(12):
        names.add(f"{number}.mp4")
    (line,) = DataChanges(captions=names).lines()
    assert line == "12 captions changed: " + ", ".join(f"{number}.mp4" for number in range(10)) + " and 2 more"
