"""Test what W&B's own file holds, and that errors of W&B never end the work."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from cogflow.config.config import Config
from cogflow.config.run_section import TrackingConfig
from cogflow.data.video import write_video
from cogflow.files.record_io import write_record
from cogflow.records.history_records import HistoryRecord, RunLine
from cogflow.tracking import wandb_run
from cogflow.tracking.metrics_log import read_lines, read_metrics
from cogflow.tracking.tracker import Tracker, open_tracker
from cogflow.tracking.wandb_mode import choose_mode


def steps(folder: Path) -> list[int]:
    return [line.step for line in read_metrics(folder / "metrics.jsonl")]


def test_an_alert_shows_its_picture(tmp_path: Path, config: Config, recorded) -> None:
    folder = tmp_path / "demo"
    picture = folder / "watch" / "step-000004.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    with open_tracker(config, "train", folder) as tracker:
        tracker.log(4, {"train/loss": 0.5})
        tracker.alert("step 4: soft", "lost fine detail", "ERROR", picture=picture)
    (event,) = read_lines(folder / "events.jsonl")
    assert (event["level"], event["picture"]) == ("ERROR", "watch/step-000004.png")
    (session,) = recorded(folder, "train")
    assert session.alerts == ["step 4: soft"] and any(path.endswith(".png") for path in session.files)
    assert [row["alerts/frames.caption"] for row in session.history if "alerts/frames.caption" in row] == [
        "step 4: soft: lost fine detail"
    ]


def test_an_offline_run_holds_everything(
    tmp_path: Path, config: Config, clip: np.ndarray, recorded, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("sys.argv", ["cogflow", "stage=train", f"hf_token=hf_{'s' * 30}"])
    folder = tmp_path / "demo"
    video, product = folder / "samples" / "a.mp4", tmp_path / "product"
    write_video(video, clip, 8)
    product.mkdir()
    (product / "weights.bin").write_bytes(b"w" * 100)
    (product / ".weights.partial-1").write_bytes(b"half")
    with open_tracker(config, "train", folder) as tracker:
        assert Path(tracker.url_or_dir).parent == folder / "wandb"
        tracker.log(1, {"train/loss": 0.5, "other/thing": 2})
        tracker.log(2, {"train/loss": math.nan})
        tracker.video(2, "samples/a", video, "a star")
        tracker.table("closing", ["stage", "video"], [["train", video], ["none", None]])
        tracker.artifact("latents", "dataset", video)
        tracker.artifact("pipe line", "model", product, uses=["latents", "never logged"])
        tracker.alert("blur", "samples are soft")
    (session,) = recorded(folder, "train")
    assert (session.group, session.job_type, session.exit_code) == ("demo", "train", 0)
    assert session.config["stage"]["steps"] == 4 and "torch" in session.config["versions"]
    assert session.history[0]["train/loss"] == 0.5 and session.history[0]["step"] == session.history[0]["_step"] == 1
    assert session.history[1]["samples/a._type"] == "video-file" and session.history[1]["samples/a.caption"] == "a star"
    assert session.history[1]["closing._type"] == "table-file"
    assert any(path.endswith(".mp4") for path in session.files)
    assert {session.axes[name] for name in ("train/*", "heldout/*", "sharpness/*", "samples/*", "other/*")} == {"step"}
    assert session.alerts == ["blur"]
    (artifact,) = [one for one in session.logged if one.type == "model"]
    assert artifact.name == "demo-pipe-line" and json.loads(artifact.metadata)["uses"] == ["demo-latents"]
    (latents,) = [one for one in session.logged if one.name == "demo-latents"]
    assert [(one.name, one.digest) for one in session.used] == [("demo-latents", latents.digest)]
    assert [entry.path for entry in artifact.manifest.contents] == ["weights.bin"]
    assert {"video", "table", "artifact", "alert"} == {event["kind"] for event in read_lines(folder / "events.jsonl")}
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"k" * 40 not in path.read_bytes() and b"s" * 30 not in path.read_bytes(), f"{path} holds a secret"


def test_a_second_process_continues_the_same_id(tmp_path: Path, config: Config, recorded) -> None:
    folder = tmp_path / "demo"
    with open_tracker(config, "train", folder) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"train/loss": 1.0 / step})
    with open_tracker(config, "train", folder) as tracker:
        tracker.rewind(2)
        for step in (3, 4):
            tracker.log(step, {"train/loss": 1.0 / step})
    with open_tracker(config, "export", folder) as tracker:
        assert tracker.url_or_dir.endswith("-export")
    first, second = recorded(folder, "train")
    assert first.run_id == second.run_id and recorded(folder, "export")[0].run_id != first.run_id
    assert [row["_step"] for row in first.history] == [1, 2, 3] and [row["_step"] for row in second.history] == [3, 4]
    assert steps(folder) == [1, 2, 3, 4]


def test_a_rewind_within_a_process_loses_no_row(tmp_path: Path, config: Config, recorded) -> None:
    with open_tracker(config, "train", tmp_path) as tracker:
        for step in (1, 2, 3, 2, 3):
            tracker.log(step, {"train/loss": float(step)})
    (session,) = recorded(tmp_path, "train")
    assert [row["step"] for row in session.history] == [1, 2, 3, 2, 3]


SECOND = RunLine(2, "2026-01-01T00:00:00Z", "rollback after step 3: lost fine detail", "", {}, from_step=1)


def test_a_new_line_is_another_wandb_run_and_loses_no_row(tmp_path: Path, config: Config, recorded) -> None:
    with open_tracker(config, "train", tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"train/loss": float(step)})
        began = time.monotonic()
        tracker.begin_line(SECOND)
        assert time.monotonic() - began < 5
        tracker.begin_line(SECOND)
        for step in (2, 3, 4):
            tracker.log(step, {"train/loss": 10.0 * step})
    (first,), (second,) = recorded(tmp_path, "train"), recorded(tmp_path, "train-line2")
    assert [row["train/loss"] for row in first.history] == [1.0, 2.0, 3.0]
    assert [row["train/loss"] for row in second.history] == [20.0, 30.0, 40.0]
    assert [row["_step"] for row in second.history] == [2, 3, 4]
    assert (first.exit_code, second.exit_code, first.group) == (0, 0, second.group)
    assert (first.name, second.name) == ("demo train", "demo train line 2, from step 1")
    assert second.config["line"] == {
        "number": 2, "from_step": 1, "reason": SECOND.reason, "replaces": first.run_id
    }  # fmt: skip


def test_a_line_that_begins_before_the_first_value_leaves_no_empty_run(
    tmp_path: Path, config: Config, recorded
) -> None:
    with open_tracker(config, "train", tmp_path) as tracker:
        tracker.begin_line(SECOND)
        tracker.rewind(1)
        tracker.log(2, {"train/loss": 1.0})
    assert recorded(tmp_path, "train") == [] and len(recorded(tmp_path, "train-line2")) == 1
    write_record(tmp_path / HistoryRecord.file_name, HistoryRecord([SECOND]))
    with open_tracker(config, "train", tmp_path) as tracker:  # a resume continues the id
        tracker.log(3, {"train/loss": 1.0})
    first, second = recorded(tmp_path, "train-line2")
    assert first.run_id == second.run_id


def test_a_new_line_begins_when_wandb_is_broken(tmp_path: Path, config: Config, monkeypatch, capsys) -> None:
    with open_tracker(config, "train", tmp_path) as tracker:
        tracker.log(1, {"train/loss": 1.0})

        def broken(**_: object) -> None:
            raise RuntimeError("no service")

        monkeypatch.setattr(wandb, "init", broken)
        tracker.begin_line(SECOND)
        tracker.log(2, {"train/loss": 1.0})
        tracker.begin_line(dataclasses.replace(SECOND, number=3))
        tracker.log(3, {"train/loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert "could not start; going on without it" in capsys.readouterr().out


def test_a_large_artifact_is_recorded_by_its_paths(tmp_path: Path, config: Config, recorded) -> None:
    product = tmp_path / "weights.bin"
    product.write_bytes(b"w" * 2000)
    small = dataclasses.replace(config, tracking=TrackingConfig(upload_mb=0.001))
    with open_tracker(small, "train", tmp_path / "demo") as tracker:
        tracker.artifact("weights", "model", product)
    (artifact,) = recorded(tmp_path / "demo", "train")[0].logged
    (entry,) = artifact.manifest.contents
    assert entry.ref == product.as_uri() and not entry.local_path


def test_an_input_is_an_artifact_of_this_run_or_a_reference(tmp_path: Path, config: Config, recorded) -> None:
    folder, base = tmp_path / "demo", tmp_path / "base"
    for path in (folder / "checkpoints/step-000004/trainer.json", folder / "diagnosis.json", base / "model.bin"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    with open_tracker(config, "train", folder) as tracker:
        tracker.artifact("diagnosis", "report", [folder / "diagnosis.json"])
        tracker.artifact("checkpoint", "checkpoint", [folder / "checkpoints/step-000004/trainer.json"])
    with open_tracker(config, "export", folder) as tracker:
        source = tracker.input(folder / "checkpoints/step-000004/transformer", "source")
        model = tracker.input(base, "base-model")
        assert (source, model) == ("demo-checkpoint", "demo-base-model")
        tracker.artifact("export", "model", base, uses=[source, model])
    (training,), (export,) = recorded(folder, "train"), recorded(folder, "export")
    found, outside = export.used
    assert found.digest == next(one for one in training.logged if one.name == source).digest
    assert [entry.ref for entry in outside.manifest.contents] == [(base / "model.bin").as_uri()]
    assert [event["uses"] for event in read_lines(folder / "events.jsonl")][-1] == [source, model]


def test_versions_of_a_large_artifact_differ_by_its_manifest(tmp_path: Path, config: Config, recorded) -> None:
    small = dataclasses.replace(config, tracking=TrackingConfig(upload_mb=0.0))
    product = tmp_path / "product"
    product.mkdir()
    (product / "weights.bin").write_bytes(b"w")
    with open_tracker(small, "train", tmp_path / "demo") as tracker:
        for version in "ab":
            (product / "manifest.json").write_text(version)
            tracker.artifact("weights", "model", product)
    first, second = recorded(tmp_path / "demo", "train")[0].logged
    assert first.digest != second.digest


def test_a_failing_stage_marks_its_run_as_failed_and_raises(tmp_path: Path, config: Config, recorded) -> None:
    with pytest.raises(ZeroDivisionError), open_tracker(config, "train", tmp_path):
        raise ZeroDivisionError
    assert recorded(tmp_path, "train")[0].exit_code == 1


def test_the_stage_continues_when_wandb_cannot_start(tmp_path: Path, config: Config, monkeypatch, capsys) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    with open_tracker(config, "train", tmp_path) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.artifact("a", "model", tmp_path / "metrics.jsonl")
        assert tracker.url_or_dir == ""
    assert steps(tmp_path) == [1]
    assert capsys.readouterr().out.count("warning: W&B") == 1


def test_wandb_is_not_called_after_several_failures(tmp_path: Path, config: Config, monkeypatch, capsys) -> None:
    class Broken:
        step = 0

        def __getattr__(self, name: str) -> object:
            raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    with open_tracker(config, "train", tmp_path) as tracker:
        for step in range(1, 20):
            tracker.log(step, {"train/loss": 1.0})
        tracker.alert("title", "text")
    assert steps(tmp_path) == list(range(1, 20))
    printed = capsys.readouterr().out
    assert printed.count("warning: W&B") <= 5 and "left alone" in printed


def test_an_unreachable_server_makes_the_run_offline_in_time(
    tmp_path: Path, config: Config, monkeypatch, capsys, recorded
) -> None:
    with socket.socket() as taken:  # bound but not listening: the port refuses
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setitem(wandb_run.SETTINGS, "init_timeout", 2.0)
        began = time.monotonic()
        with open_tracker(config, "train", tmp_path) as tracker:
            tracker.log(1, {"train/loss": 1.0})
        assert time.monotonic() - began < 30
    assert "going on offline" in capsys.readouterr().out
    assert steps(tmp_path) == [1] and recorded(tmp_path, "train")[-1].history[0]["train/loss"] == 1.0


def test_online_without_a_key_becomes_offline_with_a_warning(monkeypatch, tmp_path: Path, capsys) -> None:
    assert choose_mode("online") == "offline" and "no key" in capsys.readouterr().out
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_mode("online") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert choose_mode("online") == "offline"


def test_the_environment_variable_overrides_the_setting(monkeypatch, capsys) -> None:
    assert choose_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode("offline") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("online") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    assert choose_mode("online") == "offline" and "sometimes" in capsys.readouterr().out


def test_wandb_gets_the_systems_metrics_but_no_names_of_machine_and_user(
    tmp_path: Path, config: Config, monkeypatch, recorded
) -> None:
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    names = {"name-of-the-user", "name-of-the-host", socket.gethostname()} | addresses
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-the-host")
    for variable in ("LOGNAME", "USER", "WANDB_USERNAME", "WANDB_HOST"):
        monkeypatch.setenv(variable, "name-of-the-user")
    monkeypatch.setenv("HOME", "/home/name-of-the-user")
    given = dataclasses.replace(config, run=dataclasses.replace(config.run, root="/home/name-of-the-user/runs"))
    with open_tracker(given, "train", tmp_path) as tracker:
        tracker.log(1, {"train/loss": 1.0})
    (session,) = recorded(tmp_path, "train")
    assert {"memory_percent", "proc.memory.rssMB", "proc.cpu.threads"} <= session.stats
    assert session.host == "" and session.config["run"]["root"] == "~/runs"
    data = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/**/*") if path.is_file())
    # A short name of a machine, such as "vm", is part of other words.
    assert [name for name in names if len(name) > 4 and name.encode() in data and not name.startswith("127.")] == []


def test_ids_in_the_environment_join_no_stages(tmp_path: Path, config: Config, monkeypatch, recorded, capsys) -> None:
    foreign = {"RUN_ID": "abc", "RESUME": "must", "RESUME_FROM": "abc?_step=1", "SWEEP_ID": "abc"}
    for name, value in foreign.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    ids = []
    for stage in ("prepare", "train", "train"):
        with open_tracker(config, stage, tmp_path) as tracker:
            tracker.log(1, {"train/loss": 1.0})
        ids.append(recorded(tmp_path, stage)[-1].run_id)
    assert ids[0] != ids[1] == ids[2] and "abc" not in ids
    assert os.environ["WANDB_RUN_ID"] == "abc"
    assert capsys.readouterr().out.count("ignores WANDB_RUN_ID, WANDB_RESUME, WANDB_RESUME_FROM, WANDB_SWEEP_ID:") == 1


def test_disabled_wandb_still_writes_the_run_files(tmp_path: Path, config: Config, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_tracker(config, "train", tmp_path) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.table("t", ["a"], [[math.nan]])
    assert steps(tmp_path) == [1] and read_lines(tmp_path / "events.jsonl")[0]["rows"] == [[None]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path: Path, config: Config, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with open_tracker(config, "train", tmp_path / "demo") as tracker:
        assert type(tracker) is Tracker
        tracker.log(1, {"train/loss": 1.0})
        tracker.alert("a", "b")
    assert not (tmp_path / "demo").exists()
