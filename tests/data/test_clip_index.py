"""Test the four layouts of a folder of clips, and the refusal of bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogflow.data.clip_index import read_index
from cogflow.errors import DataError


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return folder


def pairs(folder: Path) -> list[tuple[str, str]]:
    entries = read_index(folder)
    assert all(entry.path == folder / entry.name for entry in entries)
    return [(entry.name, entry.text) for entry in entries]


def test_metadata_jsonl_is_read(tmp_path: Path) -> None:
    rows = [
        {"file_name": "b.mp4", "text": "two\u2028 lines, é"},
        {"file_name": "deep/a.MOV", "text": " one ", "extra": 3},
    ]
    fill(
        tmp_path,
        {"metadata.jsonl": "\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\r\n\n" + json.dumps(rows[1]) + "\n"},
    )
    assert pairs(tmp_path) == [("b.mp4", "two\u2028 lines, é"), ("deep/a.MOV", "one")]


def test_metadata_csv_is_read(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "metadata.csv": '\ufefffile_name,text,more\r\na.webm,"red, then ""blue""",1\r\n'
            'videos/b.mkv,"over\ntwo lines",2\r\n'
        },
    )
    assert pairs(tmp_path) == [("a.webm", 'red, then "blue"'), ("videos/b.mkv", "over\ntwo lines")]


def test_prompts_and_videos_are_read(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {"prompts.txt": "first caption\r\nsecond caption\r\n", "videos.txt": "videos/00000.mp4\nvideos/00001.mp4\n\n"},
    )
    (tmp_path / "videos").mkdir()
    assert pairs(tmp_path) == [("videos/00000.mp4", "first caption"), ("videos/00001.mp4", "second caption")]


def test_the_layout_of_sat_is_read(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "videos/b.mp4": "",
            "videos/a.mp4": "",
            "videos/sub/c.d.webm": "",
            "videos/notes.txt": "",
            "videos/.hidden.mp4": "",
            "labels/a.txt": "a caption\n",
            "labels/b.txt": "over two\nlines\n",
            "labels/sub/c.d.txt": "third",
        },
    )
    assert pairs(tmp_path) == [
        ("videos/a.mp4", "a caption"),
        ("videos/b.mp4", "over two lines"),
        ("videos/sub/c.d.webm", "third"),
    ]


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ({}, "no list of clips", "metadata.jsonl"),
        ({"sub/metadata.csv": ""}, "no list of clips", "did you mean"),
        ({"prompts.txt": "a"}, "no list of clips", "here is only prompts.txt"),
        ({"videos/a.mp4": ""}, "no list of clips", "here is only videos"),
        ({"metadata.jsonl": ""}, "names no clip", "metadata.jsonl"),
        (
            {"metadata.jsonl": "", "metadata.csv": ""},
            "more than one list of clips: metadata.jsonl; metadata.csv",
            "keep the one",
        ),
        ({"metadata.jsonl": "{nope"}, "line 1 is not JSON", "file_name"),
        ({"metadata.jsonl": "[1]"}, "line 1 is not an object", "file_name"),
        (
            {"metadata.jsonl": '{"file_name": "a.mp4", "caption": "x"}'},
            "has no text; it has: file_name, caption",
            "text (its caption)",
        ),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "text": null}'}, "text is no text: None", "strings"),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "text": "  "}'}, "line 1: no caption for a.mp4", "caption"),
        (
            {"metadata.jsonl": '{"file_name": "a.gif", "text": "x"}'},
            "a.gif is none of .mp4 .mov .webm .mkv",
            ".mkv are read",
        ),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "text": "x"}\n' * 2}, "line 2: a.mp4 is named twice", "caption"),
        ({"metadata.csv": "name,text\na.mp4,x\n"}, "has no file_name; it has: name, text", "file_name"),
        ({"metadata.csv": "file_name,text\na.mp4\n"}, "no caption for a.mp4", "caption"),
        ({"metadata.csv": "file_name,text\na.mp4,red, blue\n"}, "row 1 has more columns", "quotes"),
        ({"metadata.csv": ""}, "names no clip", "metadata.csv"),
        ({"prompts.txt": "a\nb", "videos.txt": "a.mp4"}, "prompts.txt has 2 lines and videos.txt 1", "line n"),
        ({"prompts.txt": "a\n\nb", "videos.txt": "a.mp4\nb.mp4\nc.mp4"}, "line 2: no caption for b.mp4", "caption"),
        ({"videos/a.mp4": "", "labels/b.txt": "x"}, "labels/a.txt: no caption for videos/a.mp4", "caption"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path: Path, files: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        read_index(fill(tmp_path, files))
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file"):
        read_index(fill(tmp_path, {"a.jsonl": ""}) / "a.jsonl")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.mp4,café\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../secret.mp4", "/etc/secret.mp4", "videos/../../secret.mp4", "link/secret.mp4", "C:\\secret.mp4", "linked.mp4"],
)
@pytest.mark.parametrize("layout", ["jsonl", "csv", "lines"])
def test_no_path_leaves_the_folder(tmp_path: Path, name: str, layout: str) -> None:
    outside = fill(tmp_path / "outside", {"secret.mp4": "x"})
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "linked.mp4").symlink_to(outside / "secret.mp4")
    files = {
        "jsonl": {"metadata.jsonl": json.dumps({"file_name": name, "text": "x"})},
        "csv": {"metadata.csv": f"file_name,text\n{name},x\n"},
        "lines": {"prompts.txt": "x", "videos.txt": name},
    }
    with pytest.raises(DataError, match="1 problem in"):
        read_index(fill(folder, files[layout]))


@pytest.mark.parametrize("side", ["videos", "labels"])
def test_no_link_of_the_sat_layout_leaves_the_folder(tmp_path: Path, side: str) -> None:
    outside = fill(tmp_path / "outside", {"a.mp4": "x", "a.txt": "private"})
    folder = fill(tmp_path / "clips", {"videos/b.mp4": "", "labels/b.txt": "x"})
    inside = {"videos": "videos/a.mp4", "labels": "labels/b.txt"}[side]
    (folder / inside).unlink(missing_ok=True)
    (folder / inside).symlink_to(outside / ("a.mp4" if side == "videos" else "a.txt"))
    fill(folder, {"labels/a.txt": "x"} if side == "videos" else {})
    with pytest.raises(DataError, match="outside"):
        read_index(folder)


def test_all_problems_are_reported_at_once_and_limited(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {"metadata.csv": "file_name,text\n" + "".join(f"{i}.avi,x\n" for i in range(30)) + "../b.mp4,x\nc.mp4,\n"},
    )
    with pytest.raises(DataError) as caught:
        read_index(tmp_path)
    assert caught.value.message.startswith("32 problems") and "and 22 more" in caught.value.message
