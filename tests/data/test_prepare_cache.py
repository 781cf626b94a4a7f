"""Test preparation: correct tensors, no needless work, no outdated tensors, resuming, limits on bad clips."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from preparing import DATA, HASHES, MAX_LENGTH, Work, run, small_text, small_vae

from cogflow.data import preparation as prepare_module
from cogflow.data.clips import read_clip
from cogflow.data.latent_cache import LatentCache
from cogflow.data.quarantine import read_quarantine
from cogflow.data.shapes import draw, scenes
from cogflow.errors import DataError, QualityGateError, StorageError
from cogflow.models.loading import encode_prompts
from tests.faults.server import Server

COUNT = 7
PROGRAM = Path(__file__).with_name("preparing.py")


def write_metadata(folder: Path, texts: dict[str, str]) -> None:
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in texts.items())
    )


def read_texts(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {row["file_name"]: row["text"] for row in rows}


@pytest.fixture
def clips(tmp_path: Path, write_clip) -> Path:
    """Seven clips; the last two share a caption."""
    folder = tmp_path / "clips"
    drawn = scenes(COUNT, 0)
    for number, scene in enumerate(drawn):
        write_clip(folder / f"{number}.mp4", draw(scene, 9, 48, 64), fps=16)
    texts = [scene.caption for scene in drawn[:-2]] + ["the same caption"] * 2
    write_metadata(folder, {f"{number}.mp4": text for number, text in enumerate(texts)})
    return folder


def test_the_cache_holds_the_unscaled_moments_and_the_embeddings(tmp_path: Path, clips: Path) -> None:
    work = Work()
    result = run(clips, tmp_path / "cache", work)
    assert (result.clips, result.encoded_clips, result.encoded_captions) == (COUNT, COUNT, 7)
    assert [warning.split(" (")[0] for warning in result.warnings] == ["2 of 7 clips are held out"]
    assert result.notes == result.changes == [] and result.left_out == {}
    assert work.clips == COUNT and len(work.captions) == len(set(work.captions)) == 7 and "" in work.captions
    cache = LatentCache(tmp_path / "cache")
    texts = list(read_texts(clips).values())
    assert len(cache) == COUNT and cache.texts == texts
    tokenizer, encoder = small_text()
    for position in (0, 6):
        entry = cache.entry(position)
        frames = read_clip(clips / entry.name, DATA).frames
        with torch.no_grad():
            posterior = small_vae().encode(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist
        assert entry.mean.shape == (16, 2, 4, 4) and entry.mean.dtype == entry.logvar.dtype == torch.float32
        torch.testing.assert_close(entry.mean, posterior.mean[0])
        torch.testing.assert_close(entry.logvar, posterior.logvar[0])
        torch.testing.assert_close(entry.embeds, encode_prompts(tokenizer, encoder, [texts[position]], MAX_LENGTH)[0])
    torch.testing.assert_close(cache.empty_embeds, encode_prompts(tokenizer, encoder, [""], MAX_LENGTH)[0])
    assert len({cache.entry(i).key for i in range(COUNT)}) == COUNT
    assert cache.settings.frames == 5 and cache.settings.max_length == MAX_LENGTH and cache.model_hashes == HASHES
    assert cache.mismatches(DATA) == [] and cache.mismatches(type(DATA)(frames=9, height=32, width=32)) == [
        "data.frames=9, prepared with 5"
    ]


def test_an_unchanged_folder_loads_no_model(tmp_path: Path, clips: Path) -> None:
    first = run(clips, tmp_path / "cache", Work())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    work = Work()
    again = run(clips, tmp_path / "cache", work)
    assert (work.vae_loads, work.text_loads, again.encoded_clips, again.encoded_captions) == (0, 0, 0, 0)
    assert again.fingerprint == first.fingerprint and again.clips == COUNT
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_only_changed_clips_and_captions_are_encoded_again(tmp_path: Path, clips: Path, write_clip) -> None:
    folder = tmp_path / "cache"
    prints = [run(clips, folder, Work()).fingerprint]
    texts = read_texts(clips)

    def expect(clip_count: int, captions: list[str], hashes: dict[str, str] | None = None, **data: Any) -> LatentCache:
        work = Work()
        result = run(clips, folder, work, hashes, **data)
        assert (work.clips, work.captions) == (clip_count, captions)
        assert (work.vae_loads, work.text_loads) == (min(1, clip_count), min(1, len(captions)))
        assert (result.encoded_clips, result.encoded_captions) == (clip_count, len(captions))
        prints.append(result.fingerprint)
        return LatentCache(folder)

    old = LatentCache(folder).entry(2).mean.clone()
    write_clip(clips / "2.mp4", draw(scenes(20, 5)[-1], 9, 48, 64), fps=16)  # another clip under the same name
    assert not torch.equal(expect(1, []).entry(2).mean, old)

    write_metadata(clips, texts | {"3.mp4": "another caption"})
    assert expect(0, ["another caption"]).entry(3).text == "another caption"

    (clips / "4.mp4").rename(clips / "renamed.mp4")  # the same bytes under another name
    renamed = {("renamed.mp4" if name == "4.mp4" else name): text for name, text in read_texts(clips).items()}
    write_metadata(clips, renamed)
    assert expect(0, []).entry(4).name == "renamed.mp4"
    assert prints[-1] == prints[-2]

    distinct = list(dict.fromkeys(["", *renamed.values()]))
    vae_2, text_2, tokens_2 = (
        HASHES | {"vae": "vae-2"},
        HASHES | {"text_encoder": "text-2"},
        HASHES | {"tokenizer": "tokens-2"},
    )
    expect(COUNT, [], vae_2)
    expect(COUNT, distinct, text_2)  # and the first VAE again, whose latents are gone
    expect(0, distinct, tokens_2)
    expect(COUNT, [], tokens_2, height=48)
    expect(0, [], tokens_2, height=48, seed=5)  # nothing is random here
    expect(0, [], tokens_2, height=48, holdout=1)
    assert len(set(prints)) == len(prints) - 2  # all but the renaming and the seed


def test_unused_shards_are_removed(tmp_path: Path, clips: Path) -> None:
    folder = tmp_path / "cache"
    run(clips, folder, Work(), shard_clips=1)
    write_metadata(clips, dict(list(read_texts(clips).items())[:3]))
    run(clips, folder, Work(), shard_clips=1)
    assert len(list(folder.glob("clips-*"))) == 3 and len(list(folder.glob("texts-*"))) == 4
    LatentCache(folder).entry(2)


def test_equal_clips_are_encoded_once_and_not_split_by_the_holdout(tmp_path: Path, clips: Path) -> None:
    (clips / "copy.mp4").write_bytes((clips / "0.mp4").read_bytes())
    write_metadata(clips, read_texts(clips) | {"copy.mp4": "a copy"})
    work = Work()
    assert run(clips, tmp_path / "cache", work, holdout=3).clips == COUNT + 1 and work.clips == COUNT
    cache = LatentCache(tmp_path / "cache")
    assert torch.equal(cache.entry(0).mean, cache.entry(COUNT).mean)
    assert (0 in cache.holdout) == (COUNT in cache.holdout)


def test_an_interrupt_keeps_finished_clips(tmp_path: Path, clips: Path) -> None:
    folder, work = tmp_path / "cache", Work(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(clips, folder, work)
    with pytest.raises(DataError, match="no prepared clips"):
        LatentCache(folder)
    rest = Work()
    assert run(clips, folder, rest).clips == COUNT
    assert rest.clips == COUNT - 3 and not rest.captions


def start(clips: Path, folder: Path, shard: int, seconds: float) -> subprocess.Popen:
    source = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(clips), str(folder), str(shard), str(seconds)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_process_continues_where_it_stopped(tmp_path: Path, clips: Path) -> None:
    folder = tmp_path / "cache"
    process = start(clips, folder, shard=2, seconds=0.4)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("clips-*.safetensors"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "index.json").exists()
    (folder / ".clips-x.safetensors.partial-1").write_bytes(b"half")
    (folder / "clips-torn.safetensors").write_bytes(next(folder.glob("clips-*")).read_bytes()[:100])
    work = Work()
    assert run(clips, folder, work).clips == COUNT
    assert work.clips == COUNT - 4 and not work.captions
    assert not [path.name for path in folder.iterdir() if "partial" in path.name or "torn" in path.name]
    whole = tmp_path / "whole"
    run(clips, whole, Work())
    one, other = LatentCache(folder), LatentCache(whole)
    assert one.fingerprint == other.fingerprint and (one.train, one.holdout) == (other.train, other.holdout)
    assert all(torch.equal(one.entry(i).mean, other.entry(i).mean) for i in range(COUNT))


@pytest.mark.slow
def test_two_ranks_share_the_work(server: Server, tmp_path: Path, clips: Path) -> None:
    (clips / "bad.mp4").touch()
    write_metadata(clips, {"bad.mp4": "bad"} | read_texts(clips))
    done = server.run(str(clips), str(tmp_path / "cache"), "64", "0", ranks=2, program="tests.data.preparing")
    assert done.codes == [0, 0], done.text[-3000:]
    outputs = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert len(outputs) == 2
    assert sorted(output["clips"] for output in outputs) == [3, 4]
    captions = outputs[0]["captions"] + outputs[1]["captions"]
    assert len(captions) == len(set(captions)) == 8 and outputs[0]["captions"] and outputs[1]["captions"]
    for output in outputs:
        assert (output["result"]["clips"], output["result"]["encoded_clips"], output["result"]["unreadable"]) == (
            COUNT,
            COUNT,
            1,
        )
    alone = Work()
    assert run(clips, tmp_path / "alone", alone).fingerprint == outputs[0]["result"]["fingerprint"]
    assert [LatentCache(tmp_path / "cache").entry(i).name for i in range(COUNT)] == [f"{i}.mp4" for i in range(COUNT)]


def test_unreadable_clips_are_left_out_and_listed(tmp_path: Path, clips: Path) -> None:
    (clips / "1.mp4").write_bytes(b"")
    (clips / "3.mp4").write_text("text")
    (clips / "5.mp4").unlink()
    folder = tmp_path / "cache"
    result = run(clips, folder, Work())
    assert (result.clips, result.unreadable, result.encoded_clips) == (4, 3, 4)
    assert "3 clips are unreadable and left out: 1.mp4, 3.mp4, 5.mp4; the reasons are in" in result.warnings[0]
    rows = {
        row["name"]: row["reason"] for row in map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    }
    assert (
        rows["1.mp4"] == "0 bytes"
        and "not a readable video" in rows["3.mp4"]
        and rows["5.mp4"] == "the file is missing"
    )
    assert result.left_out == rows and list(read_quarantine(folder))[1].size == 4
    assert [LatentCache(folder).entry(i).name for i in range(4)] == ["0.mp4", "2.mp4", "4.mp4", "6.mp4"]
    again = Work()
    assert run(clips, folder, again).unreadable == 3 and again.vae_loads == 0
    (clips / "5.mp4").write_bytes((clips / "0.mp4").read_bytes() + b"\0" * 8)  # repaired
    assert run(clips, folder, Work()).unreadable == 2
    assert len((folder / "quarantine.jsonl").read_text().splitlines()) == 2


def test_too_many_unreadable_clips_stop_the_run(tmp_path: Path, clips: Path) -> None:
    for number in (2, 4):
        (clips / f"{number}.mp4").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"2 of 7 clips are unreadable so far; data.max_bad_share=0.2 allows 1(.|\n)*2.mp4: 0 bytes"
    ):
        run(clips, tmp_path / "cache", Work(), max_bad_share=0.2)
    assert not (tmp_path / "cache" / "index.json").exists()
    assert len((tmp_path / "cache" / "quarantine.jsonl").read_text().splitlines()) == 2
    assert run(clips, tmp_path / "cache", Work(), max_bad_share=0.3).clips == 5


@pytest.mark.parametrize("content", [b"", b"text, no video\n" * 90])
def test_an_unreadable_set_stops_before_a_model_is_loaded(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.mp4").write_bytes(content + bytes(number if content else 0))
    write_metadata(folder, {f"{number}.mp4": "x" for number in range(40)})
    work, started = Work(), time.monotonic()
    with pytest.raises(DataError, match="none of the first 4 clips can be read"):
        run(folder, tmp_path / "cache", work, max_bad_share=1.0)
    assert time.monotonic() - started < 5 and work.vae_loads == work.text_loads == 0


def test_upscaled_and_slow_clips_are_counted(tmp_path: Path, clips: Path, write_clip) -> None:
    write_clip(clips / "0.mp4", draw(scenes(1, 0)[0], 9, 16, 64), fps=16)
    write_clip(clips / "1.mp4", draw(scenes(2, 0)[1], 9, 48, 64), fps=4)
    for result in (run(clips, tmp_path / "cache", Work()), run(clips, tmp_path / "cache", Work())):
        assert (result.upscaled, result.slower) == (1, 1)
        assert "1 of 7 clips are smaller than 32x32 and were upscaled" in result.warnings[0]
        assert "1 of 7 clips have fewer than data.fps=8" in result.warnings[1]


def test_a_bad_index_changes_nothing(tmp_path: Path, clips: Path) -> None:
    folder = tmp_path / "cache"
    run(clips, folder, Work())
    before = sorted(path.name for path in folder.iterdir())
    write_metadata(clips, {"../x.mp4": "x"})
    with pytest.raises(DataError):
        run(clips, folder, Work())
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(DataError):
        run(tmp_path / "nowhere", tmp_path / "new", Work())
    assert not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_not_cached(tmp_path: Path, clips: Path) -> None:
    with pytest.raises(QualityGateError, match="the VAE gives values that are not finite for 0.mp4"):
        run(clips, tmp_path / "cache", Work(poison=True))
    work = Work()
    assert run(clips, tmp_path / "cache", work).clips == work.clips == COUNT


def test_a_clip_that_changes_while_it_is_encoded_stops_the_run(
    tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = prepare_module.encode_captions  # type: ignore[attr-defined]

    def meanwhile(*args, **kwargs):
        original(*args, **kwargs)
        (clips / "3.mp4").write_bytes((clips / "2.mp4").read_bytes())

    monkeypatch.setattr(prepare_module, "encode_captions", meanwhile)
    with pytest.raises(DataError, match="3.mp4 changed while it was prepared"):
        run(clips, tmp_path / "cache", Work())


def test_a_missing_or_damaged_shard_is_written_again(tmp_path: Path, clips: Path) -> None:
    folder = tmp_path / "cache"
    run(clips, folder, Work(), shard_clips=3)
    first, second = sorted(folder.glob("clips-*"))[:2]
    held = LatentCache(folder)
    expected = [held.entry(i).mean.clone() for i in range(COUNT)]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(DataError, match="1 files of .* are missing"):
        LatentCache(folder)
    work = Work()
    run(clips, folder, work, shard_clips=3)
    assert 4 <= work.clips <= 6 and not work.captions
    assert all(torch.equal(LatentCache(folder).entry(i).mean, expected[i]) for i in range(COUNT))


def test_a_full_disk_is_a_storage_error(tmp_path: Path, clips: Path) -> None:
    """A limit on file size stands for the full disk; the partial file is gone, and the run goes on afterwards."""
    import resource

    folder = tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(StorageError, match="cannot be written"):
            run(clips, folder, Work())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(folder.iterdir()) == []
    assert run(clips, folder, Work()).clips == COUNT


def test_an_index_from_another_version_is_refused(tmp_path: Path, clips: Path) -> None:
    folder = tmp_path / "cache"
    run(clips, folder, Work())
    index = json.loads((folder / "index.json").read_text())
    for broken in (json.dumps(index | {"version": 99}), "{", json.dumps([])):
        (folder / "index.json").write_text(broken)
        with pytest.raises(DataError, match="run stage=prepare again"):
            LatentCache(folder)
    work = Work()
    assert run(clips, folder, work).clips == COUNT and work.clips == 0
