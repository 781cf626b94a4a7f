"""Write a pipeline folder from checked components. Weights are placed as reflinks, hard links or copies, never
loaded.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers

from cogflow.artifacts.run_layout import ASSEMBLY, MODEL_INDEX
from cogflow.artifacts.working_run import enclosing_run
from cogflow.assemble.components import WEIGHTS_SUFFIX, PipelineComponent
from cogflow.assemble.consistency import ConsistencyResult
from cogflow.assemble.model_card import CardContext, card_text, collect_sections
from cogflow.assemble.stored_files import hash_components
from cogflow.errors import QualityGateError
from cogflow.files.atomic_write import require_space, write_json, write_text
from cogflow.files.contained_files import create_below, open_regular
from cogflow.files.hashing import hash_file
from cogflow.files.linking import can_link, is_copied, place_file
from cogflow.files.publish import FileHash, publish_folder
from cogflow.files.record_io import write_record
from cogflow.models.code_check import CONFIGS
from cogflow.records.pipeline_records import (
    AssembledComponent,
    AssemblyRecord,
    ChangedValue,
    PipelineSampling,
    VerifyRecord,
)
from cogflow.runtime.progress import progress

LIBRARY = {
    "transformer": "diffusers",
    "vae": "diffusers",
    "scheduler": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
}
"""Component -> library of its class."""


@dataclass(frozen=True)
class PipelinePlan:
    """The content of a pipeline folder.

    * ``checks``: the result of :func:`cogflow.assemble.consistency.check_components`.
    * ``sampling``: how to sample the pipeline, for the model card.
    * ``hashes``: sha256 by path of the components' files; computed when ``None``.
    * ``link``: how weights are placed, one of :data:`cogflow.files.linking.MODES`.
    """

    components: Mapping[str, PipelineComponent]
    checks: ConsistencyResult
    sampling: PipelineSampling
    hashes: Mapping[Path, str] | None = None
    link: str = "auto"
    card: CardContext = field(default_factory=CardContext)


def write_pipeline(output: Path, plan: PipelinePlan, verify: Callable[[Path], VerifyRecord]) -> AssemblyRecord:
    """Publish the pipeline folder ``output`` and return its assembly.json. An earlier folder is replaced at the end.

    ``verify`` gets the unpublished folder. When it raises :class:`QualityGateError`, nothing is published and the
    folder is kept as ``<output>.rejected``. Memory: a few MiB.
    """
    components = plan.components
    hashes = hash_components(components)[0] if plan.hashes is None else plan.hashes
    require_space(output, _bytes_to_copy(components, output, plan.link))
    known: dict[str, str] = {}
    with publish_folder(output, replace=True, known=known) as partial:
        placed = _place_components(components, partial, plan.link, hashes)
        known |= {f"{name}/{file}": entry.sha256 for name, one in placed.items() for file, entry in one.files.items()}
        write_json(partial / MODEL_INDEX, model_index(components))
        assembly = AssemblyRecord(
            components=placed,
            made=components["transformer"].training,
            checked_against=plan.checks.expected,
            sampling=plan.sampling,
            diffusers=diffusers.__version__,
            forced=plan.checks.forced or None,
        )
        write_record(partial / ASSEMBLY, assembly)
        try:
            assembly = replace(assembly, verify=verify(partial))
        except QualityGateError as error:
            failed = replace(assembly, verify=VerifyRecord("failed", message=error.message))
            write_record(partial / ASSEMBLY, failed)
            error.hint += f" The rejected folder is {_reject(partial, output)}."
            raise
        write_record(partial / ASSEMBLY, assembly)
        sections = collect_sections(plan.card, partial)
        write_text(partial / "README.md", card_text(output.name, components, assembly, sections))
    return assembly


def rejected_folder(output: Path) -> Path:
    """Return where a folder that failed its verification is kept."""
    return output.parent / f"{output.name}.rejected"


def model_index(components: Mapping[str, PipelineComponent]) -> dict[str, Any]:
    """Return model_index.json of diffusers: the class of the pipeline, and library and class of each component."""
    from_image = components["transformer"].from_image
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if from_image else "CogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        **{name: [LIBRARY[name], component.class_name] for name, component in sorted(components.items())},
    }


def _place_components(
    components: Mapping[str, PipelineComponent], partial: Path, link: str, hashes: Mapping[Path, str]
) -> dict[str, AssembledComponent]:
    """Place every file of every component in ``partial`` and return the records of the components."""
    to_copy = _bytes_to_copy(components, partial / MODEL_INDEX, link)
    with progress(to_copy, "copied", unit="bytes") if to_copy else contextlib.nullcontext() as bar:

        def advance(count: int, name: str) -> None:
            if bar is not None:
                bar.advance(count, note=name)

        return {
            name: _place_component(component, partial / name, link, hashes, advance)
            for name, component in sorted(components.items())
        }


def _place_component(
    component: PipelineComponent,
    folder: Path,
    link: str,
    hashes: Mapping[Path, str],
    advance: Callable[[int, str], None],
) -> AssembledComponent:
    folder.mkdir()
    files: dict[str, FileHash] = {}
    links: set[str] = set()
    shared: dict[str, str] = {}
    for name, source in sorted(component.files.items()):
        target = folder / name
        if name.endswith(WEIGHTS_SUFFIX):
            links.add(how := place_file(source, target, link, hashes[source], advance))
            if how == "hard":
                shared[name] = str(source)
            sha256 = hashes[source]
        else:
            # Small files are copied: an edit of a config here must not change the source.
            if name == CONFIGS[component.name] and component.overrides:
                write_text(target, component.config_text())
            else:
                with open_regular(source) as original, create_below(folder, name) as copy:
                    shutil.copyfileobj(original, copy)
            sha256 = hash_file(target)
        files[name] = FileHash(sha256, target.stat().st_size)
    changed = {key: ChangedValue(before, now) for key, (before, now) in component.overrides.items()}
    return AssembledComponent(
        class_name=component.class_name,
        origin=str(component.folder.absolute()),
        files=files,
        link=", ".join(sorted(links)) or None,
        shared=shared or None,
        changed=changed or None,
        run=component.training.run or _run_of(component.folder),
        line=component.training.line,
        step=component.training.step,
    )


def _run_of(folder: Path) -> str | None:
    run = enclosing_run(folder)
    return None if run is None else str(run.absolute())


def _bytes_to_copy(components: Mapping[str, PipelineComponent], output: Path, link: str) -> int:
    """Return the bytes of weights that cannot be linked, or are not."""
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    linkable: dict[int, bool] = {}
    total = 0
    for component in components.values():
        for path in (path for name, path in component.files.items() if name.endswith(WEIGHTS_SUFFIX)):
            status = path.stat()
            if is_copied(path, link):
                total += status.st_size
                continue
            if link == "auto" and status.st_dev not in linkable:
                linkable[status.st_dev] = can_link(path, folder)
            total += status.st_size if link == "auto" and not linkable[status.st_dev] else 0
    return total


def _reject(partial: Path, output: Path) -> Path:
    rejected = rejected_folder(output)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(rejected)
    partial.rename(rejected)
    return rejected
