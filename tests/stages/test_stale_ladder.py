"""Test that the ladder of a run that trains on after its export marks the exported rung as one of an earlier step."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import Command


@pytest.mark.slow
def test_the_exported_rung_of_an_earlier_step_is_not_ok(flow: Path, cogflow: Command) -> None:
    run = flow.parent / "longer"
    shutil.copytree(flow, run)
    words = ["stage=train", "debug=quick", f"run.root={flow.parent}", "run.name=longer"]
    done = cogflow(*words, "stage.steps=6", "stage.sample_every=6")
    assert "note: rung 5 is of step 4, before the present step 6: export again: python -m cogflow stage=" in done.stdout
    rows = {row["rung"]: row for row in json.loads((run / "ladder.json").read_text())["table"]}
    assert (rows[4]["step"], rows[4]["verdict"]) == (6, "ok")
    assert rows[5]["step"] == 4 and rows[5]["stale"] == "of step 4, before the present step 6"
    assert rows[5]["verdict"].startswith("of step 4, before the present step 6")
    # The samples of step 4 are still there: the export equals them, whatever the later steps did.
    assert rows[5]["against"] == 4 and abs(rows[5]["changes"]["wavelet_ratio"]["size"]) < 0.01
    page = (run / "report.html").read_text()
    assert "of step 4, before the present step 6" in page and "export again" in page
    for command in rows[5]["renewal"].split(" && "):
        renewed = cogflow(*shlex.split(command)[3:])
    row = json.loads((run / "ladder.json").read_text())["table"][5]
    assert (row["step"], row["verdict"]) == (6, "ok") and "of step 4" not in renewed.stdout
