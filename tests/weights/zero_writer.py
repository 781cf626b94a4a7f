"""Program of the tests' server: write ZeRO checkpoints of a small model with DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogflow.runtime import ranks
from cogflow.training.deepspeed_start import start_deepspeed


class UnevenModel(torch.nn.Module):
    """A model with sizes that no number of ranks divides, two groups, frozen, tied and unused weights, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 5)
        self.second = torch.nn.Linear(5, 3, bias=False)
        self.scale = torch.nn.Parameter(torch.randn(1))
        self.frozen = torch.nn.Linear(3, 7)
        self.frozen.requires_grad_(False)
        self.again = torch.nn.Linear(5, 3, bias=False)
        self.again.weight = self.second.weight
        self.tied = self.second
        self.register_buffer("table", torch.randn(4, 3))
        self.register_buffer("count", torch.tensor(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.frozen((self.tied(self.first(x)) + self.again(self.first(x))) * self.scale) ** 2
        ).mean() + self.table.sum() * 0  # type: ignore[operator]


def write(folder: Path, stage: int, dtype: str = "bf16") -> None:
    torch.manual_seed(0)
    model = UnevenModel()
    trained = [
        {"params": [*model.first.parameters()], "weight_decay": 0.1},
        {"params": [*model.second.parameters(), model.scale], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
        "communication_data_type": "fp32",
    }
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    engine, *_ = start_deepspeed().initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3), config=settings
    )
    for _ in range(2):
        x = torch.randn(2, 7, dtype=next(engine.module.parameters()).dtype)
        engine.backward(engine(x))
        engine.step()
    engine.save_checkpoint(str(folder / f"stage{stage}-{dtype}"), client_state={"iteration": 2})


def main(words: Sequence[str]) -> None:
    """Write a checkpoint of each kind, such as ``2-bf16``, into a folder. ``words``: the folder and the kinds."""
    folder, *kinds = words
    ranks.setup()
    start_deepspeed()
    for kind in kinds:
        stage, dtype = kind.split("-")
        write(Path(folder), int(stage), dtype)
    ranks.close()
