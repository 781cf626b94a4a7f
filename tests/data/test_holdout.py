"""Test which clips are held out, and what is said about an unfit number."""

from __future__ import annotations

from pathlib import Path

import pytest
from preparing import Work, run

from cogflow.data.holdout import default_holdout, split_holdout
from cogflow.data.latent_cache import cache_fingerprint
from cogflow.errors import DataError
from tests.data.conftest import WriteClip, drawn_clips


@pytest.mark.parametrize(
    ("clips", "held"), [(1, 1), (4, 1), (10, 1), (19, 1), (20, 2), (79, 7), (80, 8), (96, 8), (10**6, 8)]
)
def test_a_tenth_is_held_out_by_default(clips: int, held: int) -> None:
    assert default_holdout(clips) == held


def test_ten_clips_keep_nine_for_training_by_default(tmp_path: Path, write_clip: WriteClip) -> None:
    clips = drawn_clips(tmp_path / "clips", 10, write_clip)
    result = run(clips, tmp_path / "cache", Work(), holdout=None)
    assert (result.train, result.holdout, result.warnings) == (9, 1, [])


def test_a_large_share_of_held_out_clips_is_a_warning_that_names_the_right_number(
    tmp_path: Path, write_clip: WriteClip
) -> None:
    clips = drawn_clips(tmp_path / "clips", 10, write_clip)
    result = run(clips, tmp_path / "cache", Work(), holdout=8)
    assert (result.train, result.holdout) == (5, 5)
    many, fewer = result.warnings
    assert many == (
        "5 of 10 clips are held out (data.holdout=8), and 5 are left to train on; data.holdout=1 holds out a tenth"
    )
    assert fewer.startswith("data.holdout=8, but 5 of 10 clips are held out: at least half")


@pytest.mark.parametrize("holdout", [10, 11])
def test_a_holdout_that_leaves_no_clip_is_refused_before_any_work(
    tmp_path: Path, write_clip: WriteClip, holdout: int
) -> None:
    clips, work = drawn_clips(tmp_path / "clips", 10, write_clip), Work()
    with pytest.raises(DataError) as caught:
        run(clips, tmp_path / "cache", work, holdout=holdout)
    assert f"data.holdout={holdout} leaves no clip to train on: 10 clips are listed in" in caught.value.message
    assert "set data.holdout=1" in caught.value.hint and work.text_loads == work.vae_loads == 0


def test_a_cache_of_the_former_default_is_kept(tmp_path: Path, write_clip: WriteClip) -> None:
    """The default was 8, whatever the number of clips; a run in progress must not lose its clips."""
    clips = drawn_clips(tmp_path / "clips", 10, write_clip)
    former = run(clips, tmp_path / "cache", Work(), holdout=8)
    work = Work()
    present = run(clips, tmp_path / "cache", work, holdout=None)
    assert present.fingerprint == former.fingerprint and present.holdout == 5 and not work.captions
    assert "data.holdout=1 holds out a tenth" in present.warnings[0]


def test_the_holdout_is_stable_and_limited() -> None:
    sources = [f"{(37 * i) % 101:03d}" for i in range(20)]
    train, held = split_holdout(sources, 4)
    assert sorted(train + held) == list(range(20)) and len(held) == 4
    assert {sources[i] for i in held} == set(sorted(sources)[:4])
    assert {sources[::-1][i] for i in split_holdout(sources[::-1], 4)[1]} == {sources[i] for i in held}
    assert split_holdout(sources, 0) == (list(range(20)), [])
    for count in range(1, 6):
        train, held = split_holdout(sources[:count], 8)
        assert len(train) >= len(held) == count // 2
    train, held = split_holdout(["a", "a", "a", "b", "c", "d"], 2)
    assert held == [3, 4]
    assert (
        cache_fingerprint(["a", "b"], ["a"])
        != cache_fingerprint(["a", "b"], ["b"])
        != cache_fingerprint(["b", "a"], ["b"])
    )
