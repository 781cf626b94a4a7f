"""Test that prepare names what of the data is not trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

from preparing import Work, run

from cogflow.config.compose import compose
from cogflow.data.shapes import draw, scenes
from cogflow.planning import run_size
from tests.data.conftest import WriteClip, drawn_clips


def test_parts_of_the_data_that_are_not_used_are_named_with_counts(tmp_path: Path, write_clip: WriteClip) -> None:
    clips = drawn_clips(tmp_path / "clips", 4, write_clip)
    scene = scenes(1, 5)[0]
    write_clip(clips / "0.mp4", draw(scene, 40, 48, 64), fps=16)  # 2.5 s, of which 0.625 s are taken
    write_clip(clips / "1.mp4", draw(scene, 9, 48, 160), fps=16)  # 32x32 keeps less than a third of it
    shutil.copy(clips / "2.mp4", clips / "3.mp4")
    shutil.copy(clips / "2.mp4", clips / "forgotten.mp4")
    (clips / ".hidden.mp4").write_bytes(b"x")
    (clips / "more").mkdir()
    (clips / "more" / "old.AVI").write_bytes(b"x")
    for _ in range(2):  # also when nothing is encoded again
        notes = run(clips, tmp_path / "cache", Work(), holdout=1).notes
        assert notes == [
            "1 of 4 clips are longer than the part that is taken of each (data.window=start): "
            "2.312 s of 4.188 s are trained on",
            "1 of 4 clips lose more than 25% of their picture to the crop (data.resize=cover)",
            "1 of 4 clips have the same content as another one; each is trained on as often as it is listed",
            f"1 video file is in {clips} but not in metadata.jsonl, and not used: forgotten.mp4",
            f"1 video file is in {clips} of a kind that is not read: more/old.AVI (read are .mp4 .mov .webm .mkv)",
        ]


def test_unreadable_clips_are_not_unlisted(tmp_path: Path, write_clip: WriteClip) -> None:
    clips = drawn_clips(tmp_path / "clips", 4, write_clip)
    (clips / "1.mp4").write_bytes(b"")
    result = run(clips, tmp_path / "cache", Work(), holdout=1)
    assert result.notes == [] and result.left_out == {"1.mp4": "0 bytes"}
    plan = compose(["stage=train", "stage.plan=true", "data=folder", f"data.path={clips}", f"run.root={tmp_path}"])
    planned = run_size.clips(plan, tmp_path)
    assert (planned.training, planned.holdout) == (2, 1)
    assert planned.left_out.startswith("1 clip is unreadable and left out: 1.mp4; the reasons are in")
