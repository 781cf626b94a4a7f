"""Test the recognition of colour, shape and direction on drawn clips."""

from __future__ import annotations

import numpy as np

from cogflow.data.shapes import COLOURS, SHAPES, draw, scenes
from tools.recognise_shapes import recognise


def test_drawn_clips_are_recognised() -> None:
    for scene in scenes(24, 11, tuple(COLOURS), tuple(SHAPES)):
        seen = recognise(draw(scene, 9, 64, 96))
        assert (seen.colour, seen.shape, seen.motion) == (scene.colour, scene.shape, scene.motion), scene.caption


def test_a_reversed_clip_has_the_opposite_direction() -> None:
    scene = scenes(1, 3, motions=("left",))[0]
    assert recognise(draw(scene, 9, 64, 96)[::-1]).motion == "right"


def test_a_grey_clip_has_no_content_and_a_still_clip_no_direction() -> None:
    scene = scenes(1, 3)[0]
    clip = draw(scene, 9, 64, 96)
    grey = recognise(np.repeat(clip.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8))
    assert (grey.colour, grey.shape, grey.motion) == (None, None, None)
    assert recognise(np.repeat(clip[:1], 9, axis=0)).motion is None
