"""The clips of a peer's own dataset code, from a clone outside of this repository, read in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from cogflow.benchmarking import peer_clips_run
from cogflow.config.schema import DataConfig
from cogflow.errors import ConfigError, DataError

PEERS = {
    "CogVideo": Path("finetune") / "datasets" / "t2v_dataset.py",
    "finetrainers": Path("finetrainers") / "data" / "dataset.py",
}
"""Peers by the file that they are known by."""


def peer_in(clone: Path) -> str:
    """Whose clone this is. Raises :class:`ConfigError` for another folder."""
    for name, file in PEERS.items():
        if (clone / file).is_file():
            return name
    raise ConfigError(
        f"stage.vs={clone}: neither a clone of zai-org/CogVideo nor one of a-r-r-o-w/finetrainers.",
        f"There would be {' or '.join(map(str, PEERS.values()))} in it.",
    )


class PeerClips:
    """A peer that reads ``clips`` at the size of ``data`` as often as :meth:`run` asks it to. ``python``: of its install; default: ours.

    ``folder``: for its list of the clips, and what it writes. Raises :class:`DataError` with its last line when it ends with an error.
    """

    def __init__(self, clone: Path, python: str | None, clips: Sequence[Path], data: DataConfig, folder: Path) -> None:
        self.name = peer_in(clone)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "videos.txt").write_text(
            "".join(f"{os.path.relpath(clip, folder)}\n" for clip in clips), encoding="utf-8"
        )
        (folder / "prompts.txt").write_text(
            "".join(f"clip {number}\n" for number, _ in enumerate(clips)), encoding="utf-8"
        )
        asked = {
            "peer": self.name, "clone": str(clone.resolve()), "folder": str(folder.resolve()),
            "size": [data.frames, data.height, data.width],
        }  # fmt: skip
        request = folder / "request.json"
        request.write_text(json.dumps(asked), encoding="utf-8")
        self._said = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 closed by __exit__
        command = [python or sys.executable, str(Path(peer_clips_run.__file__)), str(request)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )

    def __enter__(self) -> PeerClips:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def run(self) -> dict[str, Any]:
        """One pass over all clips: ``seconds``, and the ``shapes`` that the VAE would have been given."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._said.seek(0)
            lines = [one for one in self._said.read().splitlines() if one.strip()]
            raise DataError(
                f"{self.name}'s clips ended with {self._process.returncode}: {lines[-1] if lines else 'no word'}",
                "Give the Python of its own install with stage.vs_python=.",
            )
        return dict(json.loads(line))
