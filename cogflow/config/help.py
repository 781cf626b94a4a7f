"""What ``--help`` prints, read from the schema's own comments and the yaml files' first lines. Needs neither Hydra nor torch."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from collections.abc import Mapping, Sequence
from functools import cache

from cogflow.config import benchmarks, schema
from cogflow.config.build import no_stage, section_names, show
from cogflow.config.compose import configs_folder, groups
from cogflow.config.imported import STAGES as RECIPES
from cogflow.config.problems import fail
from cogflow.config.schema import STAGES

USAGE = "usage: python -m cogflow stage=NAME [group=choice ...] [key=value ...] [--help | --cfg | --version]"


def text(words: Sequence[str], summaries: Mapping[str, str]) -> str:
    """Help on the stage that ``words`` choose, else on all. Raises :class:`ConfigError` for a stage that does not exist."""
    chosen = [word.partition("=")[2] for word in words if word.startswith("stage=")]
    if not chosen:
        return overview(summaries)
    if chosen[-1] not in summaries:
        fail([no_stage({"name": chosen[-1]})])
    return for_stage(chosen[-1], summaries)


def overview(summaries: Mapping[str, str]) -> str:
    """The stages, one line each, and how to go on."""
    width = max(map(len, summaries)) + 6
    lines = [USAGE, "", *(f"  {'stage=' + name:<{width}}  {text}" for name, text in summaries.items()), ""]
    lines += [
        "  python -m cogflow stage=flow           the whole way on the tiny model, on a CPU or a GPU",
        "  python -m cogflow stage=train --help   every key of a stage, with its default and meaning",
        "  python -m cogflow stage=train --cfg    the settings a command would run with, as yaml",
    ]
    return "\n".join(lines)


def for_stage(name: str, summaries: Mapping[str, str]) -> str:
    """Every key that stage ``name`` knows and every group, with defaults and meanings."""
    lines = [USAGE, "", f"stage={name}: {summaries[name]}", ""]
    lines += _keys(STAGES[name], "stage")
    for section, kind in section_names().items():
        lines += ["", *_keys(kind, section)]
    lines += ["", "groups (group=choice), laid over each other in the order of configs/config.yaml:"]
    for group, choices in groups().items():
        lines += [f"  {group}=", *(f"    {choice:<22} {_comment(group, choice)}" for choice in choices)]
    if STAGES[name] in RECIPES:
        lines += [
            "",
            "import=[sft.yaml,model.yaml]: CogVideo's SAT recipe as settings; what the command line says wins over it",
        ]
    return "\n".join(line.rstrip() for line in lines)


def _keys(kind: type, path: str) -> list[str]:
    lines = []
    meanings = comments()[kind.__name__]
    hints = typing.get_type_hints(kind)
    default = kind()
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            lines += _keys(typing.cast(type, hints[field.name]), f"{path}.{field.name}")
        elif not (field.name == "name" and path.startswith("stage")):
            pair = f"{path}.{field.name}={show(getattr(default, field.name))}"
            lines.append(f"  {pair:<42} {meanings.get(field.name, '')}")
    return lines


@cache
def comments() -> dict[str, dict[str, str]]:
    """The comment behind each field of the schema, by class and field name."""
    return _by_class(inspect.getsource(schema)) | _by_class(inspect.getsource(benchmarks))


def _by_class(source: str) -> dict[str, dict[str, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                item.target.id: by_line[item.end_lineno or item.lineno]
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and (item.end_lineno or item.lineno) in by_line
            }
    return found


def _comment(group: str, choice: str) -> str:
    """The first comment of a yaml file that is no directive."""
    for line in (configs_folder() / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""
