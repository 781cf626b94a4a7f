"""DeepSpeed's Adam for the host, which it compiles when it is first needed: said before, and what goes wrong said after."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogflow.errors import ConfigError
from cogflow.runtime import ranks
from cogflow.runtime.console import echo

NAME = "cpu_adam"
BROKEN_OFF = 20 * 60.0
"""Seconds after which nobody builds any more: it takes one minute, a few on a busy machine."""


@contextmanager
def compiling() -> Iterator[None]:
    """Around the first use. Raises :class:`ConfigError` when it cannot be compiled, and when an earlier compilation was broken off: its
    lock would have every later start wait for ever, without a word (``torch/utils/file_baton.py``)."""
    with ranks.tag_rank_errors():
        _look_for_locks()
        try:
            yield
        except Exception as error:  # torch, ninja and DeepSpeed raise many kinds, bare ones among them
            raise ConfigError(
                f"DeepSpeed's Adam for the host could not be compiled: {_last_line(error)}",
                "It needs a C++ compiler (g++, or $CXX) and, with GPUs, torch's CUDA toolkit. Without: deepspeed=zero2 or zero3.",
            ) from error


def _look_for_locks() -> None:
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob(f"**/{NAME}/lock"):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # done meanwhile
            continue
        if age > BROKEN_OFF:
            raise ConfigError(
                f"A compilation of DeepSpeed's Adam for the host was broken off {age / 60:.0f} minutes ago and left {lock}",
                f"When no other process compiles it: rm -r {lock.parent}",
            )
        echo(
            f"waiting for another process to compile DeepSpeed's Adam for the host (if there is none: rm -r {lock.parent})"
        )
        return
    if not any(root.glob(f"**/{NAME}/*.so")):
        echo("compiling DeepSpeed's Adam for the host: a minute, once a machine")


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
