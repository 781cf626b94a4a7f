"""Shared helpers of the tests of assembly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogflow.config.config import Config
from cogflow.config.export_settings import AssembleStage
from cogflow.config.model_section import ModelConfig
from cogflow.config.run_section import RunConfig, TrackingConfig

TOKENS = 16
TRAINED_WITH = {
    "scaling_factor": 0.7,
    "snr_shift_scale": 1.0,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "invert_scale_latents": False,
    "dtype": "fp32",
    "max_sequence_length": TOKENS,
}


class Work:
    """A test's copies of ``base`` and ``run``, and the config that assembles them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.run = folder, folder / "base", folder / "run"

    def config(self, **stage: Any) -> Config:
        options: dict[str, Any] = {"base": str(self.base), "verify": False} | stage
        return Config(
            stage=AssembleStage(**options),
            run=RunConfig(root=str(self.folder), name="run"),
            model=ModelConfig(name="auto"),
            tracking=TrackingConfig(wandb="disabled"),
        )

    def edit(self, path: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change a JSON file below the folder."""
        file = self.folder / path
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))
