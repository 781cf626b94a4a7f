"""stage.what=prepare: clips on their way to the VAE, as many at a time as cores, beside a peer's own code; and one clip by part."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import av
import numpy as np
import torch

from cogflow.benchmarking.h264_clips import written
from cogflow.benchmarking.peer_clips import PeerClips, peer_in
from cogflow.benchmarking.tables import Table
from cogflow.config.schema import BenchmarkStage, Config, DataConfig
from cogflow.data import clips, decode, softness
from cogflow.data.cache_shards import ShardWriter
from cogflow.data.clip_index import EXTENSIONS
from cogflow.data.encode import at_once, clip_threads, pixels
from cogflow.data.video import ToPlanes
from cogflow.errors import DataError
from cogflow.files.hashing import hash_file
from cogflow.runtime.progress import progress
from cogflow.sharpness.metrics import measure

OURS = "cogflow"
Result = TypeVar("Result")


def preparing(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """``stage.repeats`` passes over all clips after one that does not count, ours and the peer's by turns; then each clip by part."""
    data = config.data
    clone = Path(stage.vs).expanduser() if stage.vs else None
    if clone is not None:
        peer_in(clone)
    place = (Path(stage.folder).expanduser() if stage.folder else folder / "benchmark") / "prepare"
    found = (
        _given(Path(stage.clips).expanduser(), stage.contents) if stage.clips else written(place / "clips", stage, data)
    )
    what = _told(found)
    seconds: dict[str, list[float]] = {OURS: []}
    with ExitStack() as stack:
        peer = stack.enter_context(PeerClips(clone, stage.vs_python, found, data, place / "peer")) if clone else None
        bar = stack.enter_context(progress((1 + stage.repeats) * (2 if peer else 1), "passes"))
        for turn in range(1 + stage.repeats):
            for name, one_pass in _ways(found, data, peer):
                spent = one_pass() / len(found)
                if turn:
                    seconds.setdefault(name, []).append(spent)
                bar.advance()
    parts = [_by_part(path, data, place) for path in found]
    if not stage.keep:
        shutil.rmtree(place, ignore_errors=True)
    theirs = seconds.get(peer.name) if peer else None
    times = median(other / own for own, other in zip(seconds[OURS], theirs, strict=True)) if theirs else None
    typical = median(seconds[OURS])
    size = f"{data.frames}x{data.height}x{data.width}"
    line = f"prepare: {1 / typical:.3g} clips of {size} a second ({data.frames / typical:.3g} frames) from {what}, "
    line += f"{at_once()} at a time"
    if peer and times:
        line += f"; {times:.2f} x {peer.name}'s own"
    cells: list[list[Any]] = [
        [name, median(one), min(one), max(one), 1 / median(one), data.frames / median(one), typical / median(one)]
        for name, one in seconds.items()
    ]
    whole = {part: median(one[part] for one in parts) for part in parts[0]}
    cells += [
        [f"one core: {part}", value, min(one[part] for one in parts), max(one[part] for one in parts), "", "", ""]
        for part, value in whole.items()
    ]
    columns = ["way", "seconds a clip", "lowest", "highest", "clips a second", "frames a second", "against cogflow"]
    results = {
        "summary": line, "clips": [str(path) for path in found], "seconds": seconds, "times": times, "peer": peer.name if peer else None,
        "parts": whole, "at once": at_once(),
    }  # fmt: skip
    return results, (columns, cells)


def _ways(found: Sequence[Path], data: DataConfig, peer: PeerClips | None) -> Iterator[tuple[str, Callable[[], float]]]:
    yield OURS, lambda: _pass(found, data)
    if peer is not None:
        yield peer.name, lambda: _peer_pass(peer, len(found), data)


def _pass(found: Sequence[Path], data: DataConfig) -> float:
    """Seconds until the VAE could have been given all clips, with as many in the making as in stage=prepare."""

    def one(path: Path) -> torch.Size:
        return pixels(clips.read_clip(path, data).frames, torch.device("cpu"), torch.float32).shape

    with clip_threads(at_once()) as pool:
        began = time.perf_counter()
        try:
            shapes = list(pool.map(one, found))
        except clips.ClipError as error:
            raise DataError(
                f"a clip cannot be read: {error.reason}", "Give clips that stage=prepare takes, all of them."
            ) from None
        seconds = time.perf_counter() - began
    assert set(shapes) == {torch.Size((1, 3, data.frames, data.height, data.width))}
    return seconds


def _peer_pass(peer: PeerClips, count: int, data: DataConfig) -> float:
    answer = peer.run()
    shapes = [sorted(shape) for shape in answer["shapes"]]
    wanted = sorted([3, data.frames, data.height, data.width])
    if len(shapes) != count or any([side for side in shape if side != 1] != wanted for shape in shapes):
        raise DataError(
            f"{peer.name} gave other clips than were asked for: {answer['shapes'][:3]}",
            "Give clips that are long enough.",
        )
    return float(answer["seconds"])


def _by_part(path: Path, data: DataConfig, place: Path) -> dict[str, float]:
    """Seconds of one clip, all on one core: every part of stage=prepare but the models."""
    spent: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        found = work()
        spent[part] = time.perf_counter() - began
        return found

    def alone() -> None:
        content = timed("hashing the file", lambda: hash_file(path))
        with ExitStack() as stack:
            file = timed("opening, walking through", lambda: decode.opened(path, clips.file_size(path), stack))
            wanted = clips.window_start(file.scan, data, content) + np.arange(data.frames) / data.fps
            frames = timed("decoding", lambda: [frame for frame, _ in decode.few(file, wanted)])
        to_planes = ToPlanes()
        planes = timed("colours", lambda: [to_planes(frame) for frame in frames])
        out = torch.empty(3, data.height, data.width, dtype=torch.uint8)

        def resized() -> None:
            for one in planes:
                clips.fit(one, data, content, out)

        timed("resizing, cropping", resized)
        clip = clips.read_clip(path, data, content)
        timed("as the VAE takes it", lambda: pixels(clip.frames, torch.device("cpu"), torch.float32))
        timed("sharpness of the source", lambda: softness.measured(clip, data, content, resampled=False))
        timed("sharpness of the clip", lambda: measure(clip.frames))
        latents = torch.zeros(16, (data.frames - 1) // 4 + 1, data.height // 8, data.width // 8)
        with ShardWriter(place, "clips", 2) as writer:
            writer.add("clip", {"mean": latents, "logvar": latents.clone()})
            timed("writing the moments", writer.flush)

    place.mkdir(parents=True, exist_ok=True)
    with clip_threads(1) as pool:
        pool.submit(alone).result()
    return spent


def _given(folder: Path, most: int) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
    if not found:
        raise DataError(
            f"stage.clips={folder} holds no clips.", f"Give a folder of {' '.join(EXTENSIONS)} files, or leave it out."
        )
    return found[:most] if most else found


def _told(found: Sequence[Path]) -> str:
    with av.open(str(found[0])) as container:
        stream = container.streams.video[0]
        return f"{len(found)} of {stream.width}x{stream.height} ({stream.codec_context.name}, {float(stream.average_rate or 0):.3g} a second)"
