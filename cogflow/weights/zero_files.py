"""Find and read the files of a DeepSpeed checkpoint. :mod:`cogflow.weights.zero` puts their tensors together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import torch

from cogflow.errors import CheckpointError
from cogflow.weights.torch_file import RANDOM_STATES, InertObject, load_torch_file

PickledState: TypeAlias = dict[str, Any]
"""Content of a file of DeepSpeed or SAT, read by the restricted unpickler."""

OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
SHARDED_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")

DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Names in the pickles of DeepSpeed's optimizer states. They are read as inert objects."""

AGAIN = "Copy every file of the checkpoint again; all ranks write to it."
_LAYOUT = "A DeepSpeed checkpoint is a folder with latest, or its global_step<N> folder."
_AS_STORED = "Use the weights as stored (masters=bf16)."


def latest_step_folder(folder: Path) -> Path:
    """Return the folder of one step: the one that ``latest`` in ``folder`` names, or ``folder`` itself without
    ``latest``.

    Raises :class:`CheckpointError` if ``latest`` is unreadable or names no folder beside it.
    """
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{latest} cannot be read: {error}", "It must hold one word, the name of a folder beside it."
        ) from error
    if not tag or Path(tag).name != tag or tag == "..":
        raise CheckpointError(
            f"{latest} names no folder beside it: {tag[:60]!r}.",
            "It must hold one word, such as 500 or global_step500.",
        )
    if not (folder / tag).is_dir():
        beside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise CheckpointError(
            f"{latest} names {tag}, and {folder / tag} does not exist.",
            f"Folders beside it: {', '.join(beside[:8]) or 'none'}. Give one of them, or copy {tag}.",
        )
    return folder / tag


def has_optimizer_states(folder: Path) -> bool:
    """Return whether a step's folder holds ZeRO's optimizer states, which hold the fp32 master weights."""
    return any(OPTIMIZER.fullmatch(path.name) for path in folder.iterdir())


def check_part(folder: Path, part: int | None) -> int:
    """Return the model-parallel part to read. Raises :class:`CheckpointError` for a folder that is no DeepSpeed
    checkpoint.

    ``part`` may be ``None`` only if the checkpoint has one part.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder.", _LAYOUT)
    names = [path.name for path in folder.iterdir()]
    parts = {
        int(match[1]) for name in names if (match := re.search(r"mp_rank_(\d+)_(?:model|optim)_states\.pt$", name))
    }
    if not parts:
        raise CheckpointError(
            f"{folder} holds no mp_rank_00_model_states.pt. It holds {', '.join(sorted(names)[:8]) or 'nothing'}.",
            _LAYOUT,
        )
    if any(name.startswith("expp_rank_") for name in names):
        raise CheckpointError(f"{folder} is of a mixture of experts, which cogflow does not read.")
    if part is None and parts != {0}:
        raise CheckpointError(
            f"{folder} has {len(parts)} model-parallel parts.", "Give the folder, so that all parts are joined."
        )
    return part or 0


def rank_files(folder: Path, pattern: re.Pattern[str], part: int) -> list[Path]:
    """Return one file per rank, ordered by rank. Raises :class:`CheckpointError` if a rank has no file or two files."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or int(match[2]) != part:
            continue
        rank = int(match[1])
        if rank in found:
            raise CheckpointError(
                f"{folder} holds two files of one rank: {found[rank].name} and {path.name}.", "Remove the older one."
            )
        found[rank] = path
    if found and set(found) != set(range(max(found) + 1)):
        missing = sorted(set(range(max(found) + 1)) - found.keys())
        example = found[max(found)].name
        raise CheckpointError(
            f"{folder} lacks the files of ranks {', '.join(map(str, missing[:8]))}; the last rank's file is {example}.",
            AGAIN,
        )
    return [found[rank] for rank in sorted(found)]


def read_state_file(path: Path) -> PickledState:
    """Return the content of one of DeepSpeed's state files. Raises :class:`CheckpointError` if it is no dictionary."""
    content = load_torch_file(path, RANDOM_STATES + DEEPSPEED_CLASSES)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not DeepSpeed's states.", AGAIN)
    return content


def read_optimizer_state(path: Path) -> PickledState:
    """Return ``optimizer_state_dict`` of an optimizer state file. Raises :class:`CheckpointError` if there is none."""
    state = read_state_file(path).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no optimizer_state_dict.", AGAIN)
    return state


def zero_stage(state: PickledState, path: Path) -> int:
    """Return the ZeRO stage (1, 2 or 3) that wrote an optimizer state. Raises :class:`CheckpointError` for another."""
    stage = state.get("zero_stage")
    if isinstance(stage, InertObject) and stage.args:
        stage = stage.args[0]
    if stage is None and "single_partition_of_fp32_groups" in state:
        return 1  # DeepSpeed's BF16_Optimizer, used with stage 1, stores no stage
    if stage not in (1, 2, 3):
        raise CheckpointError(f"{path} is of ZeRO stage {stage}; cogflow reads 1, 2 and 3.", _AS_STORED)
    return int(stage)


def flat_groups(value: Any, path: Path) -> list[torch.Tensor]:
    """Return one rank's flat vector of each parameter group. Raises :class:`CheckpointError` if there is none."""
    groups = [value] if isinstance(value, torch.Tensor) else value
    if (
        not isinstance(groups, (list, tuple))
        or not groups
        or not all(isinstance(flat, torch.Tensor) for flat in groups)
    ):
        raise CheckpointError(f"{path} holds no flat groups of master weights.", _AS_STORED)
    return [flat.detach().reshape(-1) for flat in groups]


def adam_moments(state: PickledState, name: str, path: Path) -> tuple[list[torch.Tensor], int]:
    """Return one rank's flat vectors of Adam's moment ``name`` per parameter group, and Adam's number of updates.

    Raises :class:`CheckpointError` if a group has no such moment.
    """
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    by_group = base.get("state") if isinstance(base, dict) else None
    if not isinstance(by_group, dict) or not all(
        isinstance(group, dict) and isinstance(group.get(name), torch.Tensor) for group in by_group.values()
    ):
        raise CheckpointError(
            f"{path} holds no {name} of Adam for each of its groups.", "Check that Adam or AdamW wrote the checkpoint."
        )
    groups = [by_group[number] for number in sorted(by_group)]
    return flat_groups([group[name] for group in groups], path), int(groups[0].get("step", 0))
