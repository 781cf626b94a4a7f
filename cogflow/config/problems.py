"""Collect the mistakes of a command line, find the name that was probably meant, and raise all mistakes at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
"""Names of other trainers for settings of cogflow, where the spelling is too different to find them."""


@dataclass(frozen=True)
class Problem:
    """One mistake. ``keys``: the dotted keys it concerns; a problem of a key that already has one is not reported."""

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
    """Return the known name that ``name`` most resembles, or ``None``. ``cutoff``: lowest similarity, as in
    ``difflib``."""
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
    """Return the known dotted key that ``key`` most resembles, or ``None``.

    A key with the same last part is preferred, then a similar name in the same section, then a similar key anywhere.
    """
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
    """Return the question that ends a message, empty without a name."""
    return f" Did you mean {name}?" if name else ""


def format_value(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(format_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{format_value(item)}" for name, item in value.items()) + "}"
    return str(value)
