"""Test SAT's recipes as settings: each value, the order of precedence, and what is refused."""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from cogflow.config import sat_import, sat_keys
from cogflow.config.build import build, known_keys
from cogflow.config.compose import compose, configs_folder
from cogflow.config.config import Config
from cogflow.config.diagnose_settings import FlowStage
from cogflow.config.train_settings import TrainStage
from cogflow.errors import ConfigError
from cogflow.models.family import MODEL_SPECS

SAT = Path(__file__).parent / "sat"
GOLDEN = Path(__file__).parent.parent / "golden" / "sat"
SFT, MODEL = SAT / "sft.yaml", SAT / "cogvideox_5b.yaml"
YAMLS = {
    "cogvideox-2b": "cogvideox_2b",
    "cogvideox-5b": "cogvideox_5b",
    "cogvideox-5b-i2v": "cogvideox_5b_i2v",
    "cogvideox1.5-5b": "cogvideox1.5_5b",
    "cogvideox1.5-5b-i2v": "cogvideox1.5_5b_i2v",
}

DEVIATIONS: dict[str, tuple[Any, str]] = {
    "run.name": ("cogvideox-5b-sft", "SAT's file is named after a LoRA of its example"),
    "data.path": ("/clips", "SAT's file names its example's folder"),
    "tracking.log_every": (1, "a line for each step costs nothing, and the follower of the losses reads them"),
    "deepspeed.reduce_bucket_size": (500_000_000, "half the memory; no value changes, and little time"),
    "deepspeed.allgather_bucket_size": (500_000_000, "half the memory; no value changes, and little time"),
}
"""Intended differences of experiment=cogvideox_5b_sft from SAT's recipe: the value and the reason."""


def recipe(*words: str, files: str = f"[{SFT},{MODEL}]") -> Config:
    return compose(["stage=train", f"import={files}", "model.path=/model", *words])


def value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def edited(folder: Path, old: str, new: str, source: Path = SFT) -> str:
    """A copy of ``source`` with ``old`` replaced, and the 5B model's yaml beside it, as ``import=`` takes them."""
    text = source.read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / source.name).write_text(text.replace(old, new), encoding="utf-8")
    return f"[{SFT},{folder / source.name}]" if source != SFT else f"[{folder / source.name},{MODEL}]"


def test_the_experiment_is_sats_recipe_value_by_value() -> None:
    experiment = compose(["experiment=cogvideox_5b_sft", "model.path=/model", "data.path=/clips"])
    settings = sat_import.read_recipe([str(SFT), str(MODEL)]).settings
    assert len(settings) > 30
    for setting in settings:
        if setting.key in DEVIATIONS:
            assert value(experiment, setting.key) == DEVIATIONS[setting.key][0] != setting.value, setting.key
        else:
            assert value(experiment, setting.key) == setting.value, setting.key
    assert set(DEVIATIONS) <= {setting.key for setting in settings}


def test_the_recipe_file_is_sats_recipe_value_by_value() -> None:
    """``recipe=sat`` sets what SAT's yaml and SAT's defaults say about the optimization, except for the clips per
    GPU."""
    from omegaconf import OmegaConf

    imported = {
        setting.key.removeprefix("stage."): setting.value
        for setting in sat_import.read_recipe([str(SFT), str(MODEL)]).settings
        if setting.key.startswith("stage.")
    }
    chosen_per_run = {
        "steps",
        "save_every",
        "evaluate_every",
        "sample_every",
        "gradient_accumulation",
        "seed",
        "batch_size",
    }
    loaded = OmegaConf.to_container(OmegaConf.load(configs_folder() / "recipe" / "sat.yaml"))
    assert isinstance(loaded, dict)
    recipe_file = dict(loaded["stages"]["train"])
    assert recipe_file.pop("batch_size") == 1 and imported["batch_size"] == 2
    assert recipe_file == {name: value for name, value in imported.items() if name not in chosen_per_run}


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_each_large_model_selects_sats_recipe_and_adds_nothing_to_it(name: str) -> None:
    selected, named = (
        compose(["stage=train", f"model={name}", "model.path=/m", *more]) for more in ([], ["recipe=sat"])
    )
    assert selected == named
    tiny = compose(["stage=train", "recipe=sat"])
    assert selected.stage == tiny.stage and selected.stage.ema_decay == 0.9999
    assert compose(["stage=train", f"model={name}", "model.path=/m", "recipe=default"]).stage == TrainStage()


def test_a_named_recipe_overrides_the_import() -> None:
    assert recipe("recipe=sat").stage.batch_size == 1 and recipe().stage.batch_size == 2


def test_every_setting_taken_is_in_the_config() -> None:
    config = recipe()
    for setting in sat_import.read_recipe([str(SFT), str(MODEL)]).settings:
        assert value(config, setting.key) == setting.value, setting.key
    assert config.data.name == "folder" and config.model.name == "cogvideox-5b"


def test_the_tables_name_keys_that_exist() -> None:
    known = known_keys(TrainStage)
    assert [key for names in sat_keys.TAKEN.values() for key in names if key not in known] == []
    tables = [set(sat_keys.TAKEN), set(sat_keys.TRANSLATED), set(sat_keys.NO_SETTING)]
    assert not tables[0] & tables[1] and not tables[0] & tables[2] and not tables[1] & tables[2]


def test_the_models_of_the_import_are_those_of_the_family() -> None:
    assert set(sat_keys.MODELS) == set(MODEL_SPECS) - {"tiny"}
    for name, facts in sat_keys.MODELS.items():
        one = MODEL_SPECS[name]
        patch = [one.patch_size_t, one.patch_size, one.patch_size] if one.patch_size_t else one.patch_size
        assert facts == {
            "layers": one.layers,
            "heads": one.heads,
            "width": one.heads * one.head_dim,
            "in_channels": one.in_channels,
            "patch": patch,
            "text_tokens": one.text_tokens,
            "scaling_factor": one.scaling_factor,
            "snr_shift_scale": one.snr_shift_scale,
        }


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_the_models_yaml_chooses_the_model(name: str) -> None:
    config = recipe("data.frames=81", files=f"[{SFT},{SAT / YAMLS[name]}.yaml]")
    assert config.model.name == name and config.data.height == 480


@pytest.mark.parametrize("folder", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_every_key_that_sat_wrote_is_known(folder: str) -> None:
    for files in ([GOLDEN / folder / "training_config.yaml"], sorted((GOLDEN / folder / "configs").glob("*.yaml"))):
        found = sat_import.read_recipe([str(path) for path in files])
        assert found.unknown == [] and len(found.settings) > 25
        lora = [problem for problem in found.problems if "LoRA" in problem.text]
        assert bool(lora) == ("lora" in folder) and (lora or not found.problems)


def test_the_command_line_wins() -> None:
    config = recipe("stage.steps=7", "run.name=mine", "deepspeed=zero3", "sampling=quick", "data.path=/mine")
    assert isinstance(config.stage, TrainStage)
    assert (config.stage.steps, config.run.name, config.deepspeed.zero_stage, config.sampling.steps) == (
        7,
        "mine",
        3,
        8,
    )
    assert config.data.path == "/mine" and config.stage.learning_rate == 1e-5 and config.sampling.guidance_scale == 6


def test_a_chosen_experiment_wins_and_a_chosen_model_does_not() -> None:
    config = recipe("debug=quick")
    assert isinstance(config.stage, TrainStage) and config.stage.steps == 4 and config.stage.batch_size == 2
    assert recipe("model=cogvideox-5b").stage == recipe().stage
    assert recipe("experiment=cogvideox_5b_sft").run.name == "cogvideox-5b-sft"


def test_prepare_and_flow_import_only_their_settings() -> None:
    words = [f"import=[{SFT},{MODEL}]", "model.path=/model"]
    assert compose(["stage=prepare", *words]).data.path == "disney"
    flow = compose(["stage=flow", *words, "stage.train.betas=[0.8,0.9]", "debug=quick"]).stage
    assert (
        isinstance(flow, FlowStage)
        and flow.train.eps == 1e-8
        and flow.train.betas == [0.8, 0.9]
        and flow.train.steps == 4
    )
    with pytest.raises(ConfigError, match="stage=prepare, train and flow"):
        compose(["stage=sample", *words])


def test_each_line_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("stage.steps=7")
    said = capsys.readouterr()
    assert said.out == "" and "import: args.save_interval = 500 -> stage.save_every=500\n" in said.err
    assert (
        "stage.steps=1000; overridden by the command line" in said.err
        and "args.only_log_video_latents: not a setting" in said.err
    )
    monkeypatch.setenv("RANK", "1")
    recipe()
    assert capsys.readouterr().err == ""


def test_an_unknown_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(files=edited(tmp_path, "  force_train: true", "  force_train: true\n  frobnicate: 3"))
    assert "args.frobnicate: unknown, ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("mode: finetune", "mode: pretrain", "args.mode=pretrain"),
        ('["disney"]\n  valid', '["a", "b"]\n  valid', "one folder"),
        ("fp16: {enabled: false}", "fp16: {enabled: true}", "both true"),
        ("model_parallel_size: 1", "model_parallel_size: 2", "model parallelism"),
        ("video_size: [480, 720]", "video_size: 480", "video_size"),
        ("video_size: [480, 720]", "video_size: [481, 720]", "data.height=481"),
        ("train_iters: 1000", "train_iters: many", "stage.steps=many"),
        ("sat.ops.FusedEmaAdam", "sat.ops.Lion", "sat.ops.Lion"),
        ("args:", "args: [", "cannot be read as yaml"),
    ],
)
def test_settings_that_cannot_be_imported_are_refused(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(files=edited(tmp_path, old, new))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("offset_noise_level: 0", "offset_noise_level: 0.1", "offset noise"),
        ("is_trainable: false", "is_trainable: true", "is_trainable"),
        ("  scale_factor: 0.7", "  scale_factor: 0.7\n  lora_train: true", "LoRA"),
        ("num_layers: 42", "num_layers: 41", "describe no known model"),
    ],
)
def test_models_that_train_otherwise_are_refused(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(files=edited(tmp_path, old, new, MODEL))
    assert complaint in str(caught.value)


def test_another_model_than_the_yaml_describes_is_refused() -> None:
    """The incident's mistake, caught before it is made: another model's scale and shift."""
    with pytest.raises(ConfigError) as caught:
        recipe("model=cogvideox-5b", files=f"[{SFT},{SAT / 'cogvideox_2b.yaml'}]")
    for part in (
        "scale_factor is 1.15258426, this model has 0.7",
        "shift_scale is 3.0",
        "Did you mean model=cogvideox-2b?",
    ):
        assert part in str(caught.value)
    assert recipe("model=tiny", files=f"[{SFT},{SAT / 'cogvideox_2b.yaml'}]").model.name == "tiny"


def test_without_a_models_yaml_the_model_is_chosen() -> None:
    with pytest.raises(ConfigError, match="do not describe the model"):
        recipe(files=str(SFT))
    assert recipe("model=cogvideox-2b", files=str(SFT)).model.name == "cogvideox-2b"


def test_files_that_are_not_there_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe("stage.stpes=3", files="[/nowhere/a.yaml,/nowhere/b.yaml]")
    for part in ("/nowhere/a.yaml: no such file", "/nowhere/b.yaml: no such file", "stage.stpes"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "schedule", "least", "warmup"),
    [
        ("", "linear", 0.01, 100),
        ("\n  warmup: 0.2", "linear", 0.2, 200),
        ("\n  lr_decay_style: cosine", "cosine", 0.1, 100),
        ("\n  lr_decay_style: cosine\n  lr_decay_ratio: 0.3", "cosine", 0.3, 100),
        ("\n  lr_decay_style: constant", "constant", None, 100),
    ],
)
def test_the_imported_schedule_and_warmup_are_those_of_sat(
    tmp_path: Path, extra: str, schedule: str, least: float | None, warmup: int
) -> None:
    stage = recipe(files=edited(tmp_path, "  train_iters: 1000", f"  train_iters: 1000{extra}")).stage
    assert isinstance(stage, TrainStage) and (stage.schedule, stage.warmup_steps) == (schedule, warmup)
    assert least is None or stage.min_lr_ratio == least


def sat_rate(step: int, lr: float = 1e-5, steps: int = 1000, warmup: float = 0.01) -> float:
    """Return the rate of SAT's AnnealingLR from step 0: held back for 100 steps, then its line, at its own count of
    steps."""
    rising = warmup * steps
    if step <= 100:
        return min(0.05 * lr, lr * step / rising)
    return lr * (steps - (step - rising)) / steps


def test_the_rate_is_sats_after_its_first_steps() -> None:
    from cogflow.training.objective import learning_rate

    stage = recipe().stage
    assert isinstance(stage, TrainStage)
    ours, theirs = (
        [learning_rate(step, stage) for step in range(101, 1000)],
        [sat_rate(step) for step in range(101, 1000)],
    )
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 0.1 * 1e-5
    assert math.isclose(ours[-1], theirs[-1], rel_tol=0.2)


def test_an_optimizer_without_averages_keeps_none(tmp_path: Path) -> None:
    stage = recipe(files=edited(tmp_path, "sat.ops.FusedEmaAdam", "AdamW")).stage
    assert isinstance(stage, TrainStage) and stage.ema_decay == 0


def test_a_config_of_an_import_is_a_config_like_any_other() -> None:
    from omegaconf import OmegaConf

    from cogflow.config.build import as_yaml

    config = recipe()
    raw = OmegaConf.to_container(OmegaConf.create(as_yaml(config)))
    assert isinstance(raw, dict) and build({str(key): item for key, item in raw.items()}) == config
