"""stage.what=prepare: time reading clips up to the VAE's input, with as many at a time as stage=prepare reads, and the
parts of one clip."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch

from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.data import clips, softness, video_decoding
from cogflow.data.clip_index import EXTENSIONS
from cogflow.data.encode import clip_threads, clips_at_once, vae_input
from cogflow.data.latent_cache import ShardWriter
from cogflow.data.media import file_size, open_media
from cogflow.data.media_bytes import ClipError
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import PlaneConverter, write_video
from cogflow.errors import DataError
from cogflow.files.hashing import hash_file
from cogflow.runtime.progress import progress
from cogflow.sharpness.metrics import measure

COGFLOW = "cogflow"
DRAWN_CLIPS = 4
DRAWN_RATE = 3  # frames that are drawn for each frame that is read
COLUMNS = ("way", "seconds a clip", "lowest", "highest", "clips a second", "frames a second", "ratio to cogflow")
Result = TypeVar("Result")


def measure_preparing(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Read all clips in ``stage.repeats`` passes after one warm-up, then time the parts of each clip."""
    stage, data = config.stage, config.data
    place = (Path(stage.folder).expanduser() if stage.folder else folder / "benchmark") / "prepare"
    if stage.clips:
        paths = find_clips(Path(stage.clips).expanduser(), stage.contents)
    else:
        paths = draw_clips(place / "clips", stage.contents or DRAWN_CLIPS, stage.clip_height, data)
    description = describe_clips(paths)
    seconds = []
    with progress(1 + stage.repeats, "passes") as bar:
        for turn in range(1 + stage.repeats):
            spent = seconds_per_pass(paths, data) / len(paths)
            seconds += [spent] if turn else []
            bar.advance()
    parts = measure_parts(paths, data, place)
    if not stage.keep:
        shutil.rmtree(place, ignore_errors=True)
    typical = median(seconds)
    return BenchmarkResult(
        summary=summary_line(typical, data, description),
        columns=COLUMNS,
        rows=[timing_row(COGFLOW, seconds, typical, data.frames), *part_rows(parts)],
        details={
            "clips": [str(path) for path in paths],
            "seconds": seconds,
            "parts": {name: median(times) for name, times in parts.items()},
            "at_once": clips_at_once(),
        },
    )


def summary_line(typical: float, data: DataConfig, description: str) -> str:
    """Return one line about the speed. ``typical``: seconds per clip."""
    size = f"{data.frames}x{data.height}x{data.width}"
    rate = f"{1 / typical:.3g} clips of {size} a second ({data.frames / typical:.3g} frames)"
    return f"prepare: {rate} from {description}, {clips_at_once()} at a time"


def timing_row(way: str, seconds: Sequence[float], ours: float, frames: int) -> list[Cell]:
    """Return the cells of :data:`COLUMNS` for ``seconds`` per clip. ``ours``: the seconds of cogflow."""
    middle = median(seconds)
    return [way, middle, min(seconds), max(seconds), 1 / middle, frames / middle, ours / middle]


def part_rows(parts: dict[str, list[float]]) -> list[list[Cell]]:
    """Return one row of :data:`COLUMNS` per part of a clip."""
    return [[f"one core: {name}", median(times), min(times), max(times), "", "", ""] for name, times in parts.items()]


def find_clips(folder: Path, most: int) -> list[Path]:
    """Return the videos below ``folder``, at most ``most`` (0: all). Raises :class:`DataError` when there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
    if not found:
        raise DataError(
            f"stage.clips={folder} holds no clips.", f"Give a folder of {' '.join(EXTENSIONS)} files, or leave it out."
        )
    return found[:most] if most else found


def draw_clips(folder: Path, count: int, height: int, data: DataConfig) -> list[Path]:
    """Write drawn H.264 clips that are just long enough, 16:9 and ``height`` high (0: one and a half times
    ``data.height``)."""
    height = height or 2 * round(0.75 * data.height)
    width = 2 * max(round(height * 8 / 9), round(data.width * height / data.height / 2))
    paths = []
    for number, scene in enumerate(scenes(count, seed=3)):
        paths.append(folder / f"{number:02d}.mp4")
        write_video(
            paths[-1], draw(scene, DRAWN_RATE * data.frames, height, width), DRAWN_RATE * data.fps, crf=20, threads=1
        )
    return paths


def describe_clips(paths: Sequence[Path]) -> str:
    """Return number, size, codec and frame rate of the clips in words. The first clip stands for all."""
    with open_media(paths[0]) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 0)
        return f"{len(paths)} of {stream.width}x{stream.height} ({stream.codec_context.name}, {rate:.3g} a second)"


def seconds_per_pass(paths: Sequence[Path], data: DataConfig) -> float:
    """Return the seconds until all clips are ready for the VAE, with as many at a time as in stage=prepare."""

    def read(path: Path) -> torch.Size:
        return vae_input(clips.read_clip(path, data).frames, torch.device("cpu"), torch.float32).shape

    with clip_threads(clips_at_once()) as pool:
        began = time.perf_counter()
        try:
            shapes = list(pool.map(read, paths))
        except ClipError as error:
            raise DataError(
                f"a clip cannot be read: {error.reason}", "Give clips that stage=prepare takes, all of them."
            ) from None
        seconds = time.perf_counter() - began
    assert set(shapes) == {torch.Size((1, 3, data.frames, data.height, data.width))}
    return seconds


def measure_parts(paths: Sequence[Path], data: DataConfig, place: Path) -> dict[str, list[float]]:
    """Return the seconds per clip of each part of stage=prepare except the models, measured on one core."""
    place.mkdir(parents=True, exist_ok=True)
    with clip_threads(1) as pool:
        by_clip = [pool.submit(_parts_of_clip, path, data, place).result() for path in paths]
    return {part: [spent[part] for spent in by_clip] for part in by_clip[0]}


def _parts_of_clip(path: Path, data: DataConfig, place: Path) -> dict[str, float]:
    spent: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        result = work()
        spent[part] = time.perf_counter() - began
        return result

    content = timed("hashing the file", lambda: hash_file(path))
    with ExitStack() as stack:
        file = timed("opening, reading packets", lambda: video_decoding.open_video(path, file_size(path), stack))
        wanted = clips.window_start(file.scan, data, content) + np.arange(data.frames) / data.fps
        frames = timed("decoding", lambda: [frame for frame, _ in video_decoding.decode_needed(file, wanted)])
    to_planes = PlaneConverter()
    planes = timed("colours", lambda: [to_planes(frame) for frame in frames])
    out = torch.empty(3, data.height, data.width, dtype=torch.uint8)

    def resize() -> None:
        for frame in planes:
            clips.fit_frame(frame, data, content, out)

    timed("resizing, cropping", resize)
    clip = clips.read_clip(path, data, content)
    timed("as the VAE takes it", lambda: vae_input(clip.frames, torch.device("cpu"), torch.float32))
    timed("sharpness of the source", lambda: softness.measure_softness(clip, data, content, resampled=False))
    timed("sharpness of the clip", lambda: measure(clip.frames))
    latents = torch.zeros(16, (data.frames - 1) // 4 + 1, data.height // 8, data.width // 8)
    with ShardWriter(place, "clips", 2) as writer:
        writer.add("clip", {"mean": latents, "logvar": latents.clone()})
        timed("writing the moments", writer.flush)
    return spent
