"""The files of a DeepSpeed checkpoint: which rank wrote which, and what lies in them. See :mod:`cogflow.weights.zero`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import CheckpointError
from cogflow.weights.unpickle import RANDOM_STATES, Inert, load

OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
SHARDED_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")

DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What its optimizer states are pickled with; none of it is built."""

AGAIN = "Copy every file of the checkpoint again; all ranks write to it."


def tagged(folder: Path) -> Path:
    """The folder of one step: ``folder`` itself, or the one that its ``latest`` names. :class:`CheckpointError`."""
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{latest} cannot be read: {error}", "It holds one word, the name of a folder beside it."
        ) from error
    if not tag or Path(tag).name != tag or tag == "..":
        raise CheckpointError(
            f"{latest} names no folder beside it: {tag[:60]!r}.", "It holds one word, such as 500 or global_step500."
        )
    if not (folder / tag).is_dir():
        beside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise CheckpointError(
            f"{latest} names {tag}, and {folder / tag} does not exist.",
            f"Folders beside it: {', '.join(beside[:8]) or 'none'}. Give the one you mean, or copy {tag}.",
        )
    return folder / tag


def has_masters(folder: Path) -> bool:
    """Whether a step's folder holds ZeRO's optimizer states."""
    return any(OPTIMIZER.fullmatch(path.name) for path in folder.iterdir())


def choose_part(folder: Path, part: int | None) -> int:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder.", "A DeepSpeed checkpoint is a folder with latest, or its global_step<N>."
        )
    names = [path.name for path in folder.iterdir()]
    parts = {
        int(match[1]) for name in names if (match := re.search(r"mp_rank_(\d+)_(?:model|optim)_states\.pt$", name))
    }
    if not parts:
        raise CheckpointError(
            f"{folder} holds no mp_rank_00_model_states.pt. It holds {', '.join(sorted(names)[:8]) or 'nothing'}.",
            "A DeepSpeed checkpoint is a folder with latest, or its global_step<N>.",
        )
    if any(name.startswith("expp_rank_") for name in names):
        raise CheckpointError(f"{folder} is of a mixture of experts, which cogflow does not read.")
    if part is None and parts != {0}:
        raise CheckpointError(
            f"{folder} has {len(parts)} model-parallel parts.", "Give the folder, so that all are joined."
        )
    return part or 0


def of_ranks(folder: Path, pattern: re.Pattern[str], part: int) -> list[Path]:
    """One file per rank, in order. :class:`CheckpointError` when one is missing, or there twice."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or int(match[2]) != part:
            continue
        rank = int(match[1])
        if rank in found:
            raise CheckpointError(
                f"{folder} holds {found[rank].name} and {path.name}: two files of one rank.",
                "Remove the one that is old.",
            )
        found[rank] = path
    if found and set(found) != set(range(max(found) + 1)):
        missing = sorted(set(range(max(found) + 1)) - found.keys())
        example = found[max(found)].name
        raise CheckpointError(
            f"{folder} lacks the files of ranks {', '.join(map(str, missing[:8]))}, such as {example} of its last.",
            AGAIN,
        )
    return [found[rank] for rank in sorted(found)]


def read_states(path: Path) -> dict[str, Any]:
    content = load(path, RANDOM_STATES + DEEPSPEED)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not DeepSpeed's states.", AGAIN)
    return content


def optimizer_state(path: Path) -> dict[str, Any]:
    state = read_states(path).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no optimizer_state_dict.", AGAIN)
    return state


def zero_stage(state: dict[str, Any], path: Path) -> int:
    stage = state.get("zero_stage")
    if isinstance(stage, Inert) and stage.args:
        stage = stage.args[0]
    if stage is None and "single_partition_of_fp32_groups" in state:
        return 1  # DeepSpeed's BF16_Optimizer, used with stage 1, names none
    if stage not in (1, 2, 3):
        raise CheckpointError(
            f"{path} is of ZeRO stage {stage}; cogflow reads 1, 2 and 3.", "Take the weights as stored (masters=bf16)."
        )
    return int(stage)


def flat_groups(value: Any, path: Path) -> list[torch.Tensor]:
    groups = [value] if isinstance(value, torch.Tensor) else value
    if (
        not isinstance(groups, (list, tuple))
        or not groups
        or not all(isinstance(flat, torch.Tensor) for flat in groups)
    ):
        raise CheckpointError(
            f"{path} holds no flat groups of master weights.", "Take the weights as stored (masters=bf16)."
        )
    return [flat.detach().reshape(-1) for flat in groups]


def moments(state: dict[str, Any], name: str, path: Path) -> tuple[list[torch.Tensor], int]:
    """What Adam keeps as ``name`` of each flat group, and the updates it has counted. :class:`CheckpointError` when there is none."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    kept = base.get("state") if isinstance(base, dict) else None
    if not isinstance(kept, dict) or not all(
        isinstance(group, dict) and isinstance(group.get(name), torch.Tensor) for group in kept.values()
    ):
        raise CheckpointError(f"{path} holds no {name} of Adam for each of its groups.", "Another optimizer wrote it?")
    groups = [kept[number] for number in sorted(kept)]
    return flat_groups([group[name] for group in groups], path), int(groups[0].get("step", 0))
