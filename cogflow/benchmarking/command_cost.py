"""Run a command and measure its wall time and the peak of its memory by kind. Linux only: memory is read from /proc."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class CommandCost:
    """Wall time and memory of a finished command. Both memory values are sums over the process and its children.

    ``anonymous``: peak of RssAnon in bytes, the memory that only the process itself can free. ``resident``: peak of
    VmRSS in bytes, which includes mapped pages of files that the kernel can reclaim. ``tail``: the last lines of its
    output.
    """

    seconds: float
    anonymous: int
    resident: int
    returncode: int
    tail: str

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    @property
    def failure(self) -> str | None:
        """Exit code and last lines of a command that failed; ``None`` after success."""
        return None if self.ok else f"exit code {self.returncode} after {self.seconds:.0f} s: {self.tail}"


def run_command(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> CommandCost:
    """Run ``command`` to its end with ``env`` added to the environment; its output goes to the file ``log``."""
    anonymous = resident = 0
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        with contextlib.suppress(OSError):
            # When memory runs out, the kernel must kill the measured command, not this process.
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        while process.poll() is None:
            now_anonymous, now_resident = process_memory(process.pid)
            anonymous, resident = max(anonymous, now_anonymous), max(resident, now_resident)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - started
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
    return CommandCost(seconds, anonymous, resident, process.returncode, tail)


def process_memory(pid: int) -> tuple[int, int]:
    """Return (RssAnon, VmRSS) in bytes of a process and its descendants; zeros when the process has ended."""
    anonymous = resident = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                anonymous += int(line.split()[1]) * 1024
            elif line.startswith("VmRSS:"):
                resident += int(line.split()[1]) * 1024
        children = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError):
        return anonymous, resident
    below = [process_memory(int(child)) for child in children]
    # Between vfork and exec a child shares its parent's pages: equal values are the same memory.
    below = [each for each in below if each != (anonymous, resident)]
    return anonymous + sum(own for own, _ in below), resident + sum(own for _, own in below)
