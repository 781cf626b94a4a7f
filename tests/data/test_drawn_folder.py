"""Test the files of the drawn data set: real videos, matching captions, drawn only once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import pytest

from cogflow.config.data_section import DataConfig
from cogflow.data import shapes
from cogflow.data.clip_index import read_index
from cogflow.data.clips import read_clip
from cogflow.data.shapes import NEW_COLOURS, NEW_SHAPES, draw, draw_folder, scenes
from cogflow.errors import DataError

DATA = DataConfig(frames=5, height=32, width=48, clips=5)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_clips_are_real_videos_that_the_loader_resizes_and_resamples(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    draw_folder(folder, DATA)
    entries = read_index(folder)
    assert len(entries) == 5
    for entry, scene in zip(entries, scenes(5, DATA.seed, NEW_COLOURS, NEW_SHAPES), strict=True):
        assert (
            entry.text == scene.caption
            and scene.colour in entry.text
            and scene.shape in entry.text
            and scene.motion in entry.text
        )
        clip = read_clip(entry.path, DATA)
        assert (clip.source_size, clip.source_fps, clip.source_frames, clip.upscaled) == (  # type: ignore[comparison-overlap]
            (64, 96),
            pytest.approx(16),
            9,
            False,
        )
        drawn = draw(scene, 5, 32, 48).astype(float)
        assert abs(clip.frames.numpy() - drawn).mean() < 8  # the right scene at the right times
        with av.open(str(entry.path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"


def test_drawing_again_does_nothing_and_other_settings_draw_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    draw_folder(folder, DATA)
    before = content(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "write_video", lambda *a, **k: pytest.fail("drew again"))
        draw_folder(folder, replace(DATA, holdout=1, max_bad_share=0.5))
    draw_folder(tmp_path / "other", DATA)
    assert content(tmp_path / "other") == before  # seeded
    draw_folder(folder, replace(DATA, seed=1, clips=3))
    assert len(read_index(folder)) == 3 and content(folder)["metadata.jsonl"] != before["metadata.jsonl"]
    (folder / "videos" / "00001.mp4").unlink()
    draw_folder(folder, replace(DATA, seed=1, clips=3))
    assert (folder / "videos" / "00001.mp4").is_file()


def test_chosen_concepts_are_drawn(tmp_path: Path) -> None:
    draw_folder(tmp_path / "data", replace(DATA, colours=["cyan"], shapes=["hexagon"], motions=["up"]))
    assert all(entry.text.startswith("a cyan hexagon moves up over") for entry in read_index(tmp_path / "data"))
    with pytest.raises(DataError, match="data.shapes has names that cannot be drawn: blob"):
        draw_folder(tmp_path / "none", replace(DATA, shapes=["star", "blob"]))
    assert not (tmp_path / "none").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_bytes(b"precious")
    with pytest.raises(DataError, match="other files than drawn clips"):
        draw_folder(tmp_path, DATA)
    assert content(tmp_path) == {"mine.mp4": b"precious"}


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, drawn = shapes.write_video, []  # type: ignore[attr-defined]

    def stop_at_third(*args, **kwargs):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    monkeypatch.setattr(shapes, "write_video", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        draw_folder(tmp_path / "data", DATA)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shapes, "write_video", original)
    draw_folder(tmp_path / "data", DATA)
    rows = [json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 5
