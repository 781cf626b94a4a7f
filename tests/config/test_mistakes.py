"""Every mistake is answered with the key, the value and what would be right; several of them in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogflow.config.build import build, check
from cogflow.config.compose import compose
from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.export_settings import ExportStage
from cogflow.config.sample_settings import SampleStage
from cogflow.config.train_settings import TrainStage
from cogflow.errors import ConfigError

ONE: dict[str, list[str]] = {
    "stage=trian": ["stage=trian", "Did you mean train?"],
    "stage=train model=cogvideox5b": ["model=cogvideox5b", "Did you mean cogvideox-5b?"],
    "stage=train deepspeed=zero4": ["deepspeed=zero4", "zero3"],
    "stage=train modle=tiny": ["modle=tiny", "Did you mean model?"],
    "stage=train run=mine": ["run=mine", "run.name"],
    "stage=train stage.step=3": ["stage.step=3", "Did you mean stage.steps?"],
    "stage=train stage.lr=1e-5": ["stage.lr", "Did you mean stage.learning_rate?"],
    "stage=train +stage.stepz=3": ["stage.stepz=3", "Did you mean stage.steps?"],
    "stage=flow stage.steps=3": ["stage.steps=3", "Did you mean stage.train.steps?"],
    "stage=flow stage.train.seeds=3": ["stage.train.seeds=3"],
    "stage=train learning_rate=1": ["learning_rate=1", "Did you mean stage.learning_rate?"],
    "stage=train data.frmaes=9": ["data.frmaes=9", "Did you mean data.frames?"],
    "stage=train data=shapes data=folder": ["data=folder", "data=shapes"],
    "stage=train experiment.x=1": ["experiment.x=1", "group"],
    "stage=train hydra.run.dir=x": ["hydra.run.dir=x", "no such key"],
    "stage=train ~model": ["~model", "deleted"],
    "stage=train data.seed=1,2": ["data.seed=1,2", "[1,2]"],
    "stage=train data@x=shapes": ["data@x=shapes", "group=choice"],
    "stage=train data.path=${nope}": ["data.path", "nope"],
    "stage=train data.path=???": ["data.path", "Missing mandatory value"],
    "stage=train a=,=b": ["a=,=b", "not understood"],
    "train": ["Did you mean stage=train?", "stage=NAME is missing"],
    "stage=train stage.name=flow": ["stage.name=flow", "stage=flow"],
    "stage=train stage.steps=many": ["stage.steps=many", "a whole number"],
    "stage=train stage.steps=2.5": ["stage.steps=2.5", "a whole number"],
    "stage=train stage.steps=true": ["stage.steps=true", "a whole number"],
    "stage=train stage.steps=0": ["stage.steps=0", "1 or more"],
    "stage=train stage.learning_rate=-1": ["stage.learning_rate=-1", "0 or more"],
    "stage=train stage.learning_rate=nan": ["stage.learning_rate=nan", "finite"],
    "stage=train stage.betas=0.9": ["stage.betas=0.9", "a list"],
    "stage=train stage.betas=[0.9]": ["stage.betas=[0.9]", "two numbers"],
    "stage=train stage.schedule=cosin": ["stage.schedule=cosin", "Did you mean cosine?"],
    "stage=train stage.resume=atuo": ["stage.resume=atuo", "Did you mean auto?"],
    "stage=flow stage.train.resume=newest": ["stage.train.resume=newest", "no such folder"],
    "stage=train stage.ema_decay=1": ["stage.ema_decay=1", "less than 1"],
    "stage=train stage.on_blur=stopp": ["stage.on_blur=stopp", "Did you mean stop?"],
    "stage=train stage.on_blur=stop stage.sample_every=0": ["stage.on_blur=stop", "stage.sample_every"],
    "stage=train stage.keep_best=2 stage.sample_every=0": ["stage.keep_best=2", "stage.sample_every"],
    "stage=train stage.on_blur=rollback stage.save_every=0": ["stage.on_blur=rollback", "stage.save_every"],
    "stage=flow stage.train.on_blur=rollback stage.train.save_every=0": [
        "stage.train.on_blur=rollback",
        "stage.train.save_every",
    ],
    "stage=train stage.rollback.learning_rate_ratio=1.5": ["stage.rollback.learning_rate_ratio=1.5", "at most 1"],
    "stage=train stage.rollback.most=0": ["stage.rollback.most=0", "1 or more"],
    "stage=export stage.max_shard_size=5": ["stage.max_shard_size=5", "5GB"],
    "stage=train run.name=a/b": ["run.name=a/b", "folder name"],
    "stage=train run.name=..": ["run.name=..", "folder name"],
    "stage=train run.name=null": ["run.name=null", "text"],
    "stage=train run.name='a\x1bb'": ["run.name=", "control characters"],
    "stage=train data.frames=12": ["data.frames=12", "13"],
    "stage=train data.height=100": ["data.height=100", "96"],
    "stage=train data.fps=0": ["data.fps=0", "more than 0"],
    "stage=train data.colours=[purpel]": ["purpel", "Did you mean purple?"],
    "stage=train data.colours=red": ["data.colours=red", "[red]"],
    "stage=train data.holdout=96": ["data.holdout=96", "data.clips=96"],
    "stage=train data=folder": ["data.path is missing"],
    "stage=train model=auto": ["model=auto", "cogvideox-2b"],
    "stage=train model=cogvideox-2b": ["model.path is missing", "cogvideox-2b"],
    "stage=train model=cogvideox1.5-5b model.path=x data.frames=9": ["data.frames=9", "16k+1", "17"],
    "stage=train model=cogvideox-5b model.path=x data.frames=13": ["data.frames=13", "8k+1"],
    "stage=train model.dtype=bf61": ["model.dtype=bf61", "Did you mean bf16?"],
    "stage=train deepspeed=zero2 deepspeed.offload_parameters=true": [
        "deepspeed.offload_parameters=true",
        "zero_stage=3",
    ],
    "stage=train deepspeed=zero3 deepspeed.checkpoint_keep=all": ["deepspeed.checkpoint_keep=all", "auto or nothing"],
    "stage=train deepspeed.checkpoint_keep=atention": ["deepspeed.checkpoint_keep=atention", "attention"],
    "stage=train deepspeed=zero0 deepspeed.offload_optimizer=true": [
        "deepspeed.offload_optimizer=true",
        "zero_stage 1 to 3",
    ],
    "stage=train sampling.seeds=[]": ["sampling.seeds=[]"],
    "stage=train sampling.seeds=[1,1]": ["sampling.seeds=[1,1]", "different"],
    "stage=train tracking.wandb=on": ["tracking.wandb=on", "online"],
}


@pytest.mark.parametrize("line", sorted(ONE))
def test_each_mistake_is_named_with_its_remedy(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(line.split())
    message = str(caught.value)
    assert [part for part in ONE[line] if part not in message] == [], message


@pytest.mark.parametrize("line", sorted(set(ONE) - {"train"}))
def test_one_mistake_is_reported_once(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(line.split())
    assert "problems" not in caught.value.message, caught.value.message


def test_all_problems_come_together() -> None:
    """One error lists mistakes in words, kinds and ranges, and mistakes between keys."""
    with pytest.raises(ConfigError) as caught:
        compose(
            ["stage=train", "modle=x", "stage.stps=1", "data.fps=fast", "data.height=100", "data.holdout=200", "a=,=b"]
        )
    assert caught.value.message.startswith("6 problems in the configuration:")
    for part in ("modle=x", "stage.stps=1", "data.fps=fast", "data.height=100", "data.holdout=200", "a=,=b"):
        assert part in caught.value.message


def test_a_problem_that_follows_from_another_is_left_out() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["stage=train", "data.clips=-1"])
    assert "data.holdout" not in str(caught.value)


def test_values_keep_or_gain_their_kind(tmp_path: Path) -> None:
    line = "stage=train run.name=2024 stage.steps=1e3 data.fps=24 sampling.seeds=[1,2] "
    line += f"stage.resume={tmp_path} data.path='a,b'"
    config = compose([*line.split(), "tracking.entity=null", "+data.seed=3", "stage.seed=${data.seed}"])
    stage = config.stage
    assert isinstance(stage, TrainStage)
    assert config.run.name == "2024" and stage.steps == 1000 and isinstance(stage.steps, int)
    assert config.data.fps == 24.0 and isinstance(config.data.fps, float)
    assert config.sampling.seeds == [1, 2] and config.data.path == "a,b" and stage.seed == 3


@pytest.mark.parametrize("word", ["1e5", "007", "true", "False", "1_000", "None", "nan", "-5", "1.50", "+5", "0x10"])
def test_text_is_what_was_typed(word: str) -> None:
    config = compose(["stage=export", f"run.name={word}", f"stage.source={word}"])
    assert isinstance(config.stage, ExportStage)
    assert (config.run.name, config.stage.source) == (word, word)


def test_quotes_are_no_part_of_a_text() -> None:
    assert compose(["stage=export", "run.name='1e5'"]).run.name == "1e5"
    config = compose(["stage=export", "stage.source=null"])
    assert isinstance(config.stage, ExportStage) and config.stage.source is None


def test_build_accepts_plain_dicts() -> None:
    assert build({"stage": {"name": "sample"}, "data": {"frames": 17}}) == Config(
        stage=SampleStage(), data=DataConfig(frames=17)
    )
    with pytest.raises(ConfigError, match="one of prepare, train"):
        build({})
    with pytest.raises(ConfigError, match="3 problems"):
        build({"stage": {"name": "sample"}, "model": 3, "daat": {}, "data": {"frames": "x"}})


def test_check_reports_mistakes_that_build_does_not() -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        check(Config(stage=TrainStage(steps=0), data=DataConfig(width=17)))
    assert caught.value.exit_code == 2
