"""Where an imported recipe lies between the groups and the command line: over what a model brings along, below what was asked for.

``import=`` is no group and no key of the config: it is taken out of the command line before anything else is composed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogflow.config import build, sat_import
from cogflow.config.problems import Problem
from cogflow.config.sat_import import Recipe
from cogflow.config.schema import FlowStage, PrepareStage, TrainStage

WORD = "import"
STAGES = (TrainStage, PrepareStage, FlowStage)
"""Those that a recipe of a training says anything about."""

CHOSEN_FIRST = ("deepspeed", "sampling", "tracking", "experiment", "debug")
"""Groups that win over a recipe when the command line chooses them. What a model or a stage brings along are defaults, and do not."""


def take(choices: dict[str, str], values: list[tuple[str, Any]], problems: list[Problem]) -> Recipe | None:
    """The recipe that ``import=`` names, with the word taken out of ``values`` and the groups that it settles put into ``choices``."""
    words = [value for key, value in values if key == WORD]
    if not words:
        return None
    values[:] = [(key, value) for key, value in values if key != WORD]
    if len(words) > 1:
        problems.append(Problem(f"{WORD}= is given {len(words)} times; name all files in one list.", (WORD,)))
    paths = words[-1] if isinstance(words[-1], list) else [words[-1]]
    recipe = sat_import.read([str(path) for path in paths if path])
    problems += recipe.problems
    if not ({"model", "experiment"} & set(choices)):
        if recipe.model is not None:
            choices["model"] = recipe.model
        else:
            what = "are of no model of the family" if recipe.facts else "say nothing of the model"
            problems.append(
                Problem(f"{WORD}=: the files {what}; add the model's yaml, or choose model=NAME.", (WORD, "model.name"))
            )
    if any(setting.key == "data.path" for setting in recipe.settings) and not ({"data", "experiment"} & set(choices)):
        choices["data"] = "folder"
    return recipe


def lay(
    recipe: Recipe,
    raw: Mapping[str, Any],
    configs: Path,
    choices: Mapping[str, str],
    values: list[tuple[str, Any]],
    problems: list[Problem],
) -> Iterator[tuple[str, Any]]:
    """The keys to set below ``values``, for the stage of ``raw``; tells, on standard error, what became of each line of the recipe."""
    stage = build.stage_class(raw.get("stage"))
    if stage not in STAGES:
        if "stage" in raw:
            problems.append(Problem(f"{WORD}=: a recipe of a training is for stage=prepare, train and flow.", (WORD,)))
        return
    model = raw.get("model")
    problems += recipe.against(str(model.get("name")) if isinstance(model, Mapping) else "")
    firm = {key: "the command line" for key, _ in values} | _chosen(configs, choices)
    lines = []
    for setting in recipe.settings:
        key = _place(setting.key, stage)
        if key is None:
            continue
        over = firm.get(key)
        lines.append(setting.line() + (f"; {over} wins" if over else ""))
        if not over:
            yield key, setting.ours
    _say(recipe, lines)


def _place(key: str, stage: type) -> str | None:
    """A key of stage=train as the stage that runs calls it; ``None`` where it has no such key."""
    if not key.startswith("stage."):
        return key
    return {TrainStage: key, FlowStage: key.replace("stage.", "stage.train.", 1)}.get(stage)


def _chosen(configs: Path, choices: Mapping[str, str]) -> dict[str, str]:
    """Keys that the chosen groups set, and which one does."""
    from omegaconf import OmegaConf

    found = {}
    for group in CHOSEN_FIRST:
        file = configs / group / f"{choices.get(group)}.yaml"
        if group not in choices or not file.is_file():
            continue
        whole = "@package _global_" in file.read_text(encoding="utf-8")
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for key, _ in sat_import.flatten(loaded if whole else {group: loaded}):
            for name, place in (("stages.train.", "stage."), ("stages.train.", "stage.train.")):
                found[key.replace(name, place, 1)] = f"{group}={choices[group]}"
    return found


def _say(recipe: Recipe, lines: list[str]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    told = [*lines, *(line for line in recipe.lines() if " -> " not in line)]
    print("\n".join(f"{WORD}: {line}" for line in told), file=sys.stderr)
