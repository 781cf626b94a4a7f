"""The weights in a ``.pt``, ``.bin`` or ``.ckpt`` file, as SAT, DeepSpeed and others write them. See :mod:`cogflow.weights.unpickle`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import CheckpointError
from cogflow.weights.reader import TensorInfo, listed
from cogflow.weights.unpickle import load

WRAPPERS = ("module", "model", "state_dict")
"""Keys that weights are found under: DeepSpeed and SAT; many trainers; Lightning and the published 3d-vae.pt."""

_BESIDE = {"param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params", "buffer_names"}
"""DeepSpeed's notes on the weights themselves: lists of names, and weights a second time."""

_SMALL = 4096
"""Characters of JSON up to which a plain value counts as metadata; Python's random state has more."""


class TorchFile:
    """The tensors of one file, by name; ``read`` gives them as stored, mapped from the file.

    ``wrapper`` says what was unwrapped: ``none``, a key (``module``), keys in a row (``state_dict/module``); ``*`` is appended
    for a ``module.`` before every name (``module/module.*``), which is taken off. ``metadata``: the small plain values beside the
    weights (``iteration``, ``global_steps``, ``ds_version``, ``mp_world_size``, ...) and the wrapper.

    Raises :class:`CheckpointError`; see :func:`cogflow.weights.unpickle.load` for what files can be.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._set(load(self.path))

    def _set(self, content: Any) -> None:
        values, wrapper, beside = unwrap(content, self.path)
        self._values = {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tuple(value.shape), value.dtype, self.path) for name, value in self._values.items()
        }
        odd = [
            f"{name}: {value.layout}"
            for name, value in self._values.items()
            if value.layout != torch.strided or value.is_meta
        ]
        odd += [f"{name}: quantized" for name, value in self._values.items() if value.is_quantized]
        if odd:
            raise CheckpointError(
                f"{self.path} holds tensors that cogflow does not read:\n{listed(odd)}", "Save them as plain tensors."
            )
        self.wrapper = wrapper
        rest = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        self.metadata: dict[str, Any] = {**plain_values(beside | rest), "wrapper": wrapper}

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored. Several may share storage, some may be views that are not contiguous."""
        return self._values[name]


def unwrap(content: Any, path: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(the innermost state dict, what was unwrapped, what lay beside it), from what a file holds. Raises :class:`CheckpointError`."""
    words: list[str] = []
    beside: dict[str, Any] = {}
    while True:
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.", _EXPECTED)
        inside = [key for key in WRAPPERS if isinstance(content.get(key), Mapping) and _any_tensor(content[key])]
        if not inside:
            break
        if len(inside) > 1:
            raise CheckpointError(
                f"{path} holds weights under {' and '.join(inside)}: which are meant is unclear.",
                "Save the ones you mean alone.",
            )
        beside |= {key: value for key, value in content.items() if key != inside[0]}
        words.append(inside[0])
        content = content[inside[0]]
    names = [name for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)]
    if not names:
        inside = [f"{key!r}: {type(value).__name__}" for key, value in content.items()]
        raise CheckpointError(
            f"{path} holds no tensors by name. It holds:\n{listed(inside, 8)}" if inside else f"{path} is {{}}.",
            _EXPECTED,
        )
    strange = [repr(key) for key in content if not isinstance(key, str)]
    if strange:
        raise CheckpointError(f"{path} names tensors by what is no text: {', '.join(strange[:5])}.", _EXPECTED)
    values = dict(content)
    if all(name.startswith("module.") for name in names):
        values = {name.removeprefix("module."): value for name, value in values.items()}
        words.append("module.*")
    return values, "/".join(words) or "none", beside


_EXPECTED = f"Expected are tensors by name, alone or under one of {', '.join(WRAPPERS)}."


def _any_tensor(value: Mapping[Any, Any]) -> bool:
    """Whether there is a tensor in a dictionary, or under a wrapper in it."""
    return any(isinstance(item, torch.Tensor) for item in value.values()) or any(
        isinstance(value.get(key), Mapping) and _any_tensor(value[key]) for key in WRAPPERS
    )


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that JSON can hold and that are small."""
    kept = {}
    for name, value in values.items():
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            continue
        if value is not None and isinstance(name, str) and name not in _BESIDE and len(text) <= _SMALL:
            kept[name] = value
    return kept
