"""What is skipped while clips are read changes no byte of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cogflow.config.data_section import DataConfig
from cogflow.data import decode, resize
from cogflow.data.clips import read_clip
from cogflow.data.encode import clip_threads
from cogflow.data.resize import Geometry
from cogflow.data.shapes import Scene, draw
from cogflow.data.video import ToPlanes, to_rgb

SIZES = [
    Geometry((180, 320), (120, 213), (0, 16), (120, 180)),
    Geometry((270, 480), (120, 213), (0, 17), (120, 180)),
    Geometry((540, 960), (96, 171), (0, 21), (96, 128)),
    Geometry((128, 192), (64, 192), (0, 10), (64, 96)),
    Geometry((48, 96), (64, 128), (0, 16), (64, 96)),
    Geometry((131, 97), (77, 65), (3, 5), (64, 48)),
]


@pytest.mark.parametrize("geometry", SIZES, ids=str)
def test_products_give_the_bytes_of_torchs_own_resizing(geometry: Geometry) -> None:
    assert resize._products(geometry) is not None
    rng = np.random.default_rng(1)
    for kind in ("noise", "black and white", "ramp"):
        noise = rng.integers(0, 256, (3, *geometry.size), dtype=np.uint8)
        ramp = np.broadcast_to(np.linspace(0, 255, geometry.size[1]).astype(np.uint8), noise.shape)
        planes = list({"noise": noise, "black and white": noise // 128 * 255, "ramp": ramp.copy()}[kind])
        out = torch.empty(3, *geometry.shown, dtype=torch.uint8)
        resize.resize(planes, geometry, out)
        assert torch.equal(out, resize._by_torch(planes, geometry))


def test_torch_resizes_where_its_additions_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry((60, 90), (40, 60), (0, 0), (40, 60))
    monkeypatch.setattr(resize, "_RULES", (lambda taps: 1,))
    resize._products.cache_clear()
    assert resize._products(geometry) is None
    planes = list(np.random.default_rng(0).integers(0, 256, (3, 60, 90), dtype=np.uint8))
    out = torch.empty(3, 40, 60, dtype=torch.uint8)
    resize.resize(planes, geometry, out)
    assert torch.equal(out, resize._by_torch(planes, geometry))
    resize._products.cache_clear()


@pytest.mark.parametrize("turn", [0, 90, 180])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p"])
def test_planes_are_those_of_the_packed_picture(tmp_path: Path, write_clip, turn: int, pixels: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 70, 94, 3)).astype(np.uint8)
    path = write_clip(tmp_path / "a.mp4", frames, rotation=turn)
    to_planes = ToPlanes()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            one = frame if pixels == "yuv420p" else frame.reformat(format=pixels)
            assert np.array_equal(np.stack(to_planes(one), axis=-1), to_rgb(one))


@pytest.mark.parametrize(
    ("first", "times"), [(0.0, None), (5.2, None), (0.0, np.cumsum([0.02, 0.03, 0.05] * 40).tolist())]
)
@pytest.mark.parametrize("held", [True, False])
def test_unneeded_frames_are_left_out_and_the_others_are_the_same(
    tmp_path: Path, write_clip, monkeypatch: pytest.MonkeyPatch, first: float, times: list[float] | None, held: bool
) -> None:
    frames = draw(Scene("red", "cross", "up", "light", 1), 160, 64, 96)[: len(times) if times else 160]
    options = {"crf": "20", "bf": "3", "g": "50", "threads": "1"}
    path = write_clip(tmp_path / ("a.mkv" if times else "a.mp4"), frames, fps=24, times=times, options=options)
    monkeypatch.setattr(decode, "_HELD", 2**20 if held else 0)
    with ExitStack() as stack:
        file = decode.opened(path, path.stat().st_size, stack)
        wanted = float(file.scan.times[np.searchsorted(file.scan.times, first)]) + np.arange(9) / 7
        few = [(frame.pts, count, to_rgb(frame)) for frame, count in decode.few(file, wanted)]
    every = [(frame.pts, count, to_rgb(frame)) for frame, count in decode.all_(file, wanted)]
    assert [(pts, count) for pts, count, _ in few] == [(pts, count) for pts, count, _ in every]
    assert all(np.array_equal(one, other) for (_, _, one), (_, _, other) in zip(few, every, strict=True))


def test_damage_where_nothing_is_wanted_is_no_matter(tmp_path: Path, write_clip) -> None:
    """The clip is what it would be of the whole file; damage in what is wanted is found (test_clips.py)."""
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


def test_threads_of_clips_leave_torchs_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with clip_threads(2) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == before
        torch.ones(10_000).sum()
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
