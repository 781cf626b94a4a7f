"""Find the transformer that an export starts from, and verify its files before any of them is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogflow.errors import CheckpointError, ConfigError, format_list
from cogflow.files.hashing import hash_file
from cogflow.files.manifest import MANIFEST, check_manifest
from cogflow.weights.tensor_source import contained_file, read_json

STEP = re.compile(r"step-(\d+)$")
TRAINER = "trainer.json"


@dataclass(frozen=True)
class TransformerSource:
    """A transformer folder and what is known of it.

    ``folder`` holds config.json and the safetensors; ``origin`` is the checkpoint, or ``folder`` itself. ``weights`` is model or
    ema. ``trainer`` is the checkpoint's trainer.json (empty when there is none). ``files``: relative name -> sha256.
    """

    folder: Path
    origin: Path
    weights: str
    step: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)


def find_source(place: Path, weights: str) -> TransformerSource:
    """The source at ``place``: a run, a checkpoint, a transformer folder, or a folder with ``transformer/`` in it.

    Of a run the newest checkpoint that is whole is taken; broken newer ones are listed in ``passed_over``. ``weights``:
    auto (EMA where there is one), model or ema. Raises :class:`CheckpointError` naming what is missing or broken.
    """
    if weights not in ("auto", "model", "ema"):
        raise ConfigError(f"stage.weights={weights} is unknown.", "Choose auto, model or ema.")
    place = Path(place).expanduser()
    if not place.exists():
        raise CheckpointError(
            f"{place} does not exist.", "stage.source is a run, a checkpoint or a diffusers transformer folder."
        )
    if (place / "checkpoints").is_dir():
        return _newest(place / "checkpoints", weights)
    if (place / TRAINER).is_file() or STEP.search(place.name):
        return _checkpoint(place, weights)
    return _plain(place, weights)


def _newest(folder: Path, weights: str) -> TransformerSource:
    found = {int(match[1]): path for path in folder.iterdir() if path.is_dir() and (match := STEP.match(path.name))}
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint.", "Train first: python -m cogflow stage=train")
    broken: list[str] = []
    for step in sorted(found, reverse=True):
        problems = check_manifest(found[step])
        if not problems:
            return _checkpoint(found[step], weights, verified=True, passed_over=broken)
        broken += [f"{found[step].name}/{problem}" for problem in problems]
    raise CheckpointError(
        f"No checkpoint in {folder} is whole:\n{format_list(broken)}", "Train again, or bring the files back."
    )


def _checkpoint(
    folder: Path, weights: str, *, verified: bool = False, passed_over: list[str] | None = None
) -> TransformerSource:
    problems = [] if verified else check_manifest(folder)
    if problems:
        raise CheckpointError(
            f"The checkpoint {folder} is not as it was saved:\n{format_list(problems)}",
            "Take another checkpoint, or bring the files back.",
        )
    trainer = read_json(folder / TRAINER)
    chosen = weights if weights != "auto" else "ema" if (folder / "ema").is_dir() else "model"
    part = "ema" if chosen == "ema" else "transformer"
    if not (folder / part / "config.json").is_file():
        hint = (
            "It was trained without EMA; use stage.weights=model."
            if part == "ema"
            else "It was saved by another program?"
        )
        raise CheckpointError(f"{folder} holds no {part}/config.json.", hint)
    manifest = read_json(folder / MANIFEST)["files"]
    files = {
        name: entry["sha256"] for name, entry in manifest.items() if name.startswith(f"{part}/") or name == TRAINER
    }
    step = trainer.get("step")
    return TransformerSource(
        folder / part, folder, chosen, step if isinstance(step, int) else None, trainer, files, passed_over or []
    )


def _plain(place: Path, weights: str) -> TransformerSource:
    """A component folder: no manifest is needed, but one that is there must hold. A former export passes on what it knew."""
    if weights == "ema":
        raise CheckpointError(
            f"{place} holds no EMA weights.", "stage.weights=ema needs a checkpoint trained with stage.ema_decay."
        )
    folder = place if (place / "config.json").is_file() else place / "transformer"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{place} is neither a run, nor a checkpoint, nor a transformer folder: config.json is missing.",
            "A run has checkpoints/, a checkpoint has trainer.json and transformer/, a transformer folder config.json and safetensors.",
        )
    for published in (place, folder.parent):
        if (published / MANIFEST).is_file() and (problems := check_manifest(published)):
            raise CheckpointError(
                f"{published} is not as it was published:\n{format_list(problems)}", "Export it again."
            )
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors") and path.name != MANIFEST
    )
    files = {name: hash_file(contained_file(folder, name)) for name in names}
    former = read_json(folder.parent / "export.json") if (folder.parent / "export.json").is_file() else {}
    trainer = {key: former[key] for key in ("family", "model", "trained_with") if former.get(key) is not None}
    step = former.get("step")
    return TransformerSource(
        folder, folder, str(former.get("weights") or "model"), step if isinstance(step, int) else None, trainer, files
    )
