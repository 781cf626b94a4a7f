"""``import=[sft.yaml,model.yaml]``: take settings from CogVideo's SAT yaml files.

:func:`take_import` removes the word from the command line and reads the files. :func:`imported_values` then yields
the settings for the stage that runs. They override the groups that a model or a stage selects, and are overridden by
everything that the command line names. ``import=`` is neither a group nor a key. The files are data: nothing that
they name under ``target`` is imported or run."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogflow import rank_identity
from cogflow.config.problems import Problem, format_value
from cogflow.config.sat_keys import (
    DEFAULTS,
    EMA_DECAY,
    FACTS,
    LORA,
    MODELS,
    NO_SETTING,
    REQUIRED,
    SLOW_STEPS,
    TAKEN,
    TRANSLATED,
)
from cogflow.files.bounded_parsing import first_line, read_yaml_text, reject_references
from cogflow.files.printable import one_line

WORD = "import"
IMPORTING_STAGES = ("train", "prepare", "flow")
"""Stages that a training recipe has settings for."""

NAMED_GROUPS = ("deepspeed", "sampling", "tracking", "recipe", "experiment", "debug")
"""Groups that override the import if the command line names them. The choices of a model or a stage are defaults and
do not."""


@dataclass(frozen=True)
class ImportedSetting:
    """One setting that was taken. ``source``, ``sat_value``: as in the yaml. ``key``, ``value``: as in cogflow."""

    source: str
    sat_value: Any
    key: str
    value: Any
    note: str = ""

    def line(self) -> str:
        """Return the line of the log for this setting."""
        taken = f"{self.source} = {format_value(self.sat_value)} -> {self.key}={format_value(self.value)}"
        return f"{taken} ({self.note})" if self.note else taken


@dataclass
class SatRecipe:
    """The content of the yaml files.

    ``settings``: settings taken. ``no_setting``: keys without a setting, and what determines them. ``unknown``: keys
    in no table. ``problems``: what cannot be imported. ``facts``: facts of the model, as the keys of :data:`FACTS`.
    """

    settings: list[ImportedSetting] = field(default_factory=list)
    no_setting: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        """Name of the model that the yaml describes; ``None`` if it describes none or an unknown one."""
        fitting = [name for name, known in MODELS.items() if self.facts and not fact_differences(self.facts, known)]
        return fitting[0] if len(fitting) == 1 else None

    def untaken_lines(self) -> Iterator[str]:
        """Yield the lines of the log for the keys that set nothing."""
        yield from (f"{key}: not a setting: {reason}" for key, reason in self.no_setting.items())
        yield from (f"{key}: unknown, ignored" for key in self.unknown)

    def contradictions(self, model: str) -> list[Problem]:
        """Return where the yaml contradicts the chosen model. The tiny model may stand in for any."""
        if model not in MODELS:
            return []
        guess = f" Did you mean model={self.model}?" if self.model else ""
        return [
            Problem(
                f"model={model}: the imported {FACTS[name]} is {format_value(value)}, this model has "
                f"{format_value(MODELS[model][name])}.{guess}"
            )
            for name, value in fact_differences(self.facts, MODELS[model]).items()
        ]


def take_import(choices: dict[str, str], values: list[tuple[str, Any]], problems: list[Problem]) -> SatRecipe | None:
    """Return the recipe that ``import=`` names, ``None`` without the word.

    Removes the word from ``values``, and adds the groups that the files determine (model, data) to ``choices``.
    """
    named = [value for key, value in values if key == WORD]
    if not named:
        return None
    values[:] = [(key, value) for key, value in values if key != WORD]
    if len(named) > 1:
        problems.append(Problem(f"{WORD}= is given {len(named)} times; name all files in one list.", (WORD,)))
    paths = named[-1] if isinstance(named[-1], list) else [named[-1]]
    recipe = read_recipe([str(path) for path in paths if path])
    problems += recipe.problems
    if not ({"model", "experiment"} & set(choices)):
        if recipe.model is not None:
            choices["model"] = recipe.model
        else:
            lack = "describe no known model" if recipe.facts else "do not describe the model"
            problems.append(
                Problem(f"{WORD}=: the files {lack}; add the model's yaml, or choose model=NAME.", (WORD, "model.name"))
            )
    if any(setting.key == "data.path" for setting in recipe.settings) and not ({"data", "experiment"} & set(choices)):
        choices["data"] = "folder"
    return recipe


@dataclass(frozen=True)
class CommandLine:
    """The words of a command: choices of groups, values of keys, and the folder of the groups' yaml files."""

    choices: Mapping[str, str]
    values: Sequence[tuple[str, Any]]
    configs: Path


def imported_values(
    recipe: SatRecipe, raw: Mapping[str, Any], command: CommandLine, problems: list[Problem]
) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values that the recipe sets in ``raw``, and log what happened to each key on standard
    error."""
    stage, model = raw.get("stage"), raw.get("model")
    stage_name = stage.get("name") if isinstance(stage, Mapping) else None
    if stage_name not in IMPORTING_STAGES:
        if "stage" in raw:
            problems.append(Problem(f"{WORD}=: only stage=prepare, train and flow take a training recipe.", (WORD,)))
        return
    problems += recipe.contradictions(str(model.get("name")) if isinstance(model, Mapping) else "")
    overriding = {key: "the command line" for key, _ in command.values} | keys_of_named_groups(command)
    lines = []
    for setting in recipe.settings:
        key = _key_in_stage(setting.key, stage_name)
        if key is None:
            continue
        winner = overriding.get(key)
        lines.append(setting.line() + (f"; overridden by {winner}" if winner else ""))
        if not winner:
            yield key, setting.value
    if rank_identity.rank() == 0:
        print("\n".join(f"{WORD}: {one_line(line)}" for line in [*lines, *recipe.untaken_lines()]), file=sys.stderr)


def _key_in_stage(key: str, stage_name: str) -> str | None:
    """Return a key of stage=train as the stage that runs names it; ``None`` if that stage has no such key."""
    if not key.startswith("stage."):
        return key
    return {"train": key, "flow": key.replace("stage.", "stage.train.", 1)}.get(stage_name)


def keys_of_named_groups(command: CommandLine) -> dict[str, str]:
    """Return the keys that the named groups set, and the name of the group."""
    from omegaconf import OmegaConf

    found = {}
    for group in NAMED_GROUPS:
        file = command.configs / group / f"{command.choices.get(group)}.yaml"
        if group not in command.choices or not file.is_file():
            continue
        whole = "@package _global_" in file.read_text(encoding="utf-8")
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for key, _ in flatten(loaded if whole else {group: loaded}):
            for name in (key.replace("stages.train.", "stage.", 1), key.replace("stages.train.", "stage.train.", 1)):
                found[name] = f"{group}={command.choices[group]}"
    return found


def read_recipe(paths: Sequence[str]) -> SatRecipe:
    """Return the recipe of SAT's yaml files. Later files override earlier ones, as in SAT."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    merged, problems = OmegaConf.create(), []
    for path in paths:
        try:
            # OmegaConf would resolve ${...} with variables of this machine, and would fail on deep nesting.
            loaded = OmegaConf.load(io.StringIO(read_yaml_text(Path(path).expanduser())))
            if not OmegaConf.is_dict(loaded):
                raise ValueError("it contains no keys")
            reject_references(OmegaConf.to_container(loaded, resolve=False))
            merged.merge_with(loaded)
        except FileNotFoundError:
            problems.append(Problem(f"{WORD}={path}: no such file.", (WORD,)))
        except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
            problems.append(Problem(f"{WORD}={path}: it cannot be read as yaml: {first_line(error)}.", (WORD,)))
    recipe = translate_recipe(OmegaConf.to_container(merged, resolve=False))
    recipe.problems[:0] = problems
    return recipe


def translate_recipe(raw: Any) -> SatRecipe:
    """Return the recipe of a plain mapping with SAT's sections (args, data, deepspeed, model)."""
    flat = dict(flatten(raw))
    flat.pop("", None)  # of empty files
    recipe = SatRecipe()
    for key, names in TAKEN.items():
        if key in flat:
            recipe.settings += [ImportedSetting(key, flat[key], name, flat[key]) for name in names]
    for translate in (_data, _precision, _ema, _schedule, _text_dropout, _guidance):
        recipe.settings += translate(flat, recipe.problems)
    for key, value in flat.items():
        _check_key(key, value, recipe)
    if any(key == LORA or key.startswith(f"{LORA}.") for key in flat):
        recipe.problems.append(Problem(f"{LORA}: SAT would train a LoRA; {REQUIRED['model.lora_train'][1]}.", (WORD,)))
    recipe.facts = {name: flat[key] for name, key in FACTS.items() if key in flat}
    if recipe.facts and "snr_shift_scale" not in recipe.facts:
        recipe.facts["snr_shift_scale"] = 1.0  # SAT's default, which the yaml of 1.5 leaves out
    return recipe


def _check_key(key: str, value: Any, recipe: SatRecipe) -> None:
    """Add to ``recipe`` the problem of a required value that differs, or a key without a setting."""
    if key in REQUIRED:
        required, reason = REQUIRED[key]
        if value != required:
            recipe.problems.append(
                Problem(f"{key}={format_value(value)}: it should be {format_value(required)}: {reason}.", (WORD,))
            )
    elif key not in TAKEN and key not in TRANSLATED:
        if section := _entry_without_setting(key):
            recipe.no_setting[section] = NO_SETTING[section]
        else:
            recipe.unknown.append(key)


def flatten(raw: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values. Lists are values."""
    if not isinstance(raw, Mapping) or not raw:
        yield prefix, raw
        return
    for name, value in raw.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        yield from flatten(value, key) if isinstance(value, Mapping) and value else [(key, value)]


def fact_differences(facts: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``facts`` that have another value in ``known``."""
    return {name: value for name, value in facts.items() if not _is_same(value, known[name])}


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


def _entry_without_setting(key: str) -> str | None:
    """Return the entry of ``NO_SETTING`` for a key, its own or that of a section around it."""
    parts = key.split(".")
    return next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in NO_SETTING), None)


def _data(flat: Mapping[str, Any], problems: list[Problem]) -> list[ImportedSetting]:
    """Return the size of the clips and their folder."""
    found = []
    size = flat.get("data.params.video_size")
    if isinstance(size, list) and len(size) == 2:
        found += [
            ImportedSetting("data.params.video_size", size, key, side)
            for key, side in zip(("data.height", "data.width"), size, strict=True)
        ]
    elif size is not None:
        problems.append(Problem(f"data.params.video_size={format_value(size)}: it should be [height,width].", (WORD,)))
    folders = flat.get("args.train_data")
    folders = [folders] if isinstance(folders, str) else folders or []
    if len(folders) == 1:
        found.append(ImportedSetting("args.train_data", folders, "data.path", folders[0]))
    elif folders:
        problems.append(
            Problem(
                f"args.train_data={format_value(folders)}: cogflow trains on one folder; put all clips into one.",
                (WORD,),
            )
        )
    return found


def _precision(flat: Mapping[str, Any], problems: list[Problem]) -> list[ImportedSetting]:
    """Return the training dtype."""
    given = {name: flat[key] for name in ("bf16", "fp16") if (key := f"deepspeed.{name}.enabled") in flat}
    chosen = [name for name, enabled in given.items() if enabled]
    if len(chosen) > 1:
        problems.append(
            Problem("deepspeed.bf16.enabled and deepspeed.fp16.enabled are both true; disable one of them.", (WORD,))
        )
    if not given or len(chosen) > 1:
        return []
    name = chosen[0] if chosen else "fp32"
    source = f"deepspeed.{name}.enabled" if chosen else "deepspeed.bf16.enabled"
    return [ImportedSetting(source, bool(chosen), "model.dtype", name)]


def _ema(flat: Mapping[str, Any], problems: list[Problem]) -> list[ImportedSetting]:
    """Return the EMA, which is a part of SAT's optimizer."""
    key, name = "deepspeed.optimizer.type", flat.get("deepspeed.optimizer.type")
    if name is None:
        return []
    kind = str(name).rpartition(".")[2].lower()
    if kind == "fusedemaadam":
        decay_key = "deepspeed.optimizer.params.ema_decay"
        decay = flat.get(decay_key, EMA_DECAY)
        warmup = bool(flat.get("deepspeed.optimizer.params.use_num_upates", True))
        note = "samples and exports use the averages; SAT saves them as <iteration>-ema"
        source = (decay_key, decay) if decay_key in flat else (key, name)
        return [
            ImportedSetting(*source, "stage.ema_decay", decay, note),
            ImportedSetting(key, name, "stage.ema_warmup", warmup),
        ]
    if kind not in ("adam", "adamw", "fusedadam"):
        problems.append(Problem(f"{key}={name}: cogflow trains with AdamW, with or without an EMA.", (WORD,)))
    return [ImportedSetting(key, name, "stage.ema_decay", 0.0)]


def _schedule(flat: Mapping[str, Any], problems: list[Problem]) -> list[ImportedSetting]:
    """Return the learning rate schedule. SAT's defaults replace keys that its yaml leaves out."""
    steps = flat.get("args.train_iters")
    if not isinstance(steps, int):
        return []
    notes = {key: "" if key in flat else "SAT's default" for key in DEFAULTS}
    style, warmup, ratio = (
        flat.get(key, DEFAULTS[key]) for key in ("args.lr_decay_style", "args.warmup", "args.lr_decay_ratio")
    )
    warmup_steps = round(warmup * steps)
    if flat.get("args.mode", "finetune") == "finetune" and warmup_steps < SLOW_STEPS:
        warmup_steps = min(SLOW_STEPS, steps)
        notes["args.warmup"] = (
            f"SAT keeps the rate at one twentieth for {SLOW_STEPS} steps; cogflow raises it over them"
        )
    found = [ImportedSetting("args.warmup", warmup, "stage.warmup_steps", warmup_steps, notes["args.warmup"])]
    style_key = "args.lr_decay_style"
    if style == "linear":
        # SAT's line is shifted by the warm-up, so that it does not end at zero.
        found.append(ImportedSetting(style_key, style, "stage.schedule", style, notes[style_key]))
        found.append(ImportedSetting("args.warmup", warmup, "stage.min_lr_ratio", warmup, "where SAT's line ends"))
    elif style == "cosine":
        found.append(ImportedSetting(style_key, style, "stage.schedule", style, notes[style_key]))
        ratio_note = notes["args.lr_decay_ratio"]
        found.append(ImportedSetting("args.lr_decay_ratio", ratio, "stage.min_lr_ratio", ratio, ratio_note))
    elif style in ("constant", "exponential", "None", None):
        note = "SAT's exponential is constant" if style == "exponential" else notes[style_key]
        found.append(ImportedSetting(style_key, style, "stage.schedule", "constant", note))
    else:
        problems.append(
            Problem(f"{style_key}={format_value(style)}: cogflow has constant, linear and cosine.", (WORD,))
        )
    return found


def _text_dropout(flat: Mapping[str, Any], problems: list[Problem]) -> list[ImportedSetting]:
    """Return the dropout of captions."""
    key = "model.conditioner_config.params.emb_models"
    for index, embedder in enumerate(flat.get(key) or []):
        if isinstance(embedder, Mapping) and embedder.get("input_key") == "txt":
            if embedder.get("is_trainable"):
                problems.append(
                    Problem(f"{key}[{index}].is_trainable=true: cogflow does not train the text encoder.", (WORD,))
                )
            rate = float(embedder.get("ucg_rate", 0.0))
            return [ImportedSetting(f"{key}[{index}].ucg_rate", rate, "stage.text_dropout", rate)]
    return []


def _guidance(flat: Mapping[str, Any], problems: list[Problem]) -> list[ImportedSetting]:
    """Return whether the guidance is dynamic."""
    key = "model.sampler_config.params.guider_config.target"
    if key not in flat:
        return []
    return [ImportedSetting(key, flat[key], "sampling.use_dynamic_cfg", str(flat[key]).endswith(".DynamicCFG"))]
