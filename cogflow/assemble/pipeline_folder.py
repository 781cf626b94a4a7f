"""Write a pipeline folder from checked components. Weights are never loaded: they are reflinks or hard links, or else copies."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from cogflow.assemble.card_context import CardContext, take_along
from cogflow.assemble.component_hashes import hash_parts
from cogflow.assemble.components import CONFIGS, WEIGHTS, PipelineComponent
from cogflow.assemble.config_overrides import config_text
from cogflow.assemble.model_card import card
from cogflow.errors import QualityGateError
from cogflow.files.atomic_write import require_space, write_json, write_text
from cogflow.files.hashing import hash_file
from cogflow.files.linking import can_link, place_file
from cogflow.files.publish import publish_folder
from cogflow.runtime.progress import progress

LIBRARY = {
    "transformer": "diffusers",
    "vae": "diffusers",
    "scheduler": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
}
Check = Callable[[Path], dict[str, Any]]


def assemble(
    output: Path, parts: Mapping[str, PipelineComponent], expected: Mapping[str, Any], samples: Mapping[str, Any], check: Check, *,
    link: str = "auto", hashes: Mapping[Path, str] | None = None, story: CardContext | None = None, told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Publish ``parts`` as the pipeline folder ``output``; returns its assembly.json. An earlier one is replaced at the end.

    ``expected``: the facts the parts were checked against. ``samples``: how to sample, for the model card (height, width, frames, fps,
    steps, guidance_scale, use_dynamic_cfg, dtype). ``check`` is given the unpublished folder and returns what it found; when it raises
    :class:`QualityGateError` the folder is kept as ``<output>.rejected`` and nothing is published. ``link``: how weights get there, one
    of :data:`cogflow.files.linking.MODES`; ``hashes``: their sha256 by path, where known. ``story``: of the training, for the card.
    ``told``: more for assembly.json. Memory: a few MiB; weights are never loaded.
    """
    hashes = hash_parts(parts)[0] if hashes is None else hashes
    require_space(output, _bytes_of_copies(parts, output, link))
    known: dict[str, str] = {}
    with publish_folder(output, replace=True, known=known) as partial:
        components = _place_parts(parts, partial, link, hashes, known)
        write_json(partial / "model_index.json", model_index(parts))
        forced = {"forced": expected["forced"]} if expected.get("forced") else {}
        assembly: dict[str, Any] = {
            "components": components,
            "made": parts["transformer"].made,
            "checked_against": {key: value for key, value in expected.items() if key not in ("forced", "not_needed")},
            **forced,
            "sampling": dict(samples),
            **(told or {}),
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
        write_text(partial / "README.md", card(output.name, parts, assembly, samples, take_along(story, partial)))
    return assembly


def rejected_folder(output: Path) -> Path:
    return output.parent / f"{output.name}.rejected"


def model_index(parts: Mapping[str, PipelineComponent]) -> dict[str, Any]:
    """What ``from_pretrained`` of diffusers reads: the pipeline's class, and library and class of each component."""
    return {
        "_class_name": pipeline_class(parts),
        "_diffusers_version": diffusers.__version__,
        **{name: [LIBRARY[name], part.class_name] for name, part in sorted(parts.items())},
    }


def pipeline_class(parts: Mapping[str, PipelineComponent]) -> str:
    from_image = parts["transformer"].settings.get("in_channels") != parts["vae"].settings.get("latent_channels")
    return "CogVideoXImageToVideoPipeline" if from_image else "CogVideoXPipeline"


def _place_parts(
    parts: Mapping[str, PipelineComponent], partial: Path, link: str, hashes: Mapping[Path, str], known: dict[str, str]
) -> dict[str, Any]:
    """Every file of every component in its place: class, origin, how the weights got there, hash and size of each file, and set values."""
    copies = _bytes_of_copies(parts, partial / "model_index.json", link)
    components = {}
    with progress(copies, "copied", unit="bytes") if copies else contextlib.nullcontext() as bar:

        def advance(count: int, name: str) -> None:
            if bar is not None:
                bar.advance(count, note=name)

        for name, part in sorted(parts.items()):
            (partial / name).mkdir()
            files, ways = {}, set()
            for file, source in sorted(part.files.items()):
                target = partial / name / file
                if file == CONFIGS[name] and part.set:
                    write_text(target, config_text(part))
                    sha256 = hash_file(target)
                elif file.endswith(WEIGHTS):
                    ways.add(place_file(source, target, link, hashes[source], advance))
                    sha256 = hashes[source]
                else:
                    # Small files are copied, so that an edit of a config here never changes the place it came from.
                    shutil.copyfile(source, target)
                    sha256 = hash_file(target)
                files[file] = {"sha256": sha256, "bytes": target.stat().st_size}
                known[f"{name}/{file}"] = sha256
            components[name] = {"class": part.class_name, "from": str(part.folder.absolute()), "files": files}
            if ways:
                components[name]["link"] = ", ".join(sorted(ways))
            if part.set:
                components[name]["set"] = {
                    key: {"before": before, "now": now} for key, (before, now) in part.set.items()
                }
    return components


def _bytes_of_copies(parts: Mapping[str, PipelineComponent], output: Path, link: str) -> int:
    """Bytes of weights that cannot be linked, or shall not be."""
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    linked: dict[int, bool] = {}
    total = 0
    for path in (path for part in parts.values() for name, path in part.files.items() if name.endswith(WEIGHTS)):
        facts = path.stat()
        if link == "auto" and facts.st_dev not in linked:
            linked[facts.st_dev] = can_link(path, folder)
        total += facts.st_size if link == "copy" or (link == "auto" and not linked[facts.st_dev]) else 0
    return total


def _reject(partial: Path, output: Path) -> Path:
    rejected = rejected_folder(output)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(rejected)
    os.rename(partial, rejected)
    return rejected
