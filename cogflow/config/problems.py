"""What is wrong with a config: collected, then raised together, each with the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cogflow.errors import ConfigError

ALIASES = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "micro_batch_size": "batch_size",
    "grad_accum": "gradient_accumulation",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_steps": "steps",
    "train_steps": "steps",
    "max_grad_norm": "gradient_clipping",
    "clip": "gradient_clipping",
    "wd": "weight_decay",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "cfg": "guidance_scale",
    "validation_steps": "sample_every",
    "checkpointing_steps": "save_every",
    "colors": "colours",
}
"""Names that other trainers use for ours and that spelling alone would not find."""


@dataclass(frozen=True)
class Problem:
    """``keys`` are the dotted keys it is about; a problem that follows from another key's problem is left out."""

    text: str
    keys: tuple[str, ...] = ()


def fail(problems: Sequence[Problem], hint: str = "") -> None:
    """Raise one :class:`ConfigError` with all ``problems``; do nothing when there are none."""
    if not problems:
        return
    lines = list(dict.fromkeys(problem.text for problem in problems))
    if len(lines) == 1:
        raise ConfigError(lines[0], hint)
    raise ConfigError(
        f"{len(lines)} problems in the configuration:\n" + "\n".join(f"  - {line}" for line in lines), hint
    )


def nearest(name: str, known: Iterable[str], cutoff: float = 0.55) -> str | None:
    """The known name that ``name`` was probably meant to be; ``cutoff`` is the least share of letters in common."""
    known = list(known)
    if ALIASES.get(name) in known:
        return ALIASES[name]
    folded = {item.lower().replace("-", "_"): item for item in known}
    wanted = name.lower().replace("-", "_")
    close = difflib.get_close_matches(wanted, folded, n=1, cutoff=cutoff)
    if close:
        return folded[close[0]]
    longer = [
        item for key, item in folded.items() if len(wanted) > 2 and (key.startswith(wanted) or wanted.startswith(key))
    ]
    return longer[0] if len(longer) == 1 else None


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """As :func:`nearest` for dotted keys: the same last part elsewhere, else a near one beside it, else a near whole."""
    known = list(known)
    head, _, last = key.rpartition(".")
    elsewhere = [item for item in known if item.rpartition(".")[2] in (last, ALIASES.get(last))]
    beside = [item for item in elsewhere if item.startswith(f"{head}.")] if head else []
    if beside or elsewhere:
        return (beside or sorted(elsewhere, key=lambda item: (not item.startswith("stage."), len(item))))[0]
    siblings = {item.rpartition(".")[2]: item for item in known if item.rpartition(".")[0] == head}
    name = nearest(last, siblings)
    if name:
        return siblings[name]
    lasts = {item.rpartition(".")[2]: item for item in known}
    return nearest(key, known) or (lasts[found] if (found := nearest(last, lasts)) else None)


def did_you_mean(name: str | None) -> str:
    return f" Did you mean {name}?" if name else ""
