"""Write a pipeline folder from checked components. Weights are never loaded: they are hard links where possible, else copies."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from cogflow.errors import QualityGateError
from cogflow.files.manifest import hash_file
from cogflow.files.publish import publish_folder, require_space, write_json, write_text
from cogflow.pipeline.card import card
from cogflow.pipeline.parts import WEIGHTS, Part

LIBRARY = {
    "transformer": "diffusers",
    "vae": "diffusers",
    "scheduler": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
}
Check = Callable[[Path], dict[str, Any]]


def assemble(
    output: Path, parts: Mapping[str, Part], expected: Mapping[str, Any], samples: Mapping[str, Any], check: Check
) -> dict[str, Any]:
    """Publish ``parts`` as the pipeline folder ``output``; returns its assembly.json. An earlier one is replaced at the end.

    ``expected``: the facts the parts were checked against. ``samples``: how to sample, for the model card (height, width,
    frames, fps, steps, guidance_scale, use_dynamic_cfg, dtype). ``check`` is given the unpublished folder and returns what it
    found; when it raises :class:`QualityGateError` the folder is kept as ``<output>.rejected`` and nothing is published.
    """
    require_space(output, sum(_weight_of_copies(part, output) for part in parts.values()))
    with publish_folder(output, replace=True) as partial:
        components = {name: _place(part, partial / name) for name, part in sorted(parts.items())}
        write_json(partial / "model_index.json", model_index(parts))
        assembly: dict[str, Any] = {
            "components": components,
            "made": parts["transformer"].made,
            "checked_against": dict(expected),
            "sampling": {key: value for key, value in samples.items() if key != "text"},
            "diffusers": diffusers.__version__,
        }
        write_json(partial / "assembly.json", assembly)
        try:
            assembly["verify"] = check(partial)
        except QualityGateError as error:
            assembly["verify"] = {"status": "failed", "message": error.message}
            write_json(partial / "assembly.json", assembly)
            error.hint += f" The folder is kept apart as {_reject(partial, output)}."
            raise
        write_json(partial / "assembly.json", assembly)
        write_text(partial / "README.md", card(output.name, parts, assembly, samples))
    return assembly


def rejected_folder(output: Path) -> Path:
    return output.parent / f"{output.name}.rejected"


def model_index(parts: Mapping[str, Part]) -> dict[str, Any]:
    """What ``from_pretrained`` of diffusers reads: the pipeline's class, and library and class of each component."""
    return {
        "_class_name": pipeline_class(parts),
        "_diffusers_version": diffusers.__version__,
        **{name: [LIBRARY[name], part.class_name] for name, part in sorted(parts.items())},
    }


def pipeline_class(parts: Mapping[str, Part]) -> str:
    from_image = parts["transformer"].settings.get("in_channels") != parts["vae"].settings.get("latent_channels")
    return "CogVideoXImageToVideoPipeline" if from_image else "CogVideoXPipeline"


def _place(part: Part, folder: Path) -> dict[str, Any]:
    """Fill ``folder`` with the files of ``part``; returns where they came from and their hashes."""
    folder.mkdir()
    files = {}
    for name, source in sorted(part.files.items()):
        target = folder / name
        # Small files are copied, so that an edit of a config here never changes the place it came from.
        if not (name.endswith(WEIGHTS) and _linked(source, target)):
            shutil.copyfile(source, target)
        files[name] = {"sha256": hash_file(target), "bytes": target.stat().st_size}
    return {"class": part.class_name, "from": str(part.folder.absolute()), "files": files}


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links, or a file of another owner
        return False
    return True


def _weight_of_copies(part: Part, output: Path) -> int:
    """Bytes that cannot be linked."""
    existing = next(parent for parent in output.absolute().parents if parent.is_dir())
    device = existing.stat().st_dev
    return sum(path.stat().st_size for path in part.files.values() if path.stat().st_dev != device)


def _reject(partial: Path, output: Path) -> Path:
    rejected = rejected_folder(output)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(rejected)
    os.rename(partial, rejected)
    return rejected
