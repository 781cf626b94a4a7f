"""Run a command and watch it: wall time, and the peak of its memory by kind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """``anonymous``: peak of RssAnon in bytes, what the process holds for itself; ``resident``: peak of VmRSS, mapped pages of files
    included, which the kernel can take back. Both are sums over the process and its children. ``tail``: its last lines."""

    seconds: float
    anonymous: int
    resident: int
    returncode: int
    tail: str

    @property
    def ok(self) -> bool:
        return self.returncode == 0


def measure(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Measured:
    """Run ``command`` to its end; what it prints goes to ``log``. Linux only: memory is read from /proc."""
    anonymous = resident = 0
    with open(log, "wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        with contextlib.suppress(OSError):
            # A way that needs more than there is must be the one that is killed, not what it is compared in.
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        while process.poll() is None:
            one, other = memory(process.pid)
            anonymous, resident = max(anonymous, one), max(resident, other)
            time.sleep(EVERY_SECONDS)
        seconds = time.monotonic() - started
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
    return Measured(seconds, anonymous, resident, process.returncode, tail)


def memory(pid: int) -> tuple[int, int]:
    """(RssAnon, VmRSS) in bytes of a process and all below it; zeros when it is gone."""
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
    found = [memory(int(child)) for child in children]
    # A child that was only just made by vfork is its parent still, page by page, until it becomes another program.
    found = [each for each in found if each != (anonymous, resident)]
    return anonymous + sum(one for one, _ in found), resident + sum(other for _, other in found)
