"""Test the words about the step and the line that exported weights are from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cogflow.files.record_io import JsonValue, write_record
from cogflow.records.history_records import HistoryRecord, RunLine
from cogflow.records.run_records import MachineRecord, StageRecord
from cogflow.tracking.report_sections import stage_row
from cogflow.tracking.run_data import read_run
from cogflow.tracking.weights_origin import describe_origin, replaced_note


def line(
    number: int, from_step: int = 0, kept: int = -1, replaced: str | None = None, at: str | None = None
) -> RunLine:
    return RunLine(
        number=number,
        began="",
        reason="",
        command="",
        settings={},
        from_step=from_step,
        checkpoint=at,
        kept=kept,
        replaced=replaced,
    )


FIRST = line(1)
BACK_TO_6 = line(2, from_step=6, kept=6, replaced="replaced/01")
ANEW = line(3, replaced="replaced/02")
RESTORED_3 = line(4, from_step=3, replaced="replaced/03", at="replaced/02/checkpoints/step-000003")
RESTORED_8 = line(4, from_step=8, replaced="replaced/03", at="replaced/02/checkpoints/step-000008")
FROM_OUTSIDE = line(2, from_step=6, replaced="replaced/01", at="/elsewhere/checkpoints/step-000006")


@pytest.mark.parametrize(
    ("lines", "number", "step", "replaced"),
    [
        ([FIRST], 1, 12, None),
        ([FIRST, BACK_TO_6], 1, 12, "replaced/01"),
        ([FIRST, BACK_TO_6], 1, 6, None),
        ([FIRST, BACK_TO_6], 2, 12, None),
        ([FIRST, BACK_TO_6, ANEW], 1, 6, "replaced/02"),
        ([FIRST, BACK_TO_6, ANEW], 1, 12, "replaced/01"),
        ([FIRST, BACK_TO_6, ANEW], 2, 12, "replaced/02"),
        ([FIRST, BACK_TO_6, ANEW], 3, 12, None),
        ([FIRST, BACK_TO_6, ANEW, RESTORED_3], 1, 3, None),
        ([FIRST, BACK_TO_6, ANEW, RESTORED_8], 2, 8, None),
        ([FIRST, BACK_TO_6, ANEW, RESTORED_8], 1, 6, None),
        ([FIRST, BACK_TO_6, ANEW, RESTORED_3], 3, 12, "replaced/03"),
        ([FIRST, FROM_OUTSIDE], 1, 6, "replaced/01"),
    ],
)
def test_a_result_is_replaced_when_the_run_no_longer_holds_it(
    lines: list[RunLine], number: int, step: int, replaced: str | None, tmp_path: Path
) -> None:
    assert HistoryRecord(lines).replaced_in(number, step) == replaced
    write_record(tmp_path / "history.json", HistoryRecord(lines))
    note = f"exported from a line that was replaced ({replaced})" if replaced else ""
    assert replaced_note(tmp_path, number, step) == note


def test_the_origin_names_step_line_and_run() -> None:
    assert describe_origin("mine", 2, 12) == "from step 12 of line 2 of mine"
    assert describe_origin(None, None, 12) == "from step 12"
    assert describe_origin("mine", 2, None) == ""


def test_a_run_without_a_history_has_replaced_nothing(tmp_path: Path) -> None:
    assert replaced_note(tmp_path, 1, 12) == ""
    (tmp_path / "history.json").write_text("broken")
    assert replaced_note(tmp_path, 1, 12) == ""


def summary(folder: Path, results: Mapping[str, JsonValue]) -> str:
    record = StageRecord(
        stage="export",
        status="done",
        started="",
        finished="",
        seconds=1.0,
        command="",
        folder="",
        inputs={},
        results={"summary": "exported", **results},
        settings={},
        versions={},
        machine=MachineRecord("", 1, 1),
    )
    folder.mkdir(exist_ok=True)
    return stage_row(read_run(folder), record).summary


def test_the_report_names_the_origin_of_an_export_and_that_it_was_replaced(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    origin: dict[str, JsonValue] = {"weights_from": {"run": str(run), "line": 1, "step": 12}}
    assert summary(run, origin) == "exported; from step 12 of line 1 of mine"
    write_record(run / "history.json", HistoryRecord([FIRST, BACK_TO_6]))
    replaced = "exported; from step 12 of line 1 of mine; exported from a line that was replaced (replaced/01)"
    assert summary(run, origin) == replaced
    # In the report of another run, the whole path says which run it is.
    assert f"from step 12 of line 1 of {run}; exported from a line" in summary(tmp_path / "other", origin)
    assert summary(run, {"weights_from": {"run": None, "line": None, "step": 500}}) == "exported"
    assert summary(run, {}) == "exported"


def test_a_run_that_was_moved_still_names_its_own_line(tmp_path: Path) -> None:
    run = tmp_path / "moved" / "mine"
    run.parent.mkdir()
    assert summary(run, {"weights_from": {"run": "/gone/mine", "line": 1, "step": 3}}).endswith("of line 1 of mine")
