"""Test that a W&B server that is unreachable, fails, hangs, is slow or dies does not disturb a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import World, server_says
from tests.faults.loopback import Loopback
from tests.faults.server import Done

pytestmark = pytest.mark.slow

KEY = "0123456789abcdef" * 2 + "01234567"
WORDS = ["stage.steps=8", "stage.save_every=0", "tracking.wandb=online"]
MOST_SECONDS = 60.0
"""Most seconds that a run may take longer in total on a busy machine.

By default W&B retries for minutes, in places for days.
"""

FAULTS = {
    # the server, the fault of the service, the message
    "hangs": (Loopback("hangs"), "", "W&B could not be reached; going on offline"),
    "hangs later": (Loopback("hangs", after=4), "", "W&B did not take"),
    "fails later": (Loopback("fails", after=4), "", "W&B did not take"),
    "slow": (Loopback("slow", after=4), "", ""),
    "killed": (Loopback("well"), "unserve@update#5", "W&B failed too often and is left alone"),
    "stands still": (Loopback("well"), "freeze@update#5", "W&B does not answer and is left alone"),
}


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Done:
    return server_says(world.train("without", *WORDS), 0)


def train(world: World, name: str, url: str, fault: str, folder: Path) -> Done:
    places = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    env = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY} | places
    return world.train(name, *WORDS, fault=f"impatient,{fault}", env=env, seconds=120)


@pytest.mark.parametrize("what", FAULTS)
def test_wandb_faults_neither_slow_training_nor_lose_lines(
    world: World, undisturbed: Done, tmp_path: Path, what: str
) -> None:
    server, fault, said = FAULTS[what]
    name = f"wandb-{what.replace(' ', '-')}"
    with server:
        done = train(world, name, server.url, fault, tmp_path)
    server_says(done, 0, said)
    assert done.fired == ([fault] if fault else [])
    assert server.how == "well" or server.misbehaved, "W&B never came to the server's fault"
    assert done.seconds < undisturbed.seconds + MOST_SECONDS
    assert world.losses(name) == world.losses("without") and len(world.losses(name)) == 8
    lines = [(world.root / run / "metrics.jsonl").read_text().splitlines() for run in (name, "without")]
    assert [json.loads(line).keys() for line in lines[0]] == [json.loads(line).keys() for line in lines[1]]
    files = [path for folder in (world.root / name, tmp_path) for path in folder.rglob("*") if path.is_file()]
    # The key was used, and no file contains it.
    assert KEY in server.keys and not any(KEY.encode() in body for body in server.bodies)
    assert files and [path for path in files if KEY.encode() in path.read_bytes()] == [] and KEY not in done.text
