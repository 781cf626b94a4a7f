"""Settings of a training step against each other: each in a process of its own, so that none inherits another's memory or programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cogflow.benchmarking.peer_step import is_cogvideo
from cogflow.benchmarking.step import BARE
from cogflow.config.schema import BenchmarkStage
from cogflow.errors import ConfigError

OWN = ("stage.what=", "stage.settings=", "stage.vs=", "run.root=", "run.name=", "tracking.")
RECORD = "benchmark.json"

USUAL = (
    "",
    "speed.compile=off speed.attention=flash deepspeed.checkpoint_keep=nothing",
    "speed.attention=flash",
    "speed.compile=off",
    "deepspeed.checkpoint_keep=nothing",
    "deepspeed.checkpoint_keep=attention",
    "deepspeed.checkpoint_keep=products",
    "deepspeed.checkpoint_keep=all",
    "deepspeed.checkpoint_every_block=0",
    "deepspeed.activation_checkpointing=false",
    "speed.compile=graphs",
    "deepspeed.reduce_dtype=model",
    "deepspeed=zero3",
    "",
)
"""Compared where ``stage.settings`` names none; the first as it is configured, and once more at the end: what the machine itself drifts."""

RECOMPUTED = "deepspeed.activation_checkpointing=true"
SMALL = (
    "",
    "speed.attention=math",
    "speed.compile=blocks",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=nothing",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=attention",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=products",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=all",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=all speed.compile=blocks",
    "",
)
"""The same for a CPU, which has fewer."""


@dataclass(frozen=True)
class Found:
    """One setting: its words, and what :func:`cogflow.benchmarking.step.measure` found, or why it did not run."""

    words: str
    step: dict[str, Any] | None
    problem: str = ""


def compare(
    words: Sequence[str], stage: BenchmarkStage, folder: Path, usual: Sequence[str], advance: Callable[[int], None]
) -> list[Found]:
    """One row a setting, in order. ``words``: of the command line that asked for it."""
    versus = stage.vs if stage.vs and stage.vs != BARE and not is_cogvideo(Path(stage.vs).expanduser()) else None
    kept = [word for word in words if not word.startswith(OWN)] + ([f"stage.vs={BARE}"] if stage.vs == BARE else [])
    with checked_out(versus, folder) as tree:
        rows = []
        for place, setting in enumerate(stage.settings or usual):
            changed = {word.split("=")[0] for word in setting.split()}
            all_words = [word for word in kept if word.split("=")[0] not in changed] + setting.split()
            rows.append(_run(all_words, setting or "as it is", folder / f"setting-{place:02d}"))
            advance(1)
        if tree is not None:
            rows.append(_run(kept, f"cogflow at {versus}", folder / "versus", tree))
    return rows


def _run(words: Sequence[str], name: str, folder: Path, cwd: Path | None = None) -> Found:
    where = [f"run.root={folder.resolve()}", "run.name=step", "tracking.wandb=disabled"]
    command = [sys.executable, "-m", "cogflow", *words, "stage.what=step", *where]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    record = folder / "step" / RECORD
    if done.returncode or not record.is_file():
        said = [line for line in (done.stderr.strip() or done.stdout).splitlines() if line.strip()]
        return Found(name, None, " ".join(line.strip() for line in said[-2:]) or f"exit code {done.returncode}")
    return Found(name, json.loads(record.read_text(encoding="utf-8"))["results"]["step"])


@contextmanager
def checked_out(revision: str | None, folder: Path) -> Iterator[Path | None]:
    """A revision of this repository in a folder of its own, for the time; ``None`` for none. Raises :class:`ConfigError` when git knows
    none of that name."""
    if revision is None:
        yield None
        return
    repository = Path(__file__).resolve().parents[2]
    with TemporaryDirectory(dir=folder) as place:
        tree = Path(place) / "tree"
        git = ["git", "-C", str(repository), "worktree"]
        done = subprocess.run(
            [*git, "add", "--detach", str(tree), revision], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConfigError(
                f"stage.vs={revision}: neither bare, nor a clone of zai-org/CogVideo, nor a revision of cogflow in {repository}.",
                done.stderr.strip()[-200:],
            )
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True, check=False)
