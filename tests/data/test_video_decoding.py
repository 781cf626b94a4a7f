"""Test that skipping unneeded frames and converting plane by plane change no byte of a clip."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cogflow.config.data_section import DataConfig
from cogflow.data import video_decoding
from cogflow.data.clips import crop_corner, fit_frame, read_clip, scaled_size
from cogflow.data.encode import clip_threads
from cogflow.data.shapes import Scene, draw
from cogflow.data.video import PlaneConverter, to_rgb

SIZES = [(180, 320), (270, 480), (540, 960), (48, 96), (131, 97), (120, 180)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop", ["center", "random"])
def test_frames_are_resized_as_pillow_resizes_them_and_cropped(size: tuple[int, int], crop: str) -> None:
    data = DataConfig(height=64, width=96, crop=crop)
    planes = list(np.random.default_rng(1).integers(100, 157, (3, *size), dtype=np.uint8))  # nothing is clipped
    out = torch.empty(3, 64, 96, dtype=torch.uint8)
    fit_frame(planes, data, "content", out)
    height, width = scaled_size(size, data)
    down, right = crop_corner((height, width), data, "content")
    image = Image.fromarray(np.stack(planes, axis=-1)).resize((width, height), Image.Resampling.BICUBIC)
    wanted = np.asarray(image)[down : down + 64, right : right + 96]
    # Pillow rounds after each axis, so values may differ by a level.
    assert np.abs(out.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("turn", [0, 90, 180])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p"])
def test_planes_equal_those_of_the_packed_frame(tmp_path: Path, write_clip, turn: int, pixels: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 70, 94, 3)).astype(np.uint8)
    path = write_clip(tmp_path / "a.mp4", frames, rotation=turn)
    to_planes = PlaneConverter()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            one = frame if pixels == "yuv420p" else frame.reformat(format=pixels)
            assert np.array_equal(np.stack(to_planes(one), axis=-1), to_rgb(one))


@pytest.mark.parametrize(
    ("first", "times"), [(0.0, None), (5.2, None), (0.0, np.cumsum([0.02, 0.03, 0.05] * 40).tolist())]
)
@pytest.mark.parametrize("held", [True, False])
def test_needed_frames_are_those_of_a_full_decoding(
    tmp_path: Path, write_clip, monkeypatch: pytest.MonkeyPatch, first: float, times: list[float] | None, held: bool
) -> None:
    frames = draw(Scene("red", "cross", "up", "light", 1), 160, 64, 96)[: len(times) if times else 160]
    options = {"crf": "20", "bf": "3", "g": "50", "threads": "1"}
    path = write_clip(tmp_path / ("a.mkv" if times else "a.mp4"), frames, fps=24, times=times, options=options)
    monkeypatch.setattr(video_decoding, "_HELD_BYTES", 2**20 if held else 0)
    with ExitStack() as stack:
        file = video_decoding.open_video(path, path.stat().st_size, stack)
        wanted = float(file.scan.times[np.searchsorted(file.scan.times, first)]) + np.arange(9) / 7
        few = [(frame.pts, count, to_rgb(frame)) for frame, count in video_decoding.decode_needed(file, wanted)]
    every = [(frame.pts, count, to_rgb(frame)) for frame, count in video_decoding.decode_all(file, wanted)]
    assert [(pts, count) for pts, count, _ in few] == [(pts, count) for pts, count, _ in every]
    assert all(np.array_equal(one, other) for (_, _, one), (_, _, other) in zip(few, every, strict=True))


def test_damage_outside_of_the_wanted_frames_changes_nothing(tmp_path: Path, write_clip) -> None:
    """The clip equals that of the sound file. Damage of wanted frames is found (test_clips.py)."""
    frames = draw(Scene("red", "cross", "up", "light", 1), 40, 64, 96)
    options = {"bf": "3", "b-adapt": "0", "crf": "20", "threads": "1", "x264-params": "b-pyramid=none"}
    path = write_clip(tmp_path / "a.mp4", frames, fps=24, options=options)
    data = DataConfig(frames=9, height=48, width=64, fps=6)
    whole = read_clip(path, data).frames
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
        base = float(packets[0].time_base)
        hurt = next(packet for packet in packets if not (bytes(packet)[4] & 0x60) and round(packet.pts * base * 24) % 4)
        content = bytearray(path.read_bytes())
        content[hurt.pos + 12 : hurt.pos + hurt.size] = bytes(hurt.size - 12)
    (tmp_path / "b.mp4").write_bytes(content)
    assert torch.equal(read_clip(tmp_path / "b.mp4", data).frames, whole)


def test_clip_threads_restore_torchs_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with clip_threads(2) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == before
        torch.ones(10_000).sum()
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
