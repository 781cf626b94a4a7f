"""Format what ``--help`` prints: the help texts of the settings and the first comments of the yaml files.

Needs neither Hydra nor torch, so that ``--help`` is fast.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from cogflow.config.build import missing_stage, section_names
from cogflow.config.compose import configs_folder, groups
from cogflow.config.config import STAGES
from cogflow.config.problems import fail, format_value
from cogflow.config.sat_import import IMPORTING_STAGES
from cogflow.config.setting import help_of, rule_of

USAGE = "usage: python -m cogflow stage=NAME [group=choice ...] [key=value ...] [--help | --cfg | --version]"


def help_text(words: Sequence[str], summaries: Mapping[str, str]) -> str:
    """Return the help on the stage that ``words`` choose, else on all stages. ``summaries``: one line for each stage.

    Raises :class:`ConfigError` for a stage that does not exist.
    """
    chosen = [word.partition("=")[2] for word in words if word.startswith("stage=")]
    if not chosen:
        return overview(summaries)
    if chosen[-1] not in summaries:
        fail([missing_stage({"name": chosen[-1]})])
    return stage_help(chosen[-1], summaries)


def overview(summaries: Mapping[str, str]) -> str:
    """Return the usage, the stages with one line each, and example commands."""
    width = max(map(len, summaries)) + 6
    lines = [USAGE, "", *(f"  {'stage=' + name:<{width}}  {text}" for name, text in summaries.items()), ""]
    lines += [
        "  python -m cogflow stage=flow           the whole workflow on the tiny model, on a CPU or a GPU",
        "  python -m cogflow stage=train --help   every key of a stage, with its default and meaning",
        "  python -m cogflow stage=train --cfg    the settings that a command would run with, as yaml",
    ]
    return "\n".join(lines)


def stage_help(name: str, summaries: Mapping[str, str]) -> str:
    """Return every key of the stage ``name`` and of all sections, and every group with its choices."""
    lines = [USAGE, "", f"stage={name}: {summaries[name]}", ""]
    lines += _key_lines(STAGES[name], "stage")
    for section, kind in section_names().items():
        lines += ["", *_key_lines(kind, section)]
    lines += [
        "",
        "groups (group=choice), applied in the order of configs/config.yaml; later groups override earlier ones:",
    ]
    for group, choices in groups().items():
        lines += [f"  {group}=", *(f"    {choice:<22} {_first_comment(group, choice)}" for choice in choices)]
    if name in IMPORTING_STAGES:
        lines += [
            "",
            "import=[sft.yaml,model.yaml]: take settings from CogVideo's SAT yaml files; the command line "
            "overrides them",
        ]
    return "\n".join(line.rstrip() for line in lines)


def _key_lines(kind: type, path: str) -> list[str]:
    """Return one line for each setting of a section: key=default, help text and the allowed values."""
    lines = []
    hints, default = typing.get_type_hints(kind), kind()
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            lines += _key_lines(typing.cast(type, hints[field.name]), f"{path}.{field.name}")
        elif not (field.name == "name" and path.startswith("stage")):
            pair, rule = f"{path}.{field.name}={format_value(getattr(default, field.name))}", rule_of(field)
            lines.append(f"  {pair:<42} {help_of(field)}{f' [{rule.allowed}]' if rule else ''}")
    return lines


def _first_comment(group: str, choice: str) -> str:
    """Return the first comment of a yaml file that is not a Hydra directive."""
    for line in (configs_folder() / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""
