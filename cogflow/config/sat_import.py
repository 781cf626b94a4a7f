"""``import=[sft.yaml,model.yaml]``: a SAT recipe becomes settings, line by line, below everything else on the command line.

The files are data: nothing that they name under ``target`` is looked up or run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogflow.config.build import show
from cogflow.config.problems import Problem
from cogflow.config.sat_recipe import (
    DEFAULTS,
    EMA_DECAY,
    FACTS,
    HELD_BACK,
    LORA,
    MODELS,
    ONLY,
    SETTLED,
    TAKEN,
    WORKED_OUT,
)


@dataclass(frozen=True)
class Setting:
    """One setting taken: ``source`` and ``value`` as the yaml has them, ``key`` and ``ours`` as this project calls them."""

    source: str
    value: Any
    key: str
    ours: Any
    note: str = ""

    def line(self) -> str:
        return f"{self.source} = {show(self.value)} -> {self.key}={show(self.ours)}" + (
            f" ({self.note})" if self.note else ""
        )


@dataclass
class Recipe:
    """What the files say: settings, keys without one and why, keys nobody knows, and what cannot be taken over."""

    settings: list[Setting] = field(default_factory=list)
    settled: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        """The member of the family that the model's yaml describes; ``None`` without one, or when it is none of them."""
        fitting = [name for name, known in MODELS.items() if self.facts and not differences(self.facts, known)]
        return fitting[0] if len(fitting) == 1 else None

    def lines(self) -> Iterator[str]:
        """For the user: each setting, then what has none."""
        yield from (setting.line() for setting in self.settings)
        yield from (f"{key}: no setting of its own: {why}" for key, why in self.settled.items())
        yield from (f"{key}: unknown, passed over" for key in self.unknown)

    def against(self, model: str) -> list[Problem]:
        """Where the yaml contradicts the model that was chosen; the tiny model stands in for any."""
        if model not in MODELS:
            return []
        return [
            Problem(
                f"model={model}: the imported {FACTS[name]} is {show(value)}, this model has {show(MODELS[model][name])}.{self._meant()}"
            )
            for name, value in differences(self.facts, MODELS[model]).items()
        ]

    def _meant(self) -> str:
        return f" Did you mean model={self.model}?" if self.model else ""


def read(paths: Sequence[str]) -> Recipe:
    """The recipe of SAT's yaml files, later ones laid over earlier ones, as SAT itself lays them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    merged, problems = OmegaConf.create(), []
    for path in paths:
        try:
            loaded = OmegaConf.load(Path(path).expanduser())
            if not OmegaConf.is_dict(loaded):
                raise ValueError("it holds no keys")
            merged = OmegaConf.merge(merged, loaded)
        except FileNotFoundError:
            problems.append(Problem(f"import={path}: no such file.", ("import",)))
        except (OSError, YAMLError, OmegaConfBaseException, ValueError) as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            problems.append(Problem(f"import={path}: it cannot be read as yaml: {first[0]}.", ("import",)))
    recipe = translate(OmegaConf.to_container(merged, resolve=False))
    recipe.problems[:0] = problems
    return recipe


def translate(raw: Any) -> Recipe:
    """The recipe that a plain mapping with SAT's sections (args, data, deepspeed, model) holds."""
    flat = dict(flatten(raw))
    recipe = Recipe()
    for key, names in TAKEN.items():
        if key in flat:
            recipe.settings += [Setting(key, flat[key], name, flat[key]) for name in names]
    for worked_out in (_data, _precision, _average, _schedule, _text_dropout, _guidance):
        recipe.settings += worked_out(flat, recipe.problems)
    for key, value in flat.items():
        if key in ONLY and value != ONLY[key][0]:
            recipe.problems.append(
                Problem(f"{key}={show(value)}: it should be {show(ONLY[key][0])}: {ONLY[key][1]}.", ("import",))
            )
        if key not in TAKEN and key not in WORKED_OUT and key not in ONLY:
            if section := _settled(key):
                recipe.settled[section] = SETTLED[section]
            else:
                recipe.unknown.append(key)
    if any(key == LORA or key.startswith(f"{LORA}.") for key in flat):
        recipe.problems.append(Problem(f"{LORA}: SAT would train a LoRA; {ONLY['model.lora_train'][1]}.", ("import",)))
    recipe.facts = {name: flat[key] for name, key in FACTS.items() if key in flat}
    if recipe.facts and "snr_shift_scale" not in recipe.facts:
        recipe.facts["snr_shift_scale"] = 1.0  # SAT's default; 1.5's yaml leaves it out
    return recipe


def flatten(raw: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; lists are values."""
    if not isinstance(raw, Mapping) or not raw:
        yield prefix, raw
        return
    for name, value in raw.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        yield from flatten(value, key) if isinstance(value, Mapping) and value else [(key, value)]


def differences(facts: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``facts`` that ``known`` has other values for."""
    return {name: value for name, value in facts.items() if not _same(value, known[name])}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _settled(key: str) -> str | None:
    """The entry of ``SETTLED`` for a key, its own or that of a section around it."""
    parts = key.split(".")
    return next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in SETTLED), None)


def _data(flat: Mapping[str, Any], problems: list[Problem]) -> list[Setting]:
    found = []
    size = flat.get("data.params.video_size")
    if isinstance(size, list) and len(size) == 2:
        found += [
            Setting("data.params.video_size", size, key, side)
            for key, side in zip(("data.height", "data.width"), size, strict=True)
        ]
    elif size is not None:
        problems.append(Problem(f"data.params.video_size={show(size)}: it should be [height,width].", ("import",)))
    folders = flat.get("args.train_data")
    folders = [folders] if isinstance(folders, str) else folders or []
    if len(folders) == 1:
        found.append(Setting("args.train_data", folders, "data.path", folders[0]))
    elif folders:
        problems.append(
            Problem(f"args.train_data={show(folders)}: cogflow trains on one folder; bring them into one.", ("import",))
        )
    return found


def _precision(flat: Mapping[str, Any], problems: list[Problem]) -> list[Setting]:
    given = {name: flat[key] for name in ("bf16", "fp16") if (key := f"deepspeed.{name}.enabled") in flat}
    chosen = [name for name, enabled in given.items() if enabled]
    if len(chosen) > 1:
        problems.append(
            Problem("deepspeed.bf16.enabled and deepspeed.fp16.enabled are both true; one can be.", ("import",))
        )
    if not given or len(chosen) > 1:
        return []
    name = chosen[0] if chosen else "fp32"
    return [
        Setting(f"deepspeed.{name}.enabled" if chosen else "deepspeed.bf16.enabled", bool(chosen), "model.dtype", name)
    ]


def _average(flat: Mapping[str, Any], problems: list[Problem]) -> list[Setting]:
    """SAT's optimizer keeps averages by itself; another one keeps none."""
    key, name = "deepspeed.optimizer.type", flat.get("deepspeed.optimizer.type")
    if name is None:
        return []
    last = str(name).rpartition(".")[2].lower()
    if last == "fusedemaadam":
        own = "deepspeed.optimizer.params.ema_decay"
        decay = flat.get(own, EMA_DECAY)
        grows = bool(flat.get("deepspeed.optimizer.params.use_num_upates", True))
        note = "samples and exports take the averages; SAT writes them beside, as <iteration>-ema"
        source = (own, decay) if own in flat else (key, name)
        return [Setting(*source, "stage.ema_decay", decay, note), Setting(key, name, "stage.ema_warmup", grows)]
    if last not in ("adam", "adamw", "fusedadam"):
        problems.append(Problem(f"{key}={name}: cogflow trains with AdamW, with averages or without.", ("import",)))
    return [Setting(key, name, "stage.ema_decay", 0.0)]


def _schedule(flat: Mapping[str, Any], problems: list[Problem]) -> list[Setting]:
    """SAT's learning rate; where the yaml is silent, SAT's defaults speak."""
    steps = flat.get("args.train_iters")
    if not isinstance(steps, int):
        return []

    def value(key: str) -> tuple[Any, str]:
        return flat.get(key, DEFAULTS[key]), "" if key in flat else "SAT's default"

    (style, style_note), (warmup, warmup_note) = value("args.lr_decay_style"), value("args.warmup")
    ratio, ratio_note = value("args.lr_decay_ratio")
    rising = round(warmup * steps)
    if flat.get("args.mode", "finetune") == "finetune" and rising < HELD_BACK:
        rising = min(HELD_BACK, steps)
        warmup_note = f"SAT's finetuning holds the rate at a twentieth for {HELD_BACK} steps; here it rises over them"
    found = [Setting("args.warmup", warmup, "stage.warmup_steps", rising, warmup_note)]
    if style == "linear":
        # SAT's line is shifted by the warm-up, so that it ends there above zero.
        found.append(Setting("args.lr_decay_style", style, "stage.schedule", style, style_note))
        found.append(Setting("args.warmup", warmup, "stage.min_lr_ratio", warmup, "where SAT's line ends"))
    elif style == "cosine":
        found.append(Setting("args.lr_decay_style", style, "stage.schedule", style, style_note))
        found.append(Setting("args.lr_decay_ratio", ratio, "stage.min_lr_ratio", ratio, ratio_note))
    elif style in ("constant", "exponential", "None", None):
        note = "SAT's exponential is constant" if style == "exponential" else style_note
        found.append(Setting("args.lr_decay_style", style, "stage.schedule", "constant", note))
    else:
        problems.append(
            Problem(f"args.lr_decay_style={show(style)}: cogflow has constant, linear and cosine.", ("import",))
        )
    return found


def _text_dropout(flat: Mapping[str, Any], problems: list[Problem]) -> list[Setting]:
    key = "model.conditioner_config.params.emb_models"
    for index, embedder in enumerate(flat.get(key) or []):
        if isinstance(embedder, Mapping) and embedder.get("input_key") == "txt":
            if embedder.get("is_trainable"):
                problems.append(
                    Problem(f"{key}[{index}].is_trainable=true: cogflow keeps the text encoder as it is.", ("import",))
                )
            rate = float(embedder.get("ucg_rate", 0.0))
            return [Setting(f"{key}[{index}].ucg_rate", rate, "stage.text_dropout", rate)]
    return []


def _guidance(flat: Mapping[str, Any], problems: list[Problem]) -> list[Setting]:
    key = "model.sampler_config.params.guider_config.target"
    if key not in flat:
        return []
    return [Setting(key, flat[key], "sampling.use_dynamic_cfg", str(flat[key]).endswith(".DynamicCFG"))]
