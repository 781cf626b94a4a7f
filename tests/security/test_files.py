"""Attack the places that open or write a file by a name from a record, and check that nothing outside is touched."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cogflow.assemble.model_card import CardContext, collect_sections
from cogflow.errors import CogflowError, DataError, StorageError
from cogflow.files.atomic_write import append_text, write_text
from cogflow.files.contained_files import (
    copy_below,
    create_below,
    is_file_below,
    open_below,
    open_regular,
    plain_name,
    read_below,
    read_regular,
    refuse_links_out,
)
from cogflow.files.publish import publish_folder
from cogflow.files.record_io import read_record
from cogflow.records.sample_records import SamplesRecord

PRIVATE = b"the private key of the user"

LEADING_OUT = [
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "..\\secret",
    "",
    " ",
    "\0",
    "a\nb",
    "\x1b[2J",
    ".",
    "x/" * 40 + "y",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of a stranger, with the user's private file outside of it."""
    (tmp_path / "secret").write_bytes(PRIVATE)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_bytes(PRIVATE)
    folder = tmp_path / "stranger"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "clip.mp4").write_bytes(b"clip")
    return folder


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_name_that_leads_out_is_neither_read_nor_written(root: Path, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    for act in (lambda: open_below(root, name), lambda: create_below(root, name), lambda: plain_name(root, name)):
        with pytest.raises(DataError):
            act()
    assert not is_file_below(root, name)
    assert sorted(tmp_path.rglob("*")) == before


def plant_links(root: Path) -> dict[str, Path]:
    """Return links in ``root`` by the name that an attacker would write into a record, and their targets."""
    outside = root.parent
    (root / "file.mp4").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside / "private")
    (root / "inner" / "up").symlink_to("../..")
    (root / "chain").symlink_to("inner/up/private")
    (root / "loop").symlink_to("loop")
    (root / "hanging").symlink_to(outside / "new")
    return {
        "file.mp4": outside / "secret",
        "folder/key": outside / "private" / "key",
        "inner/up/secret": outside / "secret",
        "chain/key": outside / "private" / "key",
        "loop": root / "loop",
        "hanging": outside / "new",
    }


def test_links_are_followed_at_no_depth(root: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    for name in plant_links(root):
        with pytest.raises(DataError, match=r"symbolic link"):
            open_below(root, name)
        with pytest.raises(DataError):
            create_below(root, name)
        with pytest.raises(DataError):
            copy_below(root, name, tmp_path / "target", "copy")
    assert not (tmp_path / "new").exists() and not list((tmp_path / "target").iterdir())
    assert (tmp_path / "secret").read_bytes() == PRIVATE


@pytest.fixture(params=["fifo", "socket", "device"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file whose opening or reading would wait or never end."""
    path = tmp_path / "special"
    if request.param == "device":
        yield Path("/dev/zero")
        return
    if request.param == "fifo":
        os.mkfifo(path)
        yield path
        return
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        yield path


def test_special_files_are_refused_at_once(special: Path) -> None:
    with pytest.raises((DataError, OSError)):
        open_below(special.parent, special.name)
    with pytest.raises((DataError, OSError)):
        read_regular(special)
    with pytest.raises(CogflowError):
        read_record(special, SamplesRecord)


def test_contained_files_are_read_and_copied(root: Path, tmp_path: Path) -> None:
    assert read_below(root, "inner/clip.mp4") == b"clip" and is_file_below(root, "inner/clip.mp4")
    assert copy_below(root, "inner/clip.mp4", tmp_path, "made/copy.mp4") == 4
    assert (tmp_path / "made" / "copy.mp4").read_bytes() == b"clip"
    with pytest.raises(DataError, match="at most 3 are read"):
        read_below(root, "inner/clip.mp4", max_bytes=3)
    with open_regular(root / "inner" / "clip.mp4") as file:
        assert file.read() == b"clip"
    with pytest.raises(DataError, match="exists already"):
        create_below(root, "inner/clip.mp4")


def test_a_folder_exchanged_for_a_link_is_not_followed(root: Path) -> None:
    """Exchange ``inner`` for a link to the private folder and back, while another thread opens files below it."""
    (root / "inner" / "key").write_bytes(b"harmless")
    (root / "link").symlink_to(root.parent / "private")
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            (root / "inner").rename(root / "aside")
            (root / "link").rename(root / "inner")
            (root / "inner").rename(root / "link")
            (root / "aside").rename(root / "inner")

    thread = threading.Thread(target=exchange)
    thread.start()
    seen: set[bytes] = set()
    refused = 0
    try:
        for _ in range(2000):
            try:
                seen.add(read_below(root, "inner/key"))
            except DataError:
                refused += 1
    finally:
        stop.set()
        thread.join()
    assert PRIVATE not in seen and seen <= {b"harmless"} and refused < 2000


def samples_record(video: str) -> dict[str, Any]:
    return {
        "version": 1,
        "step": 4,
        "weights_sha256": "0" * 64,
        "sampling": {
            "sampler": "ddim",
            "scheduler": "CogVideoXDDIMScheduler",
            "unconditional": "",
            "steps": 2,
            "guidance_scale": 1.0,
            "use_dynamic_cfg": False,
            "vae_dtype": "fp32",
            "vae_tiling": False,
        },
        "height": 32,
        "width": 32,
        "frames": 5,
        "fps": 8.0,
        "max_sequence_length": 16,
        "dtype": "fp32",
        "device": "cpu",
        "samples": [{"name": "a", "id": "0", "text": "a", "seed": 0, "video": video, "sharpness": {}}],
    }


def run_of_a_stranger(folder: Path, video: str) -> CardContext:
    """Return a run whose ``samples.json`` names ``video``, as assembly reads it."""
    samples = folder / "run" / "samples" / "step-000004"
    samples.mkdir(parents=True)
    (samples / "samples.json").write_text(json.dumps(samples_record(video)))
    return CardContext(folder / "run", samples)


@pytest.mark.parametrize("video", ["../../../../package/module.py", "../x.mp4", "/tmp/x.mp4", "a/b.mp4", ".."])
def test_assembly_writes_no_file_outside_of_the_pipeline(tmp_path: Path, video: str) -> None:
    context = run_of_a_stranger(tmp_path, video)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("original")
    (tmp_path / "pipeline" / "deep").mkdir(parents=True)
    with pytest.raises(CogflowError) as caught:
        collect_sections(context, tmp_path / "pipeline" / "deep")
    assert caught.value.exit_code == 2
    assert (tmp_path / "package" / "module.py").read_text() == "original"


@pytest.mark.parametrize("attack", ["sample", "sheet", "step", "samples"])
def test_assembly_copies_no_private_file_through_a_link(tmp_path: Path, attack: str) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.mp4").write_bytes(PRIVATE)
    context = run_of_a_stranger(tmp_path, "a.mp4")
    assert context.samples is not None
    if attack == "sample":
        (context.samples / "a.mp4").symlink_to(tmp_path / "private" / "a.mp4")
    elif attack == "sheet":
        (context.samples / "a.mp4").write_bytes(b"clip")
        (context.samples / "contact.png").symlink_to(tmp_path / "private" / "a.mp4")
    else:
        (context.samples / "samples.json").rename(tmp_path / "private" / "samples.json")
        moved = tmp_path / "private"
        if attack == "samples":
            moved = tmp_path / "outside"
            moved.mkdir()
            (tmp_path / "private").rename(moved / "step-000004")
        linked = context.samples if attack == "step" else context.samples.parent
        context.samples.rmdir()
        if attack == "samples":
            linked.rmdir()
        linked.symlink_to(moved)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    if attack == "sheet":
        collect_sections(context, pipeline)
    else:
        with pytest.raises(DataError, match="symbolic link"):
            collect_sections(context, pipeline)
    assert PRIVATE not in [path.read_bytes() for path in pipeline.rglob("*") if path.is_file()]


def test_a_temporary_name_with_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(PRIVATE)
    planted = tmp_path / f".report.json.partial-{os.getpid()}"
    monkeypatch.setattr("cogflow.files.atomic_write.remove_leftovers", lambda target: planted.symlink_to(victim))
    with pytest.raises((StorageError, FileExistsError)):
        write_text(tmp_path / "report.json", "text")
    assert victim.read_bytes() == PRIVATE


def test_logs_are_not_appended_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "victim").write_bytes(PRIVATE)
    (tmp_path / "cogflow.log").symlink_to(tmp_path / "victim")
    append_text(tmp_path / "cogflow.log", "text")
    os.mkfifo(tmp_path / "fifo.log")
    append_text(tmp_path / "fifo.log", "text")
    assert (tmp_path / "victim").read_bytes() == PRIVATE and "cannot be written" in capsys.readouterr().err


def test_nothing_is_published_when_the_hidden_folder_is_exchanged(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()

    def publish() -> None:
        with publish_folder(tmp_path / "out") as partial:
            (partial / "a.json").write_text("{}")
            partial.rename(tmp_path / "aside")
            partial.symlink_to(tmp_path / "victim")

    with pytest.raises(StorageError, match="exchanged"):
        publish()
    assert not (tmp_path / "out").exists() and not list((tmp_path / "victim").iterdir())


def test_a_run_with_links_that_lead_out_or_special_files_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "wandb" / "run-1" / "debug-core.log").symlink_to(tmp_path / "wandb.log")
    (run / "wandb" / "run-1" / "data.wandb").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="data.wandb is a link"):
        refuse_links_out(run, logs=("wandb",))
    (run / "wandb" / "run-1" / "data.wandb").unlink()
    refuse_links_out(run, logs=("wandb",))
    with pytest.raises(DataError, match="debug-core.log is a link"):
        refuse_links_out(run)
    (run / "wandb" / "run-1" / "debug-core.log").unlink()
    refuse_links_out(run)
    refuse_links_out(tmp_path / "missing")
    (tmp_path / "other" / "cache").mkdir(parents=True)
    (run / "cache").symlink_to("../other/cache")
    refuse_links_out(run, shared=("cache",))
    with pytest.raises(DataError, match="cache is a link"):
        refuse_links_out(run)
    (run / "wandb" / "cache").symlink_to("../../other/cache")
    with pytest.raises(DataError, match="wandb/cache is a link"):
        refuse_links_out(run, shared=("cache",))
    (run / "wandb" / "cache").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "secret")
    (run / "checkpoints").symlink_to("..")
    os.mkfifo(run / "wandb" / "run-1" / "events.jsonl")
    with pytest.raises(DataError, match=r"(?s)checkpoints is a link to .*metrics.jsonl is a link.*no regular file"):
        refuse_links_out(run)
