"""Fuzz the readers of foreign files: with a fixed seed in every run, longer with ``COGFLOW_FUZZ_SECONDS``.

``COGFLOW_FUZZ_SECONDS=600 pytest tests/security/test_fuzzing.py -m slow`` gives each reader ten minutes. The operating
system limits memory and time: a reader that hangs or takes more is ended, and the test fails.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from confined import GIGABYTE, deadline, run_confined
from fuzz_targets import TARGETS, Target
from hypothesis import HealthCheck, Phase, given, seed, settings

from cogflow.errors import UserError

EXAMPLES = 60
"""Inputs of each reader in every run of the tests."""
MOST_SECONDS = 5.0
"""Time that one input may take on a loaded machine."""
LONG = float(os.environ.get("COGFLOW_FUZZ_SECONDS", "0"))


def fuzz(target: Target, examples: int, number: int) -> None:
    """Read ``examples`` drawn inputs; raise for the smallest input that fails."""
    folder = Path(tempfile.mkdtemp(prefix="cogflow-fuzz-"))

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(target.inputs)
    def read(drawn: Any) -> None:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        began = time.monotonic()
        try:
            target.read(work, drawn)
        except UserError as error:
            str(error).encode()
        assert time.monotonic() - began < MOST_SECONDS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_raises_only_errors_of_the_user(name: str) -> None:
    run_confined(lambda: fuzz(TARGETS[name], EXAMPLES, 1), seconds=120, memory=2 * GIGABYTE)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="COGFLOW_FUZZ_SECONDS is not set")
@pytest.mark.timeout(LONG + 600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_raises_only_errors_of_the_user_for_long(name: str) -> None:
    def work() -> None:
        over, number = deadline(LONG), int(time.time())
        while not over():
            fuzz(TARGETS[name], 500, number)
            number += 1

    run_confined(work, seconds=int(LONG) + 500, memory=2 * GIGABYTE)
