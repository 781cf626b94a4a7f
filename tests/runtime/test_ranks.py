"""Test how a process learns its rank under SLURM, and that a rank that never starts is named."""

from __future__ import annotations

import os
import socket

import pytest

from cogflow import rank_identity
from cogflow.errors import ConfigError, RankLost
from cogflow.rank_identity import adopt_slurm_step, first_host, step_variables, tasks_per_node
from cogflow.runtime import ranks

STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
"""Variables of a task of ``srun -N2 -n4``, as SLURM 22.05 sets them."""

BATCH = {
    "SLURM_JOB_ID": "5",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_TASKS_PER_NODE": "2",
    "SLURM_NODELIST": "n1",
}
"""Variables of a batch script of ``sbatch -n2``."""


def test_a_task_of_a_step_has_its_rank_from_slurm() -> None:
    assert step_variables(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": "20192",
    }


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({}, id="no SLURM"),
        pytest.param(BATCH, id="batch script"),
        pytest.param({"SLURM_JOB_ID": "4", "SLURM_NTASKS": "2"}, id="shell of salloc"),
        pytest.param({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, id="srun --pty"),
        pytest.param({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)}, id="interactive step"),
    ],
)
def test_other_processes_of_slurm_are_one_process(env: dict[str, str]) -> None:
    assert step_variables(env) is None


def test_a_task_that_sees_one_gpu_uses_number_0() -> None:
    found = step_variables({**STEP, "CUDA_VISIBLE_DEVICES": "3"})
    assert found is not None and found["LOCAL_RANK"] == "0"
    found = step_variables({**STEP, "CUDA_VISIBLE_DEVICES": "0,1"})
    assert found is not None and found["LOCAL_RANK"] == "1"


def test_steps_of_one_job_have_different_ports() -> None:
    ports = {
        (step_variables({**STEP, "SLURM_STEP_ID": str(step), "SLURM_JOB_ID": job}) or {})["MASTER_PORT"]
        for step in range(4)
        for job in ("12", "13")
    }
    assert len(ports) == 8


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3,5]", "n1"),
        ("n[5,7]", "n5"),
        ("gpu-a-[007-009],x", "gpu-a-007"),
        ("rack[1-2]n[01-04]", "rack1n01"),
        ("a1,b[2,4]", "a1"),
        ("n[3].cluster", "n3.cluster"),
    ],
)
def test_the_first_host_of_a_host_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_the_tasks_of_each_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4] and tasks_per_node("") == []


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process a task of a step; the test's changes of the environment are undone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)


def test_variables_of_torchrun_take_precedence(step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    adopt_slurm_step()
    assert rank_identity.rank() == 1 and "MASTER_ADDR" not in os.environ


def test_the_address_on_one_node_is_the_node_itself(step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    adopt_slurm_step()
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank()) == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_an_address_that_nobody_knows_is_a_user_error(step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", "no-such-node-[1-2]")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no-such-node-1, cannot be resolved") as error:
        adopt_slurm_step()
    assert "MASTER_ADDR" in str(error.value)


def test_a_rank_that_never_starts_is_named(
    step: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "PATIENCE", 0.1)
    monkeypatch.setattr(ranks, "JOIN_TIMEOUT", ranks.JOIN_TIMEOUT / 600)
    with pytest.raises(RankLost, match="The 3 ranks did not meet at 127.0.0.1") as lost:
        ranks.setup()
    assert f"waiting for 3 ranks at 127.0.0.1:{port}" in capsys.readouterr().out
    assert "MASTER_PORT" in str(lost.value)
