"""What an optimizer remembers of each parameter in a DeepSpeed checkpoint, whatever ZeRO stage and rank count wrote it.

Read as :mod:`cogflow.weights.zero` reads the masters: mapped, tensor by tensor, nothing of DeepSpeed called and nothing unpickled that is
not plain. DeepSpeed's own way to another world size (``checkpoint/ds_to_universal.py``) writes every state to the disk once more, loads
pickles, and knows no stage 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import CheckpointError
from cogflow.weights.zero import ZeroFolder
from cogflow.weights.zero_files import AGAIN, has_masters, read_states

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""


class SavedStates:
    """``read(name, key)``: the fp32 master weight of a parameter (key ``fp32``) or one of MOMENTS, in the parameter's shape.

    ``trained``: names of the trained parameters in the model's order, which stage 0 numbers them by. ``steps``: updates that Adam has
    counted. Raises :class:`CheckpointError` for a folder that does not hold all of it.
    """

    def __init__(self, folder: Path, trained: Sequence[str]) -> None:
        self.folder = folder
        self._masters = ZeroFolder(folder)
        self._numbers = {name: str(index) for index, name in enumerate(trained)}
        self._moments: dict[str, Any] = {}
        if has_masters(folder):
            for key in MOMENTS:
                self._moments[key] = ZeroFolder(folder, moment=key)
            self.steps = self._moments[MOMENTS[0]].adam_steps
            return
        optimizer = read_states(folder / "mp_rank_00_model_states.pt").get("optimizer")
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
            raise CheckpointError(f"{folder} holds no optimizer states.", AGAIN)
        self._plain = {str(number): state for number, state in optimizer["state"].items()}
        if set(self._plain) != set(self._numbers.values()):
            raise CheckpointError(
                f"{folder} holds optimizer states of {len(self._plain)} parameters, {len(trained)} are trained.",
                "Use the same stage.freeze.",
            )
        self.steps = int(next(iter(self._plain.values()))["step"])

    def read(self, name: str, key: str) -> torch.Tensor:
        if key == "fp32":
            return self._masters.read(name)
        if self._moments:
            return self._moments[key].read(name)
        return self._plain[self._numbers[name]][key].detach().float()
