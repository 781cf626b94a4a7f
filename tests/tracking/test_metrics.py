"""Test that metrics.jsonl and events.jsonl stay readable after NaN, kills and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from cogflow.records.event_records import AlertEvent, ArtifactEvent, Event, MediaEvent, TableEvent
from cogflow.tracking.metrics_log import MetricsLog, append_event, read_events, read_lines, read_metrics, write_metrics


def test_a_line_holds_step_time_and_flat_names(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.log(3, {"train/loss": torch.tensor(0.5), "train/lr": np.float32(0.25), "train/clips": 7, "train/ok": True})
    (line,) = [json.loads(text) for text in log.path.read_text().splitlines()]
    assert line.pop("time") > 1e9
    assert line == {"step": 3, "train/loss": 0.5, "train/lr": 0.25, "train/clips": 7, "train/ok": 1}


def test_values_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, {"train/loss": math.nan, "train/grad_norm": torch.tensor(math.inf)})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert line["train/loss"] is None and line["train/grad_norm"] is None


def test_rewind_removes_only_training_lines_beyond_the_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(96, {"prepare/clips": 96})
    for step in range(1, 6):
        log.log(step, {"train/loss": float(step)})
    log.log(4, {"heldout/loss": 1.0})
    for name in ("sharpness/contrast", "spectrum/z", "watch/level", "ema/heldout_loss", "validation/seconds"):
        log.log(5, {name: 1.0})
    assert log.rewind(3) == 8
    assert [(line.step, *line.values) for line in log.read()] == [
        (96, "prepare/clips"),
        (1, "train/loss"),
        (2, "train/loss"),
        (3, "train/loss"),
    ]
    log.log(4, {"train/loss": 4.0})
    assert log.read()[-1].step == 4


def test_an_incomplete_last_line_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).log(1, {"train/loss": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "train/lo')
    assert [line["step"] for line in read_lines(path)] == [1]
    MetricsLog(path).log(2, {"train/loss": 2.0})
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert all(json.loads(text) for text in path.read_text().splitlines())


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none.jsonl") == []
    assert read_metrics(tmp_path / "none.jsonl") == []
    assert read_events(tmp_path / "none.jsonl") == []


def test_written_lines_are_read_as_they_were(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, {"train/loss": 0.5, "train/clips": 8})
    log.log(2, {"train/loss": math.nan})
    lines = log.read()
    write_metrics(tmp_path / "copy.jsonl", lines)
    assert read_metrics(tmp_path / "copy.jsonl") == lines
    assert (tmp_path / "copy.jsonl").read_bytes() == log.path.read_bytes()
    assert [line.values for line in lines] == [{"train/loss": 0.5, "train/clips": 8}, {"train/loss": None}]


def test_events_are_read_by_kind_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events: list[Event] = [
        MediaEvent("video", 3, "samples/a", "samples/a.mp4", "a star", "train", 1.5),
        MediaEvent("image", 3, "sheet", "sheet.png", None, "train", 1.5),
        TableEvent("t", ["a", "b"], [["x", 1], [None, 0.5]], stage="train", time=2.0),
        AlertEvent("title", "text", "ERROR", "a.png", stage="train", time=3.0),
        ArtifactEvent("demo-clips", "dataset", 1, 2, ["demo-data"], path="cache", stage="prepare", time=4.0),
    ]
    for event in events:
        append_event(path, event)
    with path.open("a") as file:
        file.write('{"kind": "unknown"}\n{"kind": "alert", "title": 5, "text": ""}\n{"kind": "al')
    assert read_events(path) == events


def test_an_event_without_a_version_is_read(tmp_path: Path) -> None:
    line = {"kind": "alert", "stage": "train", "time": 1.0, "title": "soft", "text": "x", "level": "WARN"}
    (tmp_path / "events.jsonl").write_text(json.dumps(line) + "\n")
    assert read_events(tmp_path / "events.jsonl") == [AlertEvent("soft", "x", stage="train", time=1.0)]
