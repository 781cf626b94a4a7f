"""Step 1, facts: every field that differs, ranked by what it does to the picture. Nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogflow.assemble.components import STEMS, PipelineComponent
from cogflow.assemble.expectations import ARCHITECTURE, TRAINED
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.diagnosis.severity import IGNORED, OTHER, SEVERITY
from cogflow.errors import CogflowError
from cogflow.files.hashing import hash_file
from cogflow.models.code_check import CONFIGS
from cogflow.models.family import ModelSpec
from cogflow.weights.tensor_source import WeightsFolder

CALLED = ("use_dynamic_cfg", "guidance_scale", "steps", "max_sequence_length")
VOCABULARY = ("spiece.model", "tokenizer.json", "added_tokens.json", "special_tokens_map.json")


def compare_configs(candidate: DiagnosisInput, reference: DiagnosisInput) -> StepResult:
    """Fields of ``candidate`` against those of ``reference``; without its files, against what it is declared to be.

    The candidate's own record (what its transformer was trained with) speaks in either case.
    """
    found = list(candidate.problems)
    if reference.parts:
        found += _pairs(candidate, reference)
    found += _expected(candidate, reference, {finding.place for finding in found})
    found += _called(candidate, reference)
    found += _dtypes(candidate, reference)
    found.sort(key=lambda finding: -finding.confidence)
    lines = [finding.line() for finding in found] or ["no field differs"]
    return StepResult(
        "facts",
        found,
        lines,
        {"compared": sorted(candidate.parts), "against": "files" if reference.parts else "declared"},
    )


def _pairs(candidate: DiagnosisInput, reference: DiagnosisInput) -> Iterator[DiagnosisFinding]:
    for name in CONFIGS:
        ours, theirs = candidate.parts.get(name), reference.parts.get(name)
        if ours is None or theirs is None or not ours.class_name or not theirs.class_name:
            continue
        if ours.class_name != theirs.class_name and name == "scheduler":
            yield _finding(candidate, name, "_class_name", ours.class_name, theirs.class_name, theirs.folder)
        for key in sorted((ours.settings.keys() | theirs.settings.keys()) - IGNORED):
            if key.startswith("_"):
                continue
            mine, other = (_content(settings.get(key)) for settings in (ours.settings, theirs.settings))
            if not same(mine, other):
                yield _finding(candidate, name, key, mine, other, theirs.folder)
        if name == "tokenizer":
            yield from _vocabulary(candidate, ours, theirs)


def _content(value: Any) -> Any:
    """A special token as text, whether its file has it as text or with its flags."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _finding(side: DiagnosisInput, component: str, key: str, mine: Any, other: Any, folder: Path) -> DiagnosisFinding:
    harm, why = SEVERITY.get((component, key), OTHER)
    return DiagnosisFinding(
        "facts", component, "config", key, False, mine, other, side.rung, harm, why, setting(component, key, other)
    )


def setting(component: str, key: str, value: Any) -> str:
    """Words for stage=assemble that set a field."""
    shown = (
        {True: "true", False: "false", None: "null"}.get(value, value)
        if value is None or isinstance(value, bool)
        else value
    )
    return f"stage.set.{component}.{key}={shown}"


def _vocabulary(side: DiagnosisInput, ours: PipelineComponent, theirs: PipelineComponent) -> Iterator[DiagnosisFinding]:
    for name in VOCABULARY:
        files = [part.files.get(name) for part in (ours, theirs)]
        if files[0] is not None and files[1] is not None and hash_file(files[0]) != hash_file(files[1]):
            sure = 0.8 if name in ("spiece.model", "tokenizer.json") else 0.3
            yield DiagnosisFinding(
                "facts",
                "tokenizer",
                "config",
                name,
                False,
                "another file",
                "",
                side.rung,
                sure,
                "Captions become other tokens.",
            )


def _expected(candidate: DiagnosisInput, reference: DiagnosisInput, known: set[str]) -> Iterator[DiagnosisFinding]:
    """What the transformer was trained with, or the family needs, against the fields; those that differ from the reference are told."""
    expected = reference.expected if not reference.parts else candidate.expected
    for key, component in TRAINED.items():
        part = candidate.parts.get(component)
        if part is None or not part.class_name or key not in expected or f"{component}.{key}" in known:
            continue
        if not same(part.settings.get(key), expected[key].value):
            harm, why = SEVERITY[component, key]
            fix = setting(component, key, expected[key].value)
            yield DiagnosisFinding(
                "facts",
                component,
                "config",
                key,
                False,
                part.settings.get(key),
                expected[key].value,
                candidate.rung,
                harm,
                why,
                fix,
            )
    transformer = candidate.parts.get("transformer")
    if transformer is None or not transformer.class_name:
        return
    wanted_length = expected.get("max_sequence_length")
    length = wanted_length and wanted_length.value
    if (
        length is not None
        and transformer.settings.get("max_text_seq_length") != length
        and "transformer.max_text_seq_length" not in known
    ):
        harm, why = SEVERITY["transformer", "max_text_seq_length"]
        own = transformer.settings.get("max_text_seq_length")
        yield DiagnosisFinding(
            "facts", "transformer", "config", "max_text_seq_length", False, own, length, candidate.rung, harm, why
        )
    family = reference.family if not reference.parts else candidate.family
    yield from _architecture(candidate, transformer, family, known)


def _architecture(
    side: DiagnosisInput, transformer: PipelineComponent, family: ModelSpec | None, known: set[str]
) -> Iterator[DiagnosisFinding]:
    for key, field in ARCHITECTURE.items() if family is not None else ():
        mine, wanted = transformer.settings.get(key), getattr(family, field)
        if mine != wanted and f"transformer.{key}" not in known:
            harm, why = SEVERITY.get(("transformer", key), (0.8, "The architecture is not the family's."))
            yield DiagnosisFinding("facts", "transformer", "config", key, False, mine, wanted, side.rung, harm, why)


def _called(candidate: DiagnosisInput, reference: DiagnosisInput) -> Iterator[DiagnosisFinding]:
    """How the pipeline is called, where both sides have it on record."""
    for key in CALLED:
        mine, other = getattr(candidate.sampling, key, None), getattr(reference.sampling, key, None)
        if mine is not None and other is not None and not same(mine, other):
            harm, why = SEVERITY["sampling", key]
            yield DiagnosisFinding(
                "facts",
                "sampling",
                "config",
                key,
                False,
                mine,
                other,
                candidate.rung,
                harm,
                why,
                f"{_override(key)}={other}",
            )


def _override(key: str) -> str:
    return f"sampling.{key}" if key != "max_sequence_length" else "max_sequence_length"


def _dtypes(candidate: DiagnosisInput, reference: DiagnosisInput) -> Iterator[DiagnosisFinding]:
    """Weights in fp16 where training, or the reference, had the range of bf16 or fp32."""
    for name, stem in STEMS.items():
        mine, other = dtype_of(candidate.parts.get(name), stem), dtype_of(reference.parts.get(name), stem)
        family = candidate.family or reference.family
        if mine != "float16" or other == "float16" or (family is not None and family.dtype == "fp16"):
            continue
        why = "fp16 ends at 65504 and loses small weights: values that bf16 and fp32 hold become infinite, or zero."
        wanted = other or "float32"
        fix = f"stage.dtype={'fp32' if wanted == 'float32' else 'bf16'}"
        yield DiagnosisFinding("facts", name, "dtype", "dtype", False, mine, wanted, candidate.rung, 0.6, why, fix)


def dtype_of(part: PipelineComponent | None, stem: str) -> str | None:
    """The dtype that most values of a component are stored in; ``None`` where that cannot be read."""
    if part is None or not part.class_name:
        return None
    try:
        tensors = WeightsFolder(part.folder, stem).tensors.values()
    except CogflowError:  # told by the step that reads the weights
        return None
    counts: dict[str, int] = {}
    for tensor in tensors:
        key = str(tensor.dtype).removeprefix("torch.")
        counts[key] = counts.get(key, 0) + math.prod(tensor.shape)
    return max(counts, key=lambda key: counts[key], default=None)


def same(one: Any, other: Any) -> bool:
    """Equal, numbers to 1e-6, lists and tuples alike."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    numbers = (
        isinstance(one, int | float)
        and isinstance(other, int | float)
        and not isinstance(one, bool)
        and not isinstance(other, bool)
    )
    return math.isclose(one, other, rel_tol=1e-6) if numbers else bool(one == other)
