"""H.264 clips to read, of the contents that are installed, where no folder of real ones is given."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cogflow.benchmarking.clips import contents, variant
from cogflow.config.schema import BenchmarkStage, DataConfig

COUNT = 4  # clips, where stage.contents names no number
RATE = 3  # frames that they have for each that is wanted
LARGEST = (640, 1138)  # height and width that contents are cropped at, and scaled up from


def written(folder: Path, stage: BenchmarkStage, data: DataConfig) -> list[Path]:
    """H.264 clips with x264's usual settings, of what there is of real contents: just long enough, ``stage.clip_height`` high (0: half as
    high again as wanted), 16:9."""
    height = stage.clip_height or 2 * round(0.75 * data.height)
    width = 2 * max(round(height * 8 / 9), round(data.width * height / data.height / 2))
    chosen = [content for content in contents(None) if content.name.startswith("bigbuckbunny")] or contents(None)
    paths = []
    for number in range(stage.contents or COUNT):
        path = folder / f"{number:02d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = RATE * data.frames
        small = variant(
            chosen[number % len(chosen)], number, min(frames, 60), min(height, LARGEST[0]), min(width, LARGEST[1])
        )
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(RATE * data.fps).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "20", "threads": "1", "x264-params": "mbtree=0"}
            for place in islice(_there_and_back(len(small)), frames):
                image = Image.fromarray(small[place]).resize((width, height), Image.Resampling.BICUBIC)
                frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24").reformat(format="yuv420p")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        paths.append(path)
    return paths


def _there_and_back(count: int) -> Iterator[int]:
    while True:
        yield from range(count)
        yield from range(count - 2, 0, -1)
