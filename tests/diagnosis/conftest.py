"""Two artificial finetunes of the shipped model with checkpoints. The table of confusion.py uses real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogflow.models import tiny
from tests.diagnosis.faults import STEM, World

SAMPLING = {
    "height": 64,
    "width": 96,
    "frames": 9,
    "fps": 8.0,
    "dtype": "fp32",
    "steps": 8,
    "guidance_scale": 6.0,
    "use_dynamic_cfg": True,
}


def finetuned(run: Path, seed: int) -> Path:
    """Write a run of two checkpoints with EMA, and a pipeline with the newest EMA weights."""
    base = load_file(tiny.folder() / "transformer" / STEM)
    generator = torch.Generator().manual_seed(seed)
    moves = {
        name: torch.randn(value.shape, generator=generator) * value.float().std().nan_to_num(0)
        for name, value in base.items()
    }
    for step, part, size in ((6, "transformer", 0.02), (6, "ema", 0.01), (12, "transformer", 0.04), (12, "ema", 0.03)):
        folder = run / f"checkpoints/step-{step:06d}/{part}"
        folder.mkdir(parents=True)
        save_file(
            {name: value.float() + size * moves[name] for name, value in base.items()},
            folder / STEM,
            metadata={"format": "pt"},
        )
        shutil.copy(tiny.folder() / "transformer/config.json", folder)
    pipeline = run / "pipeline"
    shutil.copytree(tiny.folder(), pipeline, ignore=shutil.ignore_patterns("recipe.json", "manifest.json"))
    shutil.copy(run / "checkpoints/step-000012/ema" / STEM, pipeline / "transformer" / STEM)
    made = {"source": str(run / "checkpoints/step-000012"), "step": 12, "weights": "ema", "family": "tiny"}
    (pipeline / "assembly.json").write_text(
        json.dumps({"components": {}, "made": made, "checked_against": {}, "sampling": SAMPLING, "diffusers": ""})
    )
    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("diagnosis")
    return World(finetuned(root / "run", 1), finetuned(root / "other", 2), tiny.folder())
