"""Each fault is found at its rung and in time, and healthy runs raise no alarm.

The tests train the tiny model with the command line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command
from tests.scenarios.outcome import read
from tests.scenarios.scenario import SCENARIOS, Scenario, Size, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SHORT = Size(clips=32, steps=20, batch_size=4, sample_every=10, prompts=4, sampling_steps=6)
"""Two validations after the first, within which an alarm must be raised. docs/scenarios.md shows longer runs."""
BEFORE_TRAINING = Size(clips=32, steps=2, batch_size=4, sample_every=2, prompts=2, sampling_steps=6)
"""Enough for faults at the rungs before that of trained samples."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenarios")


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS.values() if s.rung is not None], ids=lambda s: s.letter)
def test_a_fault_is_found_at_its_rung(root: Path, cogflow: Command, scenario: Scenario) -> None:
    is_before_training = scenario.rung is not None and scenario.rung < 4
    size = BEFORE_TRAINING if is_before_training else SHORT
    # Half precision is slow on a CPU: fewer clips go through the VAE.
    words = ("sampling.roundtrip_clips=2",) if scenario.letter == "g" else ()
    outcome = read(run(root, scenario, size, 0, *words, command=cogflow))
    rungs = [notice.rung for notice in outcome.alarmed_by(2)]
    assert scenario.rung in rungs, f"{scenario.title}: {outcome.alarms} {outcome.watch} {outcome.ladder}"
    # No earlier rung raises an alarm.
    assert min(rung for rung in rungs if rung is not None) == scenario.rung


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS.values() if s.quiet], ids=lambda s: s.letter)
def test_a_healthy_scenario_raises_no_alarm(root: Path, cogflow: Command, scenario: Scenario) -> None:
    outcome = read(run(root, scenario, SHORT, command=cogflow))
    assert outcome.alarms == [], scenario.title
    assert all(notice.level != "alarm" for notice in outcome.indicator)
