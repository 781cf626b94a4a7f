"""Provide a small transformer and checkpoints of it as training saves them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import CogVideoXTransformer3DModel

from cogflow.files.atomic_write import write_json
from cogflow.files.publish import publish_folder

# Make the helper saving.py importable: tests are imported by path.
sys.path.insert(0, str(Path(__file__).parent))

from saving import TRAINED_WITH, small_transformer


@pytest.fixture
def transformer() -> CogVideoXTransformer3DModel:
    return small_transformer()


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Publish ``<tmp>/run/checkpoints/step-...`` from models and return it."""

    def save(
        step: int,
        model: CogVideoXTransformer3DModel,
        ema: CogVideoXTransformer3DModel | None = None,
        dtype: str = "fp32",
        shard: str = "5GB",
    ) -> Path:
        target = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        with publish_folder(target) as folder:
            model.save_pretrained(folder / "transformer", max_shard_size=shard)
            if ema is not None:
                ema.save_pretrained(folder / "ema")
            (folder / "deepspeed").mkdir()
            (folder / "deepspeed" / "states.pt").write_bytes(b"optimizer")
            write_json(
                folder / "trainer.json",
                {
                    "step": step,
                    "family": "small",
                    "model": {"name": "small"},
                    "trained_with": TRAINED_WITH | {"dtype": dtype},
                },
            )
        return target

    return save
