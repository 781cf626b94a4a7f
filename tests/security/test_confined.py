"""Test that the limits of a confined child end it, and that its errors are reported."""

from __future__ import annotations

import time

import pytest
from confined import GIGABYTE, LimitExceededError, run_confined


def allocate() -> None:
    bytearray(4 * GIGABYTE)


def fail() -> None:
    raise ValueError("the reason")


def test_a_child_within_its_limits_succeeds() -> None:
    run_confined(lambda: None, 5)


def test_errors_memory_and_time_of_a_child_are_reported() -> None:
    with pytest.raises(LimitExceededError, match="the reason"):
        run_confined(fail, 5)
    with pytest.raises(LimitExceededError, match="MemoryError"):
        run_confined(allocate, 5)
    with pytest.raises(LimitExceededError, match="SIGALRM"):
        run_confined(lambda: time.sleep(30), 1)
