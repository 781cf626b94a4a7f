"""The measured check of what a clip shows, on clips of which we know."""

from __future__ import annotations

import numpy as np

from cogflow.data.recognise import recognise
from cogflow.data.shapes import COLOURS, SHAPES, draw, scenes


def test_drawn_clips_are_read_back() -> None:
    for scene in scenes(24, 11, tuple(COLOURS), tuple(SHAPES)):
        seen = recognise(draw(scene, 9, 64, 96))
        assert (seen.colour, seen.shape, seen.motion) == (scene.colour, scene.shape, scene.motion), scene.caption


def test_reversed_time_is_the_opposite_direction() -> None:
    scene = scenes(1, 3, motions=("left",))[0]
    assert recognise(draw(scene, 9, 64, 96)[::-1]).motion == "right"


def test_a_grey_clip_shows_nothing_and_a_still_one_no_direction() -> None:
    scene = scenes(1, 3)[0]
    clip = draw(scene, 9, 64, 96)
    grey = recognise(np.repeat(clip.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8))
    assert (grey.colour, grey.shape, grey.motion) == (None, None, None)
    assert recognise(np.repeat(clip[:1], 9, axis=0)).motion is None
