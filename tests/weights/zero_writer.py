"""Write ZeRO checkpoints of a small model with DeepSpeed. Run by torchrun: ``zero_writer.py <folder> <stage>...``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch


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
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3), config=settings)
    for _ in range(2):
        x = torch.randn(2, 7, dtype=next(engine.module.parameters()).dtype)
        engine.backward(engine(x))
        engine.step()
    engine.save_checkpoint(str(folder / f"stage{stage}-{dtype}"), client_state={"iteration": 2})


if __name__ == "__main__":
    # Without this a shared-memory extension is compiled, whose processes busy-wait for each other.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for word in sys.argv[2:]:
        number, kind = word.split("-")
        write(Path(sys.argv[1]), int(number), kind)
