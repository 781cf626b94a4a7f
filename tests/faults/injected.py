"""Real faults at named points of a run: ``kill@renaming#2/0`` kills rank 0 before it renames for the second time.

The format is ``ACTION@POINT#N/RANK``. N counts from 1 (default 1); without RANK the fault happens on all ranks; faults
are joined by commas. A fault writes its name to a file before it happens. Points are places in cogflow where something
can be lost.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POINTS: dict[str, tuple[str, str, str]] = {
    # point: (module, name, when: before or after the call, or with its result)
    "step": ("cogflow.training.loop", "Trainer.train_step", "before"),
    "micro": ("cogflow.training.batch", "Loader.take", "before"),
    "losses": ("cogflow.training.objective", "Objective.losses", "result"),
    "backward": ("cogflow.training.engine", "Engine.backward", "before"),
    "update": ("cogflow.training.engine", "Engine.step", "before"),
    "updated": ("cogflow.training.engine", "Engine.step", "after"),
    "evaluation": ("cogflow.training.evaluation", "Evaluation.on_evaluate", "before"),
    "denoising": ("cogflow.sampling.sampler", "Sampler._stop_on_request", "before"),
    "validation": ("cogflow.training.validation", "Validation.on_validate", "before"),
    "validated": ("cogflow.training.validation", "Validation.on_validate", "after"),
    "states": ("cogflow.training.engine", "Engine.save", "before"),
    "states-written": ("cogflow.training.engine", "Engine.save", "after"),
    "weights": ("cogflow.training.checkpoint", "save_weights", "before"),
    "weights-written": ("cogflow.training.checkpoint", "save_weights", "after"),
    "hashed": ("cogflow.training.checkpoint", "hash_together", "after"),
    "manifest": ("cogflow.files.publish", "write_manifest", "before"),
    "manifest-written": ("cogflow.files.publish", "write_manifest", "after"),
    "renaming": ("cogflow.files.publish", "_swap", "before"),
    "renamed": ("cogflow.files.publish", "_swap", "after"),
    "pointing": ("cogflow.training.checkpoint", "point_at", "before"),
    "line-recorded": ("cogflow.artifacts.run_history", "_write", "after"),
    "line-moving": ("cogflow.artifacts.run_history", "_move", "before"),
    "line-moved": ("cogflow.artifacts.run_history", "_move_rungs", "after"),
    "line-restoring": ("cogflow.artifacts.run_history", "_restore", "after"),
    "deleting": ("cogflow.training.retention", "_delete", "before"),
    "deleted": ("cogflow.training.retention", "_delete", "after"),
    "encoding": ("cogflow.data.encode", "encode_frames", "before"),
    "shard": ("cogflow.data.latent_cache", "save_tensors", "after"),
    "index": ("cogflow.data.preparation", "write_record", "before"),
    "exporting": ("cogflow.weights.weights_writer", "stream_tensor", "before"),
    "exported": ("cogflow.weights.weights_writer", "HashingWriter.close", "after"),
    "placing": ("cogflow.assemble.pipeline_folder", "place_file", "before"),
}


def arm(faults: str, rank: int, fired: Path) -> None:
    """Arrange the ``faults`` of this rank; each appends its name to the file ``fired`` when it happens.

    ``fp16``: DeepSpeed trains in fp16 on a CPU, which it refuses although torch can. ``impatient``: cogflow waits a few
    seconds for W&B where it would wait minutes. ``hasty``: the lock of the run folder is renewed often and stale soon.
    """
    for fault in filter(None, faults.split(",")):
        if fault == "impatient":
            from cogflow.tracking import wandb_run

            wandb_run.SETTINGS.update(init_timeout=3.0, finish_timeout=3.0)
            wandb_run.USE_SECONDS = 1.0
            wandb_run.CALL_SECONDS = 2.0
            wandb_run.FINISH_SECONDS = 3.0
            wandb_run.ARTIFACT_SECONDS = 5.0
            continue
        if fault == "hasty":
            from cogflow.runtime import run_lock

            run_lock.RENEW_SECONDS, run_lock.OBSERVED_SECONDS = 0.2, 2.0
            continue
        if fault == "fp16":
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True
            continue
        action, rest = fault.split("@")
        rest, _, of = rest.partition("/")
        point, _, number = rest.partition("#")
        if not of or int(of) == rank:
            _patch(POINTS[point], _firing(action, fault, fired), int(number or 1))


def _patch(point: tuple[str, str, str], act: Callable[[Any], Any], number: int) -> None:
    module, name, when = point
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    inner, calls = getattr(owner, last), [0]

    def patched(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        due = calls[0] == number
        if due and when == "before":
            act(arguments)
        result = inner(*arguments, **named)
        if due and when == "after":
            act(arguments)
        return act(result) if due and when == "result" else result

    setattr(owner, last, patched)


def _firing(action: str, fault: str, fired: Path) -> Callable[[Any], Any]:
    """Return ``action`` with the name of ``fault`` appended to ``fired`` first."""

    def act(value: Any) -> Any:
        with fired.open("a", encoding="utf-8") as file:
            file.write(fault + "\n")
            file.flush()
            os.fsync(file.fileno())
        ACTIONS[action](value)
        return value

    return act


def _send(number: signal.Signals) -> Callable[[Any], None]:
    def send(value: Any) -> None:
        sys.stdout.flush()
        os.kill(os.getpid(), number)

    return send


def _send_twice(value: Any) -> None:
    """Send SIGTERM twice, later than signals that count as one request."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3.2)
    os.kill(os.getpid(), signal.SIGTERM)


def _signal_services(number: signal.Signals) -> Callable[[Any], None]:
    def send(value: Any) -> None:
        for pid in _services():
            os.kill(pid, number)

    return send


def _fill_disk(value: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _set_nan(losses: Any) -> None:
    losses.per_sample[0] = math.nan
    losses.mean = losses.mean * math.nan


def _set_spike(losses: Any) -> None:
    losses.per_sample[:] = 1e4 * losses.per_sample
    losses.mean = losses.mean * 1e4


def _set_infinite_gradient(arguments: Any) -> None:
    """Make the gradient infinite; the loss itself stays finite."""
    loss: torch.Tensor = arguments[1]
    loss.register_hook(lambda gradient: gradient * math.inf)


ACTIONS: dict[str, Callable[[Any], None]] = {
    "kill": _send(signal.SIGKILL),
    "term": _send(signal.SIGTERM),
    "usr1": _send(signal.SIGUSR1),
    "int": _send(signal.SIGINT),
    "twice": _send_twice,
    "unserve": _signal_services(signal.SIGKILL),
    "freeze": _signal_services(signal.SIGSTOP),
    "hang": lambda value: time.sleep(3600),
    "full": _fill_disk,
    "nan": _set_nan,
    "spike": _set_spike,
    "infgrad": _set_infinite_gradient,
}


def _services() -> list[int]:
    """Return the process ids of W&B's service that this process started."""
    from cogflow.tracking.wandb_service import service_pids

    if not (found := service_pids()):
        raise RuntimeError("no service of W&B to kill")
    return found
