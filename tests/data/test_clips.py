"""Test the reading of clips: times, sizes, and every kind of unreadable file."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cogflow.config.data_section import DataConfig
from cogflow.data.clips import read_clip
from cogflow.data.media_bytes import ClipError
from cogflow.data.shapes import Scene, draw
from cogflow.data.video import read_video, write_video

DATA = DataConfig(frames=9, height=64, width=96, fps=8)


def numbered(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Return frames whose grey level ``10 + 8 i`` gives the number ``i`` of each frame."""
    levels = 10 + 8 * np.arange(frames)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def numbers(frames: torch.Tensor) -> list[int]:
    """Return the numbers of these frames in ``numbered``."""
    return [round((float(f.float().mean()) - 10) / 8) for f in frames]


def test_a_written_clip_is_read_with_unbiased_colours(tmp_path: Path) -> None:
    frames = draw(Scene("purple", "star", "left", "dark", 3), 5, 64, 96)
    path = tmp_path / "clip.mp4"
    write_video(path, frames, 8, crf=4)
    back, fps = read_video(path)
    difference = back.float() - torch.from_numpy(frames).float()
    assert fps == 8 and back.shape == (5, 64, 96, 3) and back.dtype == torch.uint8
    assert abs(float(difference.mean())) < 0.35  # swscale's default rounds down by 1 to 2
    assert float(difference.abs().median()) <= 1  # edges differ more: colour is stored at half size
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert list(tmp_path.iterdir()) == [path]


def test_odd_sizes_and_wrong_kinds_of_frames_are_refused(tmp_path: Path) -> None:
    for frames in (
        np.zeros((2, 63, 96, 3), np.uint8),
        np.zeros((2, 64, 96, 3), np.float32),
        np.zeros((0, 64, 96, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="even height and width|must be uint8"):
            write_video(tmp_path / "x.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_frames_of_the_wanted_rate_are_read_one_to_one(tmp_path, write_clip) -> None:
    clip = read_clip(write_clip(tmp_path / "a.mp4", numbered(12)), DATA)
    assert numbers(clip.frames) == list(range(9))
    assert (
        clip.source_size == (64, 96)
        and clip.source_fps == pytest.approx(8)
        and clip.source_frames == 12
        and not clip.upscaled
    )


@pytest.mark.parametrize("fps", [16, 24, 12, 29.97])
def test_a_faster_clip_gives_the_newest_frame_at_each_time(tmp_path, write_clip, fps) -> None:
    clip = read_clip(write_clip(tmp_path / "a.mp4", numbered(30), fps=fps), replace(DATA, frames=5))
    assert numbers(clip.frames) == [int((k / 8 + 1e-3) * fps) for k in range(5)]


def test_a_slower_clip_repeats_frames(tmp_path, write_clip) -> None:
    clip = read_clip(write_clip(tmp_path / "a.mp4", numbered(6), fps=4), DATA)
    assert numbers(clip.frames) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.mov"])
def test_frames_of_a_variable_rate_are_chosen_by_time_stamps(tmp_path, write_clip, name) -> None:
    times = [0, 0.05, 0.1, 0.5, 0.55, 0.6, 0.65, 0.7, 1.2]
    clip = read_clip(write_clip(tmp_path / name, numbered(9), times=times), DATA)
    wanted = [k / 8 for k in range(9)]
    assert numbers(clip.frames) == [max(i for i, t in enumerate(times) if t <= w + 1e-3) for w in wanted]


@pytest.mark.parametrize(
    ("name", "codec"), [("v.webm", "libvpx-vp9"), ("v.webm", "libvpx"), ("v.mkv", "libx264"), ("v.mov", "libx264")]
)
def test_other_containers_and_codecs_are_read(tmp_path, write_clip, name, codec) -> None:
    clip = read_clip(write_clip(tmp_path / name, numbered(20), fps=16, codec=codec), DATA)
    assert numbers(clip.frames) == list(range(0, 18, 2))


def test_the_window_starts_where_data_window_says(tmp_path, write_clip) -> None:
    path = write_clip(tmp_path / "a.mp4", numbered(29))
    first = {w: numbers(read_clip(path, replace(DATA, window=w)).frames) for w in ("start", "center", "random")}
    assert first["start"] == list(range(9))
    assert first["center"] == list(range(10, 19))
    start = first["random"][0]
    assert first["random"] == list(range(start, start + 9))
    assert numbers(read_clip(path, replace(DATA, window="random")).frames) == first["random"]
    starts = {numbers(read_clip(path, replace(DATA, window="random", seed=s)).frames)[0] for s in range(12)}
    assert len(starts) > 4 and starts <= set(range(21))


def test_a_far_window_is_reached_by_seeking_and_is_exact(tmp_path, write_clip) -> None:
    frames = np.zeros((200, 32, 32, 3), np.uint8)
    for index in range(200):  # the number in eight black and white columns
        for bit in range(8):
            frames[index, :, bit * 4 : bit * 4 + 4] = 255 * (index >> bit & 1)
    path = write_clip(tmp_path / "long.mp4", frames, options={"crf": "4", "g": "12", "bf": "3", "threads": "1"})
    clip = read_clip(path, DataConfig(frames=9, height=32, width=32, fps=8, window="center"))
    found = [sum(int(f[16, bit * 4 + 1, 0] > 127) << bit for bit in range(8)) for f in clip.frames]
    assert found == list(range(95, 104))


def test_cover_keeps_proportions_and_crops_the_middle(tmp_path, write_clip) -> None:
    frames = np.zeros((9, 128, 256, 3), np.uint8)
    frames[:, :, 128:] = 200  # the edge in the middle stays in the middle
    clip = read_clip(write_clip(tmp_path / "a.mp4", frames), DATA)
    row = clip.frames[4, 32, :, 0].int()
    assert clip.frames.shape == (9, 64, 96, 3) and not clip.upscaled
    assert row[:44].max() < 20 and row[52:].min() > 180


def test_each_resize_and_crop_mode_reads_the_right_pixels(tmp_path, write_clip) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 192)[None, None, :, None], (9, 128, 192, 3)).astype(np.uint8)
    path = write_clip(tmp_path / "a.mp4", ramp)
    stretched = read_clip(path, replace(DATA, resize="stretch", width=64)).frames
    assert stretched.shape == (9, 64, 64, 3) and int(stretched[0, 32, 0, 0]) < 8 and int(stretched[0, 32, -1, 0]) > 247
    middle = read_clip(path, replace(DATA, resize="none")).frames
    assert abs(int(middle[0, 32, 0, 0]) - int(ramp[0, 0, 48, 0])) <= 3
    crops = {
        int(read_clip(path, replace(DATA, resize="none", crop="random", seed=s)).frames[0, 0, 0, 0]) for s in range(6)
    }
    assert len(crops) > 2
    with pytest.raises(ClipError, match="too small: 192x128"):
        read_clip(path, replace(DATA, resize="none", height=256))


def test_resizing_down_is_antialiased(tmp_path, write_clip) -> None:
    rng = np.random.default_rng(0)
    noise = np.broadcast_to(rng.integers(0, 2, (1, 256, 384, 1)) * 255, (9, 256, 384, 3)).astype(np.uint8)
    clip = read_clip(write_clip(tmp_path / "a.mp4", noise), DATA)
    assert float(clip.frames.float().std()) < 45  # nearest neighbour would keep 127


def test_upscaling_is_reported(tmp_path, write_clip) -> None:
    path = write_clip(tmp_path / "a.mp4", numbered(9, 48, 96))
    assert read_clip(path, DATA).upscaled
    assert read_clip(path, replace(DATA, resize="stretch")).upscaled
    assert not read_clip(path, replace(DATA, height=48)).upscaled


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_clip_is_shown_upright(tmp_path, write_clip, turn) -> None:
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a turned clip")
    upright = np.full((9, 96, 64, 3), 30, np.uint8)
    upright[:, :48, :32] = 220  # bright top left
    stored = np.rot90(upright, -turn // 90, axes=(1, 2))  # so that a turn by `turn`, anticlockwise, makes it upright
    clip = read_clip(write_clip(tmp_path / "a.mp4", stored, rotation=turn), DataConfig(frames=9, height=96, width=64))
    assert clip.source_size == (96, 64)
    assert clip.frames[0, 10, 10, 0] > 200 and clip.frames[0, 80, 50, 0] < 50 and clip.frames[0, 10, 50, 0] < 50


def test_reading_is_deterministic(tmp_path, write_clip) -> None:
    path = write_clip(tmp_path / "a.mp4", draw(Scene("red", "cross", "up", "light", 1), 20, 128, 192), fps=16)
    data = replace(DATA, crop="random", window="random", height=48, width=48)
    assert torch.equal(read_clip(path, data).frames, read_clip(path, data).frames)
    moved = tmp_path / "elsewhere" / "other.mp4"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    assert torch.equal(read_clip(path, data).frames, read_clip(moved, data).frames)


def reason(path: Path, data: DataConfig = DATA) -> str:
    with pytest.raises(ClipError) as caught:
        read_clip(path, data)
    return caught.value.reason


def test_files_that_are_no_video_are_refused(tmp_path, write_clip) -> None:
    empty, text, audio = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "audio.mp4"
    empty.touch()
    text.write_text("not a video at all\n" * 50)
    with av.open(str(audio), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(empty) == "0 bytes"
    assert reason(tmp_path / "gone.mp4") == "the file is missing"
    assert "not a readable video" in reason(text)
    assert "no video stream" in reason(audio)
    (tmp_path / "folder.mp4").mkdir()
    assert reason(tmp_path / "folder.mp4")


@pytest.mark.parametrize(
    ("name", "faststart"), [("a.mp4", True), ("a.mp4", False), ("a.mkv", True), ("a.webm", True), ("a.mov", True)]
)
@pytest.mark.parametrize("share", [0.02, 0.4, 0.8, 0.98])
def test_a_truncated_file_is_found_even_when_the_wanted_frames_are_there(
    tmp_path, write_clip, name, faststart, share
) -> None:
    frames = draw(Scene("red", "circle", "left", "dark", 1), 40, 64, 96)
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    whole = write_clip(tmp_path / name, frames, codec=codec, faststart=faststart).read_bytes()
    if name.endswith(("mkv", "webm")):
        share = min(share, 0.85)  # Matroska has no table of frames: only the missing time tells
    path = tmp_path / f"cut-{name}"
    path.write_bytes(whole[: int(len(whole) * share)])
    found = reason(path, replace(DATA, frames=1 if share < 0.1 else 5))
    assert "truncated" in found or "one frame only" in found or "header is damaged" in found


def test_damage_in_the_middle_is_found(tmp_path, write_clip) -> None:
    whole = bytearray(
        write_clip(tmp_path / "a.mp4", draw(Scene("red", "circle", "left", "dark", 1), 9, 64, 96)).read_bytes()
    )
    middle = len(whole) * 2 // 3
    whole[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    (tmp_path / "b.mp4").write_bytes(whole)
    assert "damaged" in reason(tmp_path / "b.mp4")


def test_clips_of_one_frame_and_short_clips_are_refused(tmp_path, write_clip) -> None:
    assert reason(write_clip(tmp_path / "one.mp4", numbered(1))) == "one frame only"
    assert (
        reason(write_clip(tmp_path / "short.mp4", numbered(8)))
        == "too short: has 1.00 s, needs 1.12 s (9 frames at 8 a second)"
    )
    assert read_clip(write_clip(tmp_path / "enough.mp4", numbered(9)), DATA).frames.shape[0] == 9
    assert "too short" in reason(write_clip(tmp_path / "fast.mp4", numbered(24), fps=24))


def test_a_header_with_a_wrong_length_is_found(tmp_path, write_clip) -> None:
    path = write_clip(tmp_path / "a.mkv", numbered(12))
    false_length = path.read_bytes().replace(b"00:00:01.500000000", b"00:00:42.500000000")
    (tmp_path / "b.mkv").write_bytes(false_length)
    assert "claims 42.50 s, holds 1.50 s" in reason(tmp_path / "b.mkv")
    # An mp4 whose sample table names one frame more than there is (the box also says how many).
    mp4 = bytearray(write_clip(tmp_path / "a.mp4", numbered(12)).read_bytes())
    at = mp4.index(b"stsz") + 4
    assert int.from_bytes(mp4[at + 8 : at + 12], "big") == 12
    mp4[at + 12 + 11 * 4 : at + 12 + 12 * 4] = (50_000_000).to_bytes(4, "big")
    (tmp_path / "b.mp4").write_bytes(mp4)
    assert "truncated: the header lists frames beyond the end" in reason(tmp_path / "b.mp4")


def test_a_clip_trimmed_by_an_edit_list_is_read(tmp_path, write_clip) -> None:
    """Phones trim without encoding again: the file holds frames that are never shown."""
    whole = write_clip(tmp_path / "a.mp4", numbered(24), options={"crf": "4", "threads": "1", "bf": "0"})
    trimmed = tmp_path / "b.mp4"
    with av.open(str(whole)) as source, av.open(str(trimmed), "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = round(1 / float(stream.time_base))
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    assert numbers(read_clip(trimmed, DATA).frames) == list(range(8, 17))
