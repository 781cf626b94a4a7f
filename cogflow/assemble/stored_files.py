"""Check the files of components: hashes against the manifests, tensor names and shapes against the configs, stored
dtypes.

Files are hashed completely; of weights only the headers are parsed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import diffusers

from cogflow.assemble.components import COMPONENT_SUFFIXES, STEMS, PipelineComponent
from cogflow.config.command import options
from cogflow.errors import CheckpointError, CogflowError, format_list
from cogflow.files.hashing import Advance, hash_with_cache
from cogflow.files.publish import MANIFEST, read_manifest
from cogflow.models.family import ModelSpec
from cogflow.models.loading import DTYPES
from cogflow.records.pipeline_records import ContradictionRecord
from cogflow.weights.strict_loading import expected_shapes, meta_model
from cogflow.weights.tensor_source import WeightsFolder

SHA256_DIGITS = 64


def hash_components(
    components: Mapping[str, PipelineComponent], advance: Advance | None = None, *, rehash: bool = False
) -> tuple[dict[Path, str], int]:
    """Return the sha256 of every file by path, and how many bytes were known from :mod:`cogflow.files.hashing`."""
    return hash_with_cache(_paths(components), advance, rehash=rehash)


def total_bytes(components: Mapping[str, PipelineComponent]) -> int:
    """Return the size of all files in bytes; a file of several components counts once."""
    return sum(path.stat().st_size for path in _paths(components))


def _paths(components: Mapping[str, PipelineComponent]) -> set[Path]:
    return {path for component in components.values() for path in component.files.values()}


def changed_files(component: PipelineComponent, hashes: Mapping[Path, str]) -> Iterator[ContradictionRecord]:
    """Yield each file that differs from its published version.

    The published sha256 is in the manifest of an export, a pipeline or a checkpoint; in Hugging Face's cache it is the
    name of the file in ``blobs/``.
    """
    restore = f"restore the published file, or give stage.{component.name}=FOLDER of another one"
    yield from _changed_since_manifest(component, hashes, restore)
    for name, path in sorted(component.files.items()):
        if path.parent.name == "blobs" and len(path.name) == SHA256_DIGITS and path.name != hashes[path]:
            yield ContradictionRecord(
                key=f"{component.name}.{name}",
                value=f"sha256 {hashes[path]}",
                source=str(path),
                why="it was downloaded as",
                needed=f"sha256 {path.name}",
                needed_source="its own name",
                override=restore,
            )


def _changed_since_manifest(
    component: PipelineComponent, hashes: Mapping[Path, str], restore: str
) -> Iterator[ContradictionRecord]:
    root, entries = _manifest_of(component.folder)
    if root is None:
        return
    manifest = str(root / MANIFEST)
    if entries is None:
        yield ContradictionRecord(
            key=f"{component.name}.{MANIFEST}",
            value="unreadable",
            source=manifest,
            why="it must be",
            needed="JSON",
            needed_source="cogflow",
            override=restore,
        )
        return
    published = {root / name: sha256 for name, sha256 in entries.items() if (root / name).parent == component.folder}
    for path, sha256 in sorted(published.items()):
        if path.name not in component.files and path.suffix in COMPONENT_SUFFIXES:
            yield ContradictionRecord(
                key=f"{component.name}.{path.name}",
                value="missing",
                source=str(component.folder),
                why="it was published with",
                needed=sha256,
                needed_source=manifest,
                override=restore,
            )
    for name, path in sorted(component.files.items()):
        sha256_of_name = published.get(component.folder / name)
        if sha256_of_name != hashes[path]:
            key = f"{component.name}.{name}"
            intended = f"; stage.force=[{key}] if it was changed on purpose" if name.endswith(".json") else ""
            yield ContradictionRecord(
                key=key,
                value=f"sha256 {hashes[path]}",
                source=str(path),
                why="it was published with",
                needed=f"sha256 {sha256_of_name}" if sha256_of_name else "no such file",
                needed_source=manifest,
                override=restore + intended,
            )


def _manifest_of(folder: Path) -> tuple[Path | None, dict[str, str] | None]:
    """Return the nearest folder whose manifest names files of ``folder``, and sha256 by relative name.

    The hashes are ``None`` for a manifest that cannot be read; both are ``None`` without a manifest.
    """
    for root in (folder, folder.parent):
        if not (root / MANIFEST).is_file():
            continue
        try:
            hashes = {name: entry.sha256 for name, entry in read_manifest(root).files.items()}
        except CheckpointError:
            return root, None
        if any((root / name).parent == folder for name in hashes):
            return root, hashes
    return None, None


def tensor_problems(components: Mapping[str, PipelineComponent]) -> list[str]:
    """Return a problem for each component whose tensors are not those of its config.

    ``from_pretrained`` fills a missing tensor with random numbers and drops an extra one, with a warning at most.
    """
    problems = []
    for name in STEMS:
        if name in components and components[name].files:
            try:
                problems += _compare_tensors(components[name])
            except CogflowError as error:
                problems.append(f"{name}: {error.message}")
    return problems


def _compare_tensors(component: PipelineComponent) -> list[str]:
    config = {key: value for key, value in component.settings.items() if key not in component.defaulted}
    if (cls := getattr(diffusers, component.class_name, None)) is not None:
        # Keys of another version of diffusers are ignored, as diffusers does.
        known = inspect.signature(cls.__init__).parameters
        config = {key: value for key, value in config.items() if key in known} | {"_class_name": component.class_name}
    expected = expected_shapes(meta_model(config, component.folder, component.name))
    weights = WeightsFolder(component.folder, STEMS[component.name])
    found = {name: info.shape for name, info in weights.tensors.items()}
    if component.name == "text_encoder" and "shared.weight" not in found and "encoder.embed_tokens.weight" in found:
        found["shared.weight"] = found["encoder.embed_tokens.weight"]  # two names of one tensor
    lines = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    if component.name != "text_encoder":  # a complete T5 also contains its decoder
        lines += [f"extra: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    lines += [
        f"{name} is {list(found[name])}, the config requires {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if not lines:
        return []
    return [
        f"{component.name}: the tensors in {component.folder} are not those of its config:\n{format_list(lines, 6)}"
    ]


def stored_dtypes(component: PipelineComponent) -> dict[str, int]:
    """Return the number of tensors by dtype (fp32, bf16, fp16, or torch's name); empty when the weights cannot be
    read.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    counts: dict[str, int] = {}
    try:
        tensors = WeightsFolder(component.folder, STEMS[component.name]).tensors if component.files else {}
    except CogflowError:
        return {}
    for info in tensors.values():
        name = names.get(info.dtype, str(info.dtype))
        counts[name] = counts.get(name, 0) + 1
    return counts


def dtype_contradictions(
    components: Mapping[str, PipelineComponent], family: ModelSpec | None
) -> Iterator[ContradictionRecord]:
    """Yield the transformer in the other 16-bit dtype than it was trained in, and fp16 components of a bf16 model.

    fp32 holds every value of both, and an export in 16 bits of a training in fp32 was requested, so neither is
    reported. bf16 weights stored in fp16 lose their range, fp16 weights in bf16 lose three bits of each value, and the
    VAE and T5 of the bf16 models overflow in fp16.
    """
    transformer = components["transformer"]
    trained = transformer.training.trained_with and transformer.training.trained_with.dtype
    if trained is not None:
        needed, source, why = trained, str(transformer.training_file), "the transformer was trained in"
    elif family is not None:
        needed, source, why = family.dtype, f"the facts of {family.name}", "its family was trained in"
    else:
        return
    if needed not in ("fp16", "bf16"):
        return
    other = "fp16" if needed == "bf16" else "bf16"
    for name in STEMS:
        if name not in components or (name != "transformer" and other != "fp16"):
            continue
        counts = stored_dtypes(components[name])
        if other not in counts:
            continue
        override = f"stage.{name}=FOLDER of weights in {needed} or fp32"
        if name == "transformer" and transformer.training.source:
            override = options({"stage.transformer": transformer.training.source, "stage.dtype": needed})
        yield ContradictionRecord(
            key=f"{name}.dtype",
            value=other,
            source=f"{counts[other]} of {sum(counts.values())} tensors in {components[name].folder}",
            why=why,
            needed=needed,
            needed_source=source,
            override=override,
        )
