"""Test that files without a version, as earlier versions of cogflow wrote them, are read into the present layout."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cogflow.errors import DataError
from cogflow.files.record_io import parse_record, record_values
from cogflow.records.cache_records import CacheIndex, StoredClip
from cogflow.records.ladder_records import ChangeInterval, LadderRecord, WatchFinding
from cogflow.records.pipeline_records import DiagnosisRecord
from cogflow.records.run_records import HeartbeatRecord
from cogflow.records.training_records import HeldoutLoss, TrainerRecord

TRAINER: dict[str, Any] = {
    "step": 150,
    "family": "tiny",
    "model": {"name": "tiny", "path": None, "dtype": "auto"},
    "trained_with": {"scaling_factor": 0.7, "snr_shift_scale": 1.0, "dtype": "fp32"},
    "identity": {"stage.seed": 0, "stage.freeze": [], "data": "3eff"},
    "layout": {
        "stage.batch_size": 8,
        "stage.gradient_accumulation": 1,
        "world size": 2,
        "deepspeed.zero_stage": 2,
        "deepspeed.offload_optimizer": False,
    },
    "settings": {
        "steps": 150,
        "learning_rate": 1e-5,
        "schedule": "cosine",
        "warmup_steps": 10,
        "min_lr_ratio": 0.1,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "gradient_clipping": 1.0,
        "text_dropout": 0.1,
        "ema_decay": 0.0,
        "ema_every": 1,
        "ema_warmup": True,
        "on_spike": "log",
    },
    "quiet": 75,
    "owed": True,
    "trend": {"quarters": {"losing mid 1": {"n": 20, "mean": 0.5}}, "means": {}, "told": {"losing alarm": 30}},
    "averages": {"first": 0.25, "behind": 2, "told": 60},
    "overfitting": {"lowest": [100, 0.125], "above": 1, "told": None},
    "heldout": {"step": 150, "loss": None},
}


def test_a_trainer_json_without_a_version_keeps_its_state() -> None:
    trainer = parse_record(json.dumps(TRAINER), TrainerRecord, "trainer.json")
    assert (trainer.last_good_step, trainer.pending, trainer.layout.sequence_parallel) == (75, True, 1)
    monitor, evaluation = trainer.callbacks.step_monitor, trainer.callbacks.evaluation
    assert monitor.trend.reported == {"losing alarm": 30}
    assert evaluation.ema_check.reported_step == 60
    assert evaluation.overfitting.lowest == HeldoutLoss(100, 0.125)
    assert evaluation.last is not None
    assert math.isnan(evaluation.last.loss)
    assert trainer.trained_with.known() == {"scaling_factor": 0.7, "snr_shift_scale": 1.0, "dtype": "fp32"}
    quarter = monitor.trend.quarters["losing mid 1"]
    assert (type(quarter["n"]), type(quarter["mean"])) == (int, float)


def test_a_layout_keeps_the_names_of_the_settings() -> None:
    trainer = parse_record(json.dumps(TRAINER), TrainerRecord, "trainer.json")
    assert record_values(trainer)["layout"] == {**TRAINER["layout"], "parallel.sequence": 1}


def test_a_ladder_without_a_version_keeps_its_rungs() -> None:
    watch = {"kind": "soft", "level": "alarm", "channel": "detail", "size": -1.0, "line": "softer"}
    ladder = {
        "rungs": {
            "1": {"panels": {}, "facts": {}},
            "2": {
                "panels": {"a.mp4": {"detail": 0.5}},
                "facts": {
                    "identity": {
                        "cache": "c",
                        "vae": "v",
                        "scaling_factor": 0.7,
                        "vae_scaling_factor": 0.7,
                        "dtype": "fp32",
                        "tiling": False,
                        "device": "cpu",
                        "wanted": 1,
                    },
                    "psnr": {"a.mp4": 30.0},
                    "clips": {"a.mp4": {"detail": 0.75}},
                    "non_finite": [],
                    "scales": {"1": 30.0, "0.5": None},
                },
            },
            "4": {"panels": {"p-seed0": {"detail": None}}, "facts": {"step": 3, "weights": "ema", "watch": [watch]}},
        },
        "variants": {"2": {"bf16": {"chosen": True, "psnr": 58.0, "finite": 1.0}, "fp16": {"chosen": False}}},
        "findings": [{"rung": 4, "kind": "soft", "level": "alarm", "line": "", "channel": "detail", "size": None}],
        "table": [
            {
                "rung": 4,
                "name": "tuned",
                "count": 1,
                "against": 3,
                "paired": True,
                "pairs": 1,
                "psnr": None,
                "changes": {"blur": {"size": 1, "low": 0.5, "high": 1.5}},
                "verdict": "alarm: soft",
            }
        ],
    }
    read = parse_record(json.dumps(ladder), LadderRecord, "ladder.json")
    assert read.rungs.clip is None
    assert read.rungs.roundtrip is not None
    assert read.rungs.roundtrip.variants["bf16"].psnr == 58.0
    assert read.rungs.roundtrip.clips == {"a.mp4": {"detail": 0.75}}
    assert read.rungs.tuned is not None
    assert read.rungs.tuned.watch == [WatchFinding("soft", "alarm", "detail", -1.0, "softer")]
    assert math.isnan(read.rungs.tuned.metrics["p-seed0"]["detail"])
    assert (read.findings[0].metric, read.findings[0].size) == ("detail", None)
    assert read.table[0].changes == {"blur": ChangeInterval(1.0, 0.5, 1.5)}


def test_a_stored_clip_without_a_version_keeps_its_measurement() -> None:
    source = {"panel": {"grain": 0.5}, "effective": [64, 96], "scaled_up": True, "reach": [0.5, 0.5], "detail": -1.0}
    facts = {"upscaled": False, "size": [128, 192], "fps": 16.0, "frames": 17}
    clip = parse_record(json.dumps({**facts, "panel": {"grain": 1}, "source": source, "detail": -2}), StoredClip, "a")
    assert clip.measurement is not None
    assert (clip.measurement.source.effective, clip.measurement.source.metrics) == ((64, 96), {"grain": 0.5})
    assert parse_record(json.dumps(facts), StoredClip, "b").measurement is None


def test_a_diagnosis_without_a_version_keeps_its_conclusions() -> None:
    finding = {
        "rung": 5,
        "component": "vae",
        "field": "scaling_factor",
        "kind": "config",
        "candidate": 1.15,
        "reference": 0.7,
        "confidence": 0.9,
        "why": "washed out",
        "fix": "stage.vae=x",
    }
    old = {
        "agrees": False,
        "verdict": "one finding",
        "findings": [finding],
        "notes": [],
        "acquitted": ["vae"],
        "steps": {"facts": {"lines": []}},
        "candidate": "a",
        "reference": "b",
        "command": "c",
        "mended": {"where": "m", "status": "healed", "line": "good", "left": []},
    }
    diagnosis = parse_record(json.dumps(old), DiagnosisRecord, "diagnosis.json")
    assert diagnosis.ruled_out == ["vae"]
    assert diagnosis.repaired is not None
    assert (diagnosis.repaired.where, diagnosis.repaired.verify.line) == ("m", "good")
    assert record_values(diagnosis)["findings"] == [finding]


def test_a_heartbeat_without_a_version_keeps_its_phase() -> None:
    old = {"rank": 1, "host": "n1", "pid": 5, "what": "step 3: forward", "time": 1.5}
    assert parse_record(json.dumps(old), HeartbeatRecord, "rank").phase == "step 3: forward"


def test_a_cache_index_without_a_version_is_refused() -> None:
    with pytest.raises(DataError, match="run stage=prepare again"):
        parse_record("{}", CacheIndex, "index.json")
