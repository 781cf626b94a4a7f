"""The training step of CogVideo's own ``finetune/``, from a clone outside of this repository, timed as ours is."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cogflow.benchmarking import cogvideo_step
from cogflow.benchmarking.ceiling import ceiling
from cogflow.benchmarking.step import speed_of
from cogflow.benchmarking.turns import Turn
from cogflow.config.schema import BenchmarkStage, Config
from cogflow.errors import DataError
from cogflow.models import loading
from cogflow.planning import flops, transformer_size
from cogflow.runtime import ranks

TRAINER = Path("finetune") / "models" / "cogvideox_t2v" / "sft_trainer.py"


def is_cogvideo(folder: Path) -> bool:
    """Whether ``folder`` is a clone of zai-org/CogVideo that finetunes."""
    return (folder / TRAINER).is_file()


def measure(
    config: Config[BenchmarkStage], stage: BenchmarkStage, clone: Path, python: str | None, folder: Path
) -> dict[str, Any]:
    """Its step at the size of ``config``, of a model of the same shape. ``python``: the interpreter of its install; default: ours.

    Raises :class:`DataError` with its last lines when it ends with an error.
    """
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    best = ceiling(device, dtype)
    described, _ = transformer_size.config_of(config.model)
    own = transformer_size.of_config(described)
    data = config.data
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = folder / "request.json", folder / "answer.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = {
        "clone": str(clone.resolve()), "config": described, "dtype": str(dtype).removeprefix("torch."), "gpu": device.type == "cuda",
        "latents": [(data.frames - 1) // own.frames_per_latent + 1, data.height // 8, data.width // 8], "port": port,
        "batch_size": stage.batch_size, "steps": stage.steps, "repeats": stage.repeats,
        "recompute": config.deepspeed.activation_checkpointing,
    }  # fmt: skip
    request.write_text(json.dumps(asked), encoding="utf-8")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    command = [python or sys.executable, str(Path(cogvideo_step.__file__)), str(request), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not answer.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise DataError(
            f"CogVideo's step in {clone} ended with {done.returncode}: {lines[-1] if lines else 'no word'}",
            "Give the Python of its own install with stage.vs_python=.",
        )
    found = json.loads(answer.read_text(encoding="utf-8"))
    speed = speed_of([Turn(seconds, 0.0) for seconds in found["turns"]], stage.batch_size)
    tokens = transformer_size.tokens(own, data.frames, data.height, data.width)
    useful = flops.step(own, tokens).total * stage.batch_size
    return {
        "model": config.model.name,
        "parameters": own.parameters,
        "size": f"{data.frames}x{data.height}x{data.width}",
        "tokens": tokens.total,
        "dtype": loading.dtype_name(dtype),
        "seconds": asdict(speed) if speed else None,
        "ceiling": asdict(best),
        "mfu": useful / speed.median / best.flops if speed else None,
        "memory": {"peak": found["peak"] / 1e9},
    }
