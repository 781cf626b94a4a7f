"""A request to stop, as SLURM and people send it: noted when it comes, acted on between two steps, by all ranks at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

from cogflow import ranks

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 and SIGINT only set a flag. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def anywhere(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        flag = torch.tensor([1.0 if self.received else 0.0], device=device)
        return bool(ranks.total(flag).item() > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
