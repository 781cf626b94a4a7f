"""Refuse a pipeline folder that holds code, asks for code or names files outside of it, before it is loaded.

Pipeline folders are untrusted input.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from cogflow.errors import PipelineError
from cogflow.files.bounded_parsing import large_values, read_json_object
from cogflow.files.record_io import ForeignObject

CONFIGS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
"""Component -> the file that defines it."""
ASKS = ("auto_map", "custom_pipeline", "trust_remote_code")
"""Config keys that make a library run code from the folder."""
LIBRARIES = ("diffusers", "transformers", None)
"""Libraries from which ``model_index.json`` may take a component."""


def refuse_code(folder: Path) -> None:
    """Raise :class:`PipelineError` for anything in ``folder`` that could run code or read files outside of it.

    ``folder`` is a pipeline folder. The message lists the first ten problems.
    """
    problems = [f"{path.name} in {folder} is code" for path in sorted(folder.glob("*.py*"))]
    index = read_json_object(folder / "model_index.json")
    problems += asks_for_code(folder, index)
    for name, entry in sorted(index.items()):
        if isinstance(entry, list) and name[:1] != "_" and entry and entry[0] not in LIBRARIES:
            problems.append(
                f"{folder / 'model_index.json'} takes {name} from {entry[0]!r}, "
                f"not from {LIBRARIES[0]} or {LIBRARIES[1]}"
            )
    for name, file in CONFIGS.items():
        if (folder / name).is_dir():
            problems += code_in(folder / name, read_json_object(folder / name / file))
            problems += _shards_outside(folder / name)
    if problems:
        raise PipelineError(
            f"{folder} is not loaded:\n  " + "\n  ".join(problems[:10]),
            "A pipeline folder holds configs, vocabularies and safetensors. "
            "Remove everything else, or use the official folder.",
        )


def code_in(folder: Path, config: ForeignObject) -> list[str]:
    """Return one line for each code file and adapter in a component's folder, and for each request for code and each
    number beyond all models in its ``config``.
    """
    found = [f"{path.relative_to(folder)} in {folder} is code" for path in sorted(folder.rglob("*.py*"))]
    found += [
        f"{path.name} in {folder} is an adapter, which the libraries apply and whose base model they follow"
        for path in sorted(folder.glob("adapter_*"))
    ]
    found += [f"{folder}: {problem}" for problem in large_values(config)]
    return found + asks_for_code(folder, config)


def asks_for_code(folder: Path, config: ForeignObject) -> list[str]:
    """Return one line for each entry of ``config`` that makes a library run code from ``folder``."""
    found = [f"{folder} asks for code of its own ({key})" for key in ASKS if config.get(key)]
    if isinstance(config.get("_class_name"), list):
        found.append(f"{folder} names a class in a code file: {config['_class_name']}")
    return found


def _shards_outside(folder: Path) -> list[str]:
    """Return one line for each shard that an index names outside of its own folder.

    The libraries that load the shards do not check this.
    """
    found = []
    for path in sorted(folder.glob("*.index.json")):
        shards = read_json_object(path).get("weight_map")
        for shard in sorted({str(shard) for shard in shards.values()} if isinstance(shards, dict) else ()):
            if len(PurePosixPath(shard).parts) != 1 or len(PureWindowsPath(shard).parts) != 1 or shard in ("..", "."):
                found.append(f"{path} names {shard}, which does not lie beside it")
    return found
