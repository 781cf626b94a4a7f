"""metrics.jsonl survives NaN, kills and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from cogflow.tracking.metrics_log import MetricsLog, read_lines


def test_a_line_holds_step_time_and_flat_names(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.log(3, {"train/loss": torch.tensor(0.5), "train/lr": np.float32(0.25), "train/clips": 7, "train/ok": True})
    (line,) = [json.loads(text) for text in log.path.read_text().splitlines()]
    assert line.pop("time") > 1e9
    assert line == {"step": 3, "train/loss": 0.5, "train/lr": 0.25, "train/clips": 7, "train/ok": 1}


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, {"train/loss": math.nan, "train/grad_norm": torch.tensor(math.inf)})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert line["train/loss"] is None and line["train/grad_norm"] is None


def test_rewind_forgets_training_beyond_the_step_and_nothing_else(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(96, {"prepare/clips": 96})
    for step in range(1, 6):
        log.log(step, {"train/loss": float(step)})
    log.log(4, {"heldout/loss": 1.0})
    for name in ("sharpness/contrast", "spectrum/z", "watch/level", "ema/heldout_loss", "validation/seconds"):
        log.log(5, {name: 1.0})
    assert log.rewind(3) == 8
    assert [(line["step"], *(set(line) - {"step", "time"})) for line in log.read()] == [
        (96, "prepare/clips"),
        (1, "train/loss"),
        (2, "train/loss"),
        (3, "train/loss"),
    ]
    log.log(4, {"train/loss": 4.0})
    assert log.read()[-1]["step"] == 4


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).log(1, {"train/loss": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "train/lo')
    assert [line["step"] for line in read_lines(path)] == [1]
    MetricsLog(path).log(2, {"train/loss": 2.0})
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert all(json.loads(text) for text in path.read_text().splitlines())


def test_no_file_reads_as_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none.jsonl") == []
