"""Rank of this process, from torchrun's variables, or from those of a SLURM step that started several tasks.

It imports no torch, so that the command line can ask before it prints anything.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping

from cogflow.errors import ConfigError

_FIRST_PORT, _PORTS = 20000, 12000
_LAST_STEP = 0xFFFF_FFF0
"""Step ids from here on are no steps of srun: the batch script, an interactive shell and other special steps."""


def rank() -> int:
    """Return the number of this process among all processes, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def adopt_slurm_step() -> None:
    """Set torchrun's variables from those of the SLURM step that this process is a task of.

    It does nothing under torchrun, in a step of one task, and outside of steps: a batch script and a shell of salloc
    have the number of tasks of their job in ``SLURM_NTASKS``, but are one process. Raises :class:`ConfigError` when the
    address of rank 0 cannot be found.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    found = step_variables(os.environ)
    if found is None:
        return
    os.environ.update(found)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _master_address()


def step_variables(env: Mapping[str, str]) -> dict[str, str] | None:
    """Return torchrun's variables but the address, for a task of a SLURM step of several tasks; None for others."""
    try:
        tasks, number = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
        step, job = int(env["SLURM_STEP_ID"]), int(env["SLURM_JOB_ID"])
        local = int(env["SLURM_LOCALID"])
    except (KeyError, ValueError):
        return None
    if tasks < 2 or number >= tasks or step >= _LAST_STEP:
        return None
    if len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and env.get("CUDA_VISIBLE_DEVICES"):
        local = 0  # the task sees only its own GPU (--gpus-per-task), which then has number 0
    variables = {"RANK": str(number), "WORLD_SIZE": str(tasks), "LOCAL_RANK": str(local)}
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(env.get("SLURM_NODEID", "0"))
    if node < len(counts):
        variables["LOCAL_WORLD_SIZE"] = str(counts[node])
    if "MASTER_PORT" not in env:
        # Jobs that share a node, and steps of one job, get different ports.
        variables["MASTER_PORT"] = str(_FIRST_PORT + (16 * job + step) % _PORTS)
    return variables


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks of each node from SLURM's notation: ``2(x3),1`` is 2, 2, 2, 1."""
    matches = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in matches for _ in range(int(times or 1))]


def first_host(hosts: str) -> str:
    """Return the first name of a host list of SLURM, such as ``rack1n01`` for ``rack[1-2]n[01-04],x``.

    Rank 0 runs there. Only the first name is needed, and ``scontrol show hostnames`` does not exist in containers.
    """
    depth, end = 0, len(hosts)
    for position, character in enumerate(hosts):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", hosts[:end])


def _master_address() -> str:
    """Return an address of the first host of this step, on which rank 0 runs."""
    if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    host = first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    command = ["scontrol", "--oneliner", "show", "node", host]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return str(re.findall(r"\bNodeAddr=(\S+)", shown)[0])
    except (OSError, subprocess.SubprocessError, IndexError):
        raise ConfigError(
            f"The address of rank 0 is not known: the name of its node, {host}, cannot be resolved here.",
            "Set MASTER_ADDR to an address of that node, or run launch/slurm.sh.",
        ) from None
