"""A pipeline folder comes from anywhere: what is code in it, asks for code, or names files outside of it is refused before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cogflow.errors import PipelineError
from cogflow.files.record_io import ForeignObject

CONFIGS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
"""Component -> the file that says what it is."""
ASKS = ("auto_map", "custom_pipeline", "trust_remote_code")
LIBRARIES = ("diffusers", "transformers", None)


def refuse_code(folder: Path) -> None:
    """Raise :class:`PipelineError` that names everything in a pipeline ``folder`` that could run code or read files elsewhere."""
    problems = [f"{path.name} in {folder} is code" for path in sorted(folder.glob("*.py*"))]
    index = _json(folder / "model_index.json")
    problems += asks_for_code(folder, index)
    for name, entry in sorted(index.items()):
        if isinstance(entry, list) and name[:1] != "_" and entry and entry[0] not in LIBRARIES:
            problems.append(
                f"{folder / 'model_index.json'} takes {name} from {entry[0]!r}, not from {LIBRARIES[0]} or {LIBRARIES[1]}"
            )
    for name, file in CONFIGS.items():
        if (folder / name).is_dir():
            problems += code_in(folder / name, _json(folder / name / file)) + _leading_out(folder / name)
    if problems:
        raise PipelineError(
            f"{folder} is not loaded:\n  " + "\n  ".join(problems[:10]),
            "A pipeline folder holds configs, vocabularies and safetensors; remove what else is there, or take the official folder.",
        )


def code_in(folder: Path, config: ForeignObject) -> list[str]:
    """What in a component's folder, or asked for by its ``config``, is code."""
    return [
        f"{path.relative_to(folder)} in {folder} is code" for path in sorted(folder.rglob("*.py*"))
    ] + asks_for_code(folder, config)


def asks_for_code(folder: Path, config: ForeignObject) -> list[str]:
    found = [f"{folder} asks for code of its own ({key})" for key in ASKS if config.get(key)]
    if isinstance(config.get("_class_name"), list):
        found.append(f"{folder} names a class in a code file: {config['_class_name']}")
    return found


def _leading_out(folder: Path) -> list[str]:
    """Shards that an index names outside of its own folder; the libraries that load them do not look."""
    found = []
    for path in sorted(folder.glob("*.index.json")):
        shards = _json(path).get("weight_map")
        for shard in sorted({str(shard) for shard in shards.values()} if isinstance(shards, dict) else ()):
            if len(PurePosixPath(shard).parts) != 1 or len(PureWindowsPath(shard).parts) != 1 or shard in ("..", "."):
                found.append(f"{path} names {shard}, which does not lie beside it")
    return found


def _json(path: Path) -> dict[str, Any]:
    """Empty for a file that is missing or no JSON object: whoever loads it will say so."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
