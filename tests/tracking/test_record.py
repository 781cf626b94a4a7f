"""Test that a stage record holds inputs, settings, versions and results, and no secrets."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogflow.config.config import Config
from cogflow.files.record_io import JsonObject, read_record
from cogflow.files.secrets import scrub
from cogflow.records.run_records import StageRecord
from cogflow.tracking.stage_record import write_stage_record


def test_a_record_holds_inputs_settings_versions_and_results(tmp_path: Path, config: Config) -> None:
    results: Any = {"summary": "done", "loss": np.float32(0.5), "bad": math.nan, "where": tmp_path / "out"}
    path = write_stage_record(tmp_path, "train", config, {"cache": {"sha256": "ab"}}, results, started=time.time() - 5)
    record = json.loads(path.read_text())
    assert path == tmp_path / "train.json"
    assert (record["version"], record["stage"], record["status"]) == (1, "train", "done")
    assert read_record(path, StageRecord).summary == "done"
    assert 5 <= record["seconds"] < 60
    assert (
        record["inputs"] == {"cache": {"sha256": "ab"}}
        and record["results"]["loss"] == 0.5
        and record["results"]["bad"] is None
    )
    assert record["settings"]["stage"]["steps"] == 4 and {"cogflow", "python", "torch"} <= set(record["versions"])


def test_no_secret_is_recorded(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "wandb-key-0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setattr(
        "sys.argv", ["cogflow", "data.path=https://me:pw@host/x", "--token", "abc123", "note=hf_abcdefghij"]
    )
    text = write_stage_record(
        tmp_path, "train", config, {"api_key": "zzz"}, {"log": "used wandb-key-0123456789"}
    ).read_text()
    for secret in ("wandb-key-0123456789", "hf_abcdefghij", "me:pw", "abc123", "zzz"):
        assert secret not in text


def test_scrubbing_leaves_ordinary_settings_alone() -> None:
    ordinary: JsonObject = {
        "tokenizer": "t5",
        "max_tokens": 226,
        "text": "a token of thanks, stage.tokenizer=/models/t5 max_tokens=5",
        "list": ["secretary", None, 1.5],
    }
    assert scrub(ordinary) == ordinary
