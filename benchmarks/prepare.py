"""Compare reading clips with the dataset code of CogVideo or finetrainers, pass by pass: ``python -m benchmarks.prepare
--vs CLONE``.

The peer reads in its own process, with the interpreter of its environment. A pass ends where the VAE would be
called.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from benchmarks.output import RESULTS, add_size_options, new_parser, report
from benchmarks.peers import read_clips
from benchmarks.real_clips import write_h264_clips
from cogflow.benchmarking.prepare_cost import (
    COGFLOW,
    COLUMNS,
    describe_clips,
    find_clips,
    measure_parts,
    part_rows,
    seconds_per_pass,
    summary_line,
    timing_row,
)
from cogflow.benchmarking.results import BenchmarkResult
from cogflow.config.data_section import DataConfig
from cogflow.errors import ConfigError, DataError
from cogflow.runtime.progress import progress

PEERS = {
    "CogVideo": Path("finetune") / "datasets" / "t2v_dataset.py",
    "finetrainers": Path("finetrainers") / "data" / "dataset.py",
}
"""Name of a peer -> the file that identifies its clone."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("prepare", __doc__)
    parser.add_argument("--vs", type=Path, required=True, help="a clone of zai-org/CogVideo or a-r-r-o-w/finetrainers")
    parser.add_argument("--vs-python", default=sys.executable, help="the interpreter of the clone's own environment")
    parser.add_argument("--clips", type=Path, help="a folder of videos; default: H.264 clips of installed contents")
    parser.add_argument("--contents", type=int, default=0, help="number of clips; 0: all of --clips, else 4")
    parser.add_argument(
        "--clip-height", type=int, default=0, help="height of written clips; 0: one and a half times --height"
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of timed passes; default: %(default)s")
    parser.add_argument("--fps", type=float, default=8.0, help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=RESULTS / "prepare", help="folder of written files (%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the files")
    add_size_options(parser, 49, 480, 720)
    given = parser.parse_args(words)
    data = DataConfig(frames=given.frames, height=given.height, width=given.width, fps=given.fps)
    peer_of(given.vs.expanduser())
    if given.clips:
        paths = find_clips(given.clips.expanduser(), given.contents)
    else:
        height = given.clip_height or 2 * round(0.75 * data.height)
        paths = write_h264_clips(given.folder / "clips", given.contents or 4, height, data)
    with PeerReader(given.vs.expanduser(), given.vs_python, paths, data, given.folder / "peer") as peer:
        result = compare_passes(paths, data, peer, given.repeats, given.folder)
    if not given.keep:
        shutil.rmtree(given.folder, ignore_errors=True)
    report(result, given.output)


def compare_passes(
    paths: Sequence[Path], data: DataConfig, peer: PeerReader, repeats: int, folder: Path
) -> BenchmarkResult:
    """Read all clips in turns with cogflow and the peer, ``repeats`` times after one warm-up pass."""
    ours: list[float] = []
    theirs: list[float] = []
    with progress(2 * (1 + repeats), "passes") as bar:
        for turn in range(1 + repeats):
            own = seconds_per_pass(paths, data) / len(paths)
            bar.advance()
            other = peer.seconds_per_pass() / len(paths)
            bar.advance()
            if turn:
                ours.append(own)
                theirs.append(other)
    parts = measure_parts(paths, data, folder)
    typical = median(ours)
    times = median(other / own for own, other in zip(ours, theirs, strict=True))
    rows = [timing_row(COGFLOW, ours, typical, data.frames), timing_row(peer.name, theirs, typical, data.frames)]
    return BenchmarkResult(
        summary=f"{summary_line(typical, data, describe_clips(paths))}; {times:.2f} x {peer.name}'s own",
        columns=COLUMNS,
        rows=[*rows, *part_rows(parts)],
        details={
            "clips": [str(path) for path in paths],
            "seconds": {COGFLOW: ours, peer.name: theirs},
            "times": times,
            "peer": peer.name,
            "parts": {name: median(values) for name, values in parts.items()},
        },
    )


def peer_of(clone: Path) -> str:
    """Return the name of the peer whose clone this is. Raises :class:`ConfigError` for any other folder."""
    for name, file in PEERS.items():
        if (clone / file).is_file():
            return name
    raise ConfigError(
        f"--vs {clone} is neither a clone of zai-org/CogVideo nor of a-r-r-o-w/finetrainers.",
        f"It should hold {' or '.join(map(str, PEERS.values()))}.",
    )


class PeerReader:
    """A process of a peer, which reads ``clips`` at the size of ``data`` on each request.

    ``python``: the interpreter of its environment. ``folder``: the folder of its list of clips and of its output.
    """

    def __init__(self, clone: Path, python: str, clips: Sequence[Path], data: DataConfig, folder: Path) -> None:
        self.name = peer_of(clone)
        self._clips, self._size = len(clips), [data.frames, data.height, data.width]
        folder.mkdir(parents=True, exist_ok=True)
        videos = "".join(f"{os.path.relpath(clip, folder)}\n" for clip in clips)
        (folder / "videos.txt").write_text(videos, encoding="utf-8")
        prompts = "".join(f"clip {number}\n" for number in range(len(clips)))
        (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
        asked = {"peer": self.name, "clone": str(clone.resolve()), "folder": str(folder.resolve()), "size": self._size}
        request = folder / "request.json"
        request.write_text(json.dumps(asked), encoding="utf-8")
        self._errors = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 closed by __exit__
        command = [python, str(Path(read_clips.__file__)), str(request)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def __enter__(self) -> PeerReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def seconds_per_pass(self) -> float:
        """Return the seconds of one pass over all clips.

        Raises :class:`DataError` when the peer fails or returns clips of another size.
        """
        answer = self._ask()
        shapes = [sorted(side for side in shape if side != 1) for shape in answer["shapes"]]
        if len(shapes) != self._clips or any(shape != sorted([3, *self._size]) for shape in shapes):
            raise DataError(
                f"{self.name} returned clips of other sizes than requested: {answer['shapes'][:3]}",
                "Give clips that are long enough.",
            )
        return float(answer["seconds"])

    def _ask(self) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = [line for line in self._errors.read().splitlines() if line.strip()]
            raise DataError(
                f"{self.name}'s reader ended with {self._process.returncode}: {lines[-1] if lines else 'no output'}",
                "Give the Python of the clone's own environment with --vs-python.",
            )
        return dict(json.loads(line))


if __name__ == "__main__":
    main()
