"""Faults that happen for real, at a named point of the work: ``kill@renaming#2/0`` kills rank 0 the second time it is
about to rename.

``ACTION@POINT#N/RANK``; N counts from 1 (default 1), RANK may be left out (all ranks); several are joined by commas. A
fault that fires writes its name down first. The points are those places in cogflow where something can be lost.
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
    # point: (module, name, before or after)
    "step": ("cogflow.training.loop", "Trainer.train_step", "before"),
    "micro": ("cogflow.training.batch", "Loader.take", "before"),
    "losses": ("cogflow.training.objective", "Objective.losses", "result"),
    "backward": ("cogflow.training.engine", "Engine.backward", "before"),
    "update": ("cogflow.training.engine", "Engine.step", "before"),
    "updated": ("cogflow.training.engine", "Engine.step", "after"),
    "evaluation": ("cogflow.training.evaluation", "Evaluation.on_evaluate", "before"),
    "denoising": ("cogflow.sampling.sampler", "Sampler._give_up_if_asked", "before"),
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
    "deleting": ("cogflow.training.retention", "_delete", "before"),
    "deleted": ("cogflow.training.retention", "_delete", "after"),
    "encoding": ("cogflow.data.encode", "encode_frames", "before"),
    "shard": ("cogflow.data.cache_shards", "save_file", "after"),
    "index": ("cogflow.data.preparation", "write_json", "before"),
    "exporting": ("cogflow.weights.weights_writer", "stream_tensor", "before"),
    "exported": ("cogflow.weights.weights_writer", "HashingWriter.close", "after"),
    "placing": ("cogflow.assemble.pipeline_folder", "place_file", "before"),
}

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT}


def arm(faults: str, rank: int, fired: Path) -> None:
    """Have the ``faults`` of this rank happen.

    ``fp16``: let DeepSpeed train in it on a CPU, which it refuses though torch can. ``impatient``: W&B is waited for a
    few seconds where it would be minutes.
    """
    for fault in filter(None, faults.split(",")):
        if fault == "impatient":
            from cogflow.tracking import wandb_run

            wandb_run.SETTINGS.update(init_timeout=3.0, finish_timeout=3.0)
            wandb_run.USE_SECONDS, wandb_run.CALL_SECONDS, wandb_run.FINISH_SECONDS, wandb_run.ARTIFACT_SECONDS = (
                1.0,
                2.0,
                3.0,
                5.0,
            )
            continue
        if fault == "fp16":
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True
            continue
        action, rest = fault.split("@")
        rest, _, of = rest.partition("/")
        point, _, number = rest.partition("#")
        if not of or int(of) == rank:
            _patch(POINTS[point], _act(action, fault, fired), int(number or 1))


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


def _act(action: str, fault: str, fired: Path) -> Callable[[Any], Any]:
    def act(value: Any) -> Any:
        with open(fired, "a", encoding="utf-8") as file:
            file.write(fault + "\n")
            file.flush()
            os.fsync(file.fileno())
        if action in SIGNALS:
            sys.stdout.flush()
            os.kill(os.getpid(), SIGNALS[action])
        elif action in ("unserve", "freeze"):
            for pid in _services():
                os.kill(pid, signal.SIGKILL if action == "unserve" else signal.SIGSTOP)
        elif action == "twice":
            # As people do when nothing seems to happen: more than the echo of the first one.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3.2)
            os.kill(os.getpid(), signal.SIGTERM)
        elif action == "hang":
            time.sleep(3600)
        elif action == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        elif action == "nan":
            value.per_sample[0] = math.nan
            value.mean = value.mean * math.nan
        elif action == "spike":
            value.per_sample[:] = 1e4 * value.per_sample
            value.mean = value.mean * 1e4
        elif action == "infgrad":
            # The loss itself stays finite: what overflows is the gradient.
            loss: torch.Tensor = value[1]
            loss.register_hook(lambda gradient: gradient * math.inf)
        else:
            raise ValueError(action)
        return value

    return act


def _services() -> list[int]:
    """W&B's service that this process started: it must be there."""
    from cogflow.tracking.wandb_service import service_pids

    if not (found := service_pids()):
        raise RuntimeError("no service of W&B to kill")
    return found
