"""Test stage=prepare on a tiny pipeline folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from preparing import MAX_LENGTH, small_text, small_vae

from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.model_section import ModelConfig
from cogflow.config.run_section import RunConfig, TrackingConfig
from cogflow.config.train_settings import PrepareStage
from cogflow.data.latent_cache import LatentCache
from cogflow.errors import ConfigError, DataError
from cogflow.models import loading
from cogflow.stages import prepare
from tests.permissions import wrong_permissions


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = tmp_path / "model"
    small_vae().save_pretrained(model / "vae")
    tokenizer, encoder = small_text()
    tokenizer.save_pretrained(model / "tokenizer")
    encoder.save_pretrained(model / "text_encoder")
    (model / "transformer").mkdir()
    (model / "transformer" / "config.json").write_text(json.dumps({"max_text_seq_length": MAX_LENGTH}))
    return Config(
        stage=PrepareStage(),
        run=RunConfig(root=str(tmp_path / "runs"), name="try"),
        model=ModelConfig(path=str(model)),
        data=DataConfig(frames=5, height=32, width=32, clips=5, holdout=1),
        tracking=TrackingConfig(wandb="disabled"),
    )


def test_drawn_clips_are_prepared_and_a_second_run_loads_no_model(
    config: Config, tmp_path: Path, capsys, monkeypatch
) -> None:
    before = os.umask(0o022)
    prepare.run(config)
    os.umask(before)
    folder = tmp_path / "runs" / "try"
    assert wrong_permissions(folder, 0o022) == []
    cache = LatentCache(folder / "cache")
    assert (len(cache), len(cache.train), len(cache.holdout)) == (5, 4, 1)
    assert cache.entry(0).mean.shape == (16, 2, 4, 4) and cache.entry(0).embeds.shape == (MAX_LENGTH, 16)
    record = json.loads((folder / "prepare.json").read_text())
    assert record["results"]["clips"] == 5 and record["results"]["fingerprint"] == cache.fingerprint
    assert set(record["inputs"]["models"]) == {"vae", "text_encoder", "tokenizer", "text_dtype"}
    out = capsys.readouterr().out
    assert "5 clips (4 to train on, 1 held out): 5 encoded, 0 reused" in out and str(folder / "cache") in out

    for name in ("load_vae", "load_text_encoder", "load_tokenizer"):
        monkeypatch.setattr(loading, name, lambda *a, **k: pytest.fail("a model was loaded"))
    prepare.run(config)
    assert "0 encoded, 5 reused" in capsys.readouterr().out


def test_a_changed_component_is_detected_by_its_files(config: Config, tmp_path: Path, capsys) -> None:
    prepare.run(config)
    encoder_config = tmp_path / "model" / "text_encoder" / "config.json"
    encoder_config.write_text(encoder_config.read_text() + "\n")
    capsys.readouterr()
    prepare.run(config)
    assert "0 encoded, 5 reused; 6 captions encoded" in capsys.readouterr().out


def test_invalid_settings_are_refused_before_anything_is_written(config: Config, tmp_path: Path) -> None:
    for data, match in (
        (DataConfig(name="folder"), "data=folder needs data.path"),
        (DataConfig(name="folder", path=str(tmp_path / "nowhere")), "does not exist"),
    ):
        with pytest.raises(DataError, match=match):
            prepare.run(replace(config, data=data))
    for file in (tmp_path / "model" / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="tokenizer is missing or empty"):
        prepare.run(config)
    assert not (tmp_path / "runs" / "try" / "cache").exists()
