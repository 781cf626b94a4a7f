"""Read a W&B run back from its .wandb file: a 7-byte header, then LevelDB-framed protobuf records."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogflow.config.config import Config
from cogflow.config.run_section import RunConfig
from cogflow.config.train_settings import TrainStage
from cogflow.data.shapes import Scene, draw

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path: Path) -> Iterator[bytes]:
    """Yield the payloads of the frames. Raises ``ValueError`` for a wrong checksum."""
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is no W&B file")
    at, parts = 7, []
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 0 and length == 0:
            continue
        if zlib.crc32(body, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"{path}: a record near byte {at} is damaged")
        parts.append(body)
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


class Recorded:
    """Content of one .wandb file.

    ``logged`` and ``used``: the artifacts that the run made and those that it names as inputs. ``stats``: names of the
    system's metrics.
    """

    def __init__(self, path: Path) -> None:
        from wandb.proto import wandb_internal_pb2 as pb

        self.group = self.job_type = self.run_id = self.name = self.host = ""
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.logged: list[Any] = []
        self.used: list[Any] = []
        self.files: list[str] = []
        self.alerts: list[str] = []
        self.axes: dict[str, str] = {}
        self.stats: set[str] = set()
        self.exit_code: int | None = None
        readers = {
            "run": self._run,
            "history": self._history,
            "artifact": self._artifact,
            "files": lambda files: self.files.extend(item.path for item in files.files),
            "alert": lambda alert: self.alerts.append(alert.title),
            "metric": lambda metric: self.axes.update({metric.glob_name or metric.name: metric.step_metric}),
            "stats": lambda stats: self.stats.update(item.key for item in stats.item),
            "exit": self._exit,
        }
        for payload in payloads(path):
            record = pb.Record()
            record.ParseFromString(payload)
            kind = record.WhichOneof("record_type")
            if kind in readers:
                readers[kind](getattr(record, kind))

    def _run(self, run: Any) -> None:
        self.group, self.job_type, self.run_id = run.run_group, run.job_type, run.run_id
        self.name, self.host = run.display_name, run.host
        self.config |= {item.key: json.loads(item.value_json) for item in run.config.update}

    def _history(self, history: Any) -> None:
        self.history.append(
            {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        )

    def _artifact(self, artifact: Any) -> None:
        (self.used if artifact.use_after_commit else self.logged).append(artifact)

    def _exit(self, record: Any) -> None:
        self.exit_code = record.exit_code


@pytest.fixture
def recorded() -> Callable[[Path, str], list[Recorded]]:
    """Return a function that reads every W&B session of a stage in a run folder, oldest first."""

    def read(folder: Path, stage: str) -> list[Recorded]:
        deadline = time.monotonic() + 20
        while True:
            paths = sorted(
                folder.glob(f"wandb/offline-run-*/run-*-{stage}.wandb"), key=lambda path: path.stat().st_mtime
            )
            sessions = [Recorded(path) for path in paths]
            # W&B's service writes the end of a run a moment after finish() has returned.
            if all(session.exit_code is not None for session in sessions) or time.monotonic() > deadline:
                return sessions
            time.sleep(0.05)

    return read


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the W&B settings and keys of the user who runs the tests, and set empty cache folders."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(stage=TrainStage(steps=4), run=RunConfig(root=str(tmp_path), name="demo"))


@pytest.fixture
def clip() -> np.ndarray:
    """Return a drawn clip, uint8 ``[9, 64, 96, 3]``."""
    return draw(Scene("purple", "star", "left", "dark", seed=1), 9, 64, 96)
