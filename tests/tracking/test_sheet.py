"""Test that contact sheets show the right frames without blur."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cogflow.tracking.contact_sheet import GAP, LABEL, contact_sheet, pick


def numbered(frames: int, height: int, width: int) -> np.ndarray:
    """Return a clip in which the red level of each frame is its number; the first pixel is white."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[..., 0] = 10 * np.arange(frames)[:, None, None]
    clip[:, 0, 0] = 255
    return clip


def test_frames_run_from_the_first_to_the_last() -> None:
    assert pick(9, 3) == [0, 4, 8] and pick(2, 5) == [0, 1] and pick(9, 1) == [4]


def test_small_frames_are_enlarged_to_sharp_squares() -> None:
    sheet = np.asarray(
        contact_sheet({"one": numbered(9, 32, 48), "two": torch.from_numpy(numbered(9, 32, 48))}, columns=3)
    )
    width, height = 144, 96
    assert sheet.shape == (GAP + 2 * (LABEL + height + GAP), GAP + 3 * (width + GAP), 3)
    for row in range(2):
        top = GAP + row * (LABEL + height + GAP) + LABEL
        for column, frame in enumerate((0, 4, 8)):
            cell = sheet[top : top + height, GAP + column * (width + GAP) :][:, :width]
            assert (cell[:3, :3] == 255).all() and (cell[3:, 3:] == (10 * frame, 0, 0)).all()


def test_the_label_is_written_and_fits() -> None:
    long = np.asarray(contact_sheet({"word " * 100: numbered(3, 32, 48)}, columns=1))
    label = long[: GAP + LABEL]
    assert label.max() > 200 and label[:, -GAP:].max() < 60


def test_wide_frames_are_reduced() -> None:
    assert contact_sheet({"a": numbered(2, 480, 720)}, columns=2).width == GAP + 2 * (384 + GAP)


@pytest.mark.parametrize(
    "clips",
    [
        {},
        {"a": np.zeros((2, 4, 4, 3), np.float32)},
        {"a": np.zeros((2, 4, 4, 3), np.uint8), "b": np.zeros((2, 4, 6, 3), np.uint8)},
    ],
)
def test_other_shapes_and_types_are_refused(clips: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="contact sheet|a clip must be uint8"):
        contact_sheet(clips, columns=2)
