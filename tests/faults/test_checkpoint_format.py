"""Test checkpoints of other versions: version 0 resumes to the bit, and a newer version is refused.

The recipe "Change what a checkpoint holds" of CONTRIBUTING.md names what these tests use.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cogflow.files.publish import write_manifest
from cogflow.files.record_io import read_record, write_record
from cogflow.records.training_records import TrainerRecord
from tests.faults.conftest import World, server_says
from tests.training.trainer_records import trainer_record

WORDS = ["stage.steps=4", "stage.save_every=0", "stage.evaluate_every=2", "stage.ema_decay=0.9"]


def version_0(record: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object ``record`` of version 1 with the keys of version 0."""
    monitor, evaluation = record["callbacks"]["step_monitor"], record["callbacks"]["evaluation"]
    lowest = evaluation["overfitting"]["lowest"]
    kept = ("step", "family", "model", "trained_with", "identity", "layout", "settings", "ema_updates", "validation")
    return {
        **{key: record[key] for key in kept},
        "owed": record["pending"],
        "quiet": record["last_good_step"],
        "trend": {
            "quarters": monitor["trend"]["quarters"],
            "means": monitor["trend"]["means"],
            "told": monitor["trend"]["reported"],
        },
        "spikes": monitor["spikes"],
        "skipped": monitor["skipped"],
        "averages": {
            "first": evaluation["ema_check"]["first"],
            "behind": evaluation["ema_check"]["behind"],
            "told": evaluation["ema_check"]["reported_step"],
        },
        "overfitting": {
            "lowest": [lowest["step"], lowest["loss"]] if lowest else None,
            "above": evaluation["overfitting"]["above"],
            "told": evaluation["overfitting"]["reported_step"],
        },
        "heldout": evaluation["last"],
    }


def rewrite(checkpoint: Path, values: dict[str, Any]) -> None:
    """Replace ``trainer.json`` and the manifest of a checkpoint."""
    (checkpoint / "trainer.json").write_text(json.dumps(values))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


@pytest.mark.slow
def test_a_checkpoint_of_version_0_resumes_to_the_bit(world: World) -> None:
    server_says(world.train("whole", *WORDS), 0)
    done = world.train("older", *WORDS, fault="usr1@backward#3")
    assert done.fired
    assert done.codes == [75], done.text[-3000:]
    (checkpoint,) = (world.root / "older/checkpoints").glob("step-*")
    written = json.loads((checkpoint / "trainer.json").read_text())
    before = read_record(checkpoint / "trainer.json", TrainerRecord)
    rewrite(checkpoint, version_0(written))
    assert read_record(checkpoint / "trainer.json", TrainerRecord) == before
    assert before.pending
    server_says(world.train("older", *WORDS), 0, "after step 2")
    assert world.losses("older") == world.losses("whole")
    assert world.states("older", 4) == world.states("whole", 4)


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_version_is_refused(world: World) -> None:
    server_says(world.train("newer", *WORDS, "stage.steps=2"), 0)
    checkpoint = world.root / "newer/checkpoints/step-000002"
    values = json.loads((checkpoint / "trainer.json").read_text())
    rewrite(checkpoint, {**values, "version": TrainerRecord.version + 1})
    server_says(world.train("newer", *WORDS), 2, "was written by a newer cogflow", "Update cogflow.")


def test_the_recipe_for_a_new_field_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow the recipe: raise the version, upgrade the older values, and read a checkpoint of the version before."""
    path = tmp_path / TrainerRecord.file_name
    write_record(path, trainer_record(3, pending=True))
    upgraded: list[int] = []

    def upgrade(values: dict[str, Any], version: int) -> dict[str, Any]:
        upgraded.append(version)
        return {**values, "last_good_step": values["step"]}

    monkeypatch.setattr(TrainerRecord, "version", TrainerRecord.version + 1)
    monkeypatch.setattr(TrainerRecord, "upgrade", staticmethod(upgrade))
    assert read_record(path, TrainerRecord) == trainer_record(3, pending=True, last_good_step=3)
    assert upgraded == [TrainerRecord.version - 1]
    write_record(path, trainer_record(4))
    read_record(path, TrainerRecord)
    assert len(upgraded) == 1, "a record of the present version needs no upgrade"


def test_every_name_in_the_recipe_exists(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = text.split("## Change what a checkpoint holds")[1].split("\n## ")[0]
    paths = re.findall(r"`((?:cogflow|tests)/[\w/.]+)`", recipe)
    assert len(paths) == 2
    assert [path for path in paths if not (repository / path).exists()] == []
    for name in ("TrainerRecord", "version", "upgrade", "version_0"):
        assert f"`{name}`" in recipe
