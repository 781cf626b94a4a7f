"""Test exact resume after a real signal in mid-accumulation, at the end of an epoch, and around evaluations and saves.

All metrics, weights, EMA, master weights and moments equal those of the uninterrupted run to the bit, under ZeRO 0 to 3
on one rank and on two. With another number of ranks or another stage they agree to rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import small
from tests.faults.server import Server

pytestmark = pytest.mark.slow

EVERY_STEP = "0+1+2+3+4"
SOME = "1+2+3"
"""The step before held-out losses, the epoch's edge, the step before held-out losses and a save."""


@pytest.fixture(scope="module")
def root(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resuming")
    shutil.copytree(prepared, root / "prepared")
    small.pipeline(root / "model")
    return root


Ran = Callable[..., dict[str, Any]]


FEWER_HEADERS = """\
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>
namespace torch { using at::Tensor; constexpr auto kFloat32 = at::kFloat; }
"""
"""All that DeepSpeed's Adam needs of ``torch/extension.h``. The other headers take 25 seconds in each of two files."""


def fast_compiler(folder: Path) -> Path:
    """Return a C++ compiler that compiles DeepSpeed's Adam in a third of the time: with few headers and optimisations.

    The Adam is as exact. With another version of DeepSpeed, which needs more, it takes all headers.
    """
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "extension.h").write_text(FEWER_HEADERS)
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nc++ -I{folder} "$@" -O1 -g0 2>/dev/null || exec c++ "$@" -O1 -g0\n')
    compiler.chmod(0o755)
    return compiler


@pytest.fixture(scope="module")
def ran(root: Path, server: Server) -> Ran:
    """Return a function that runs cases on a number of ranks and returns their results by name."""
    compiler = fast_compiler(root / "compiler")

    def run(ranks: int, *cases: str) -> dict[str, Any]:
        done = server.run(
            str(root), *cases, ranks=ranks, seconds=900, program="tests.training.resuming", env={"CXX": str(compiler)}
        )
        assert done.codes == [0] * ranks, done.text[-6000:]
        return {case: json.loads((root / f"{case.replace(':', '-')}-{ranks}.json").read_text()) for case in cases}

    return run


def equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["numbers"] == two["numbers"]
    assert one["files"] == two["files"] and len(one["files"]) == 2  # the weights and their averages
    assert one["optimizer"] == two["optimizer"]


def close(one: dict[str, Any], two: dict[str, Any]) -> None:
    for step, values in one["numbers"].items():
        for name in ("train/loss", "train/grad_norm", "heldout/loss", "ema/heldout_loss"):
            if name in values:
                assert two["numbers"][step][name] == pytest.approx(values[name], rel=1e-5), (step, name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_and_resumed_run_is_equal_to_the_bit(ran: Ran, ranks: int) -> None:
    """Every place to stop in one stage for each number of ranks, and one place in the other stages."""
    places = {"zero2": EVERY_STEP} if ranks == 1 else {"zero3": SOME}
    cases = [f"stopped:{zero}:{places.get(zero, '2')}" for zero in ("zero0", "zero1", "zero2", "zero3")]
    for case, found in ran(ranks, *cases).items():
        signals = len(case.split("+"))
        assert found["codes"] == [75] * signals + [0] and found["fired"] == signals, case
        assert len(found["whole"]["numbers"]) >= 6
        equal(found["whole"], found["stopped"])


def test_a_run_resumed_under_another_zero_stage_agrees_to_rounding(ran: Ran) -> None:
    cases = ["resharded:zero2:zero3", "resharded:zero3:zero1", "resharded:zero1:zero0", "resharded:zero0:zero2"]
    for found in ran(1, *cases).values():
        close(found["whole"], found["changed"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its Adam for the host")
def test_offloaded_states_resume_to_the_bit_and_reshard(ran: Ran) -> None:
    found = ran(
        1,
        "stopped:zero2_offload:2",
        "stopped:zero3_offload:2",
        "resharded:zero2:zero2_offload",
        "resharded:zero2_offload:zero3",
    )
    for zero in ("zero2_offload", "zero3_offload"):
        one = found[f"stopped:{zero}:2"]
        assert one["codes"] == [75, 0] and one["fired"] == 1
        equal(one["whole"], one["stopped"])
    close(found["stopped:zero2_offload:2"]["whole"], found["resharded:zero2:zero2_offload"]["whole"])
    for case in ("resharded:zero2:zero2_offload", "resharded:zero2_offload:zero3"):
        close(found[case]["whole"], found[case]["changed"])


def test_a_run_resumed_on_another_number_of_ranks_agrees_to_rounding(ran: Ran) -> None:
    """Two ranks in ZeRO-3 to one in ZeRO-2."""
    one = ran(1, "whole:zero2", "first_half:zero2:one-to-two")
    two = ran(2, "first_half:zero3:two-to-one", "resume:zero3:one-to-two")
    assert one["first_half:zero2:one-to-two"]["code"] == two["first_half:zero3:two-to-one"]["code"] == 75
    close(one["whole:zero2"]["whole"], two["resume:zero3:one-to-two"]["changed"])
    close(one["whole:zero2"]["whole"], ran(1, "resume:zero2:two-to-one")["resume:zero2:two-to-one"]["changed"])
