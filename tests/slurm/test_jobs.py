"""Test ``launch/slurm.sh``, ``launch/slurm_array.sh`` and a bare ``srun`` on a real SLURM: time limit, failing node,
array, error.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogflow.rank_identity import first_host
from tests.slurm.cluster import Cluster, environment, processes, until
from tests.slurm.conftest import STEPS, Words, steps, weights

pytestmark = pytest.mark.slow
TWO = ("--nodes=2", "--ntasks-per-node=1")


def submit(cluster: Cluster, repository: Path, log: Path, *words: str, script: str = "slurm.sh") -> str:
    options = [word for word in words if word.startswith("--")]
    rest = [word for word in words if not word.startswith("--")]
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {"COGFLOW_PYTHON": sys.executable, "MASTER_PORT": "", "WANDB_MODE": "disabled"}
    return cluster.submit(*options, f"--output={log}", f"launch/{script}", *rest, cwd=repository, **env)


def ranks_of(job: str) -> dict[int, int]:
    """Return the process id of each rank of ``job``."""
    found = {}
    for pid in processes():
        known = environment(pid)
        if known.get("SLURM_JOB_ID") == job and "RANK" in known and b"\0-m\0cogflow\0" in command(pid):
            found[int(known["RANK"])] = pid
    return found


@contextlib.contextmanager
def held(pid: int | None) -> Iterator[None]:
    """Stop a process inside the block; it may have ended."""
    try:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def unlimited(cluster: Cluster, job: str) -> bool:
    """Give the job ten minutes; return whether it has them."""
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10", check=False)
    return cluster.job(job)["TimeLimit"] == "00:10:00"


def soon_over(cluster: Cluster, job: str) -> bool:
    """Set the job's time limit to the minute after the next 15 seconds; return whether it is set."""
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    limit = (60 * (60 * hours + minutes) + seconds + 15) // 60 + 1
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}", check=False)
    return cluster.job(job)["TimeLimit"] == f"00:{limit:02d}:00"


def test_a_job_resumes_after_its_time_limit(
    cluster: Cluster, repository: Path, words: Words, undisturbed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    mine = words("limited", "stage.save_every=0")
    run = undisturbed.parent / "limited"
    job = submit(cluster, repository, log, *TWO, "--time=10", "--signal=B:USR1@50", *mine)
    until(lambda: steps(run), "the first step", 180, log.read_text)
    # The time limit is set after the first step, because on a slow machine SLURM's signal would else come while the
    # job loads. One rank is held meanwhile, because on a fast machine the job would else end before the signal.
    with held(ranks_of(job)[1]):
        until(lambda: soon_over(cluster, job), "the time limit is near", 30, log.read_text)
        until(lambda: "time limit is near" in log.read_text(), "SLURM's signal", 60, log.read_text)
    until(lambda: cluster.job(job)["Restarts"] == "1", "the job is queued again", 120, log.read_text)
    assert 1 <= len(steps(run)) < STEPS
    # The second start needs no limit. SLURM refuses the change while it still removes the first.
    until(lambda: unlimited(cluster, job), "the time limit is longer", 60, log.read_text)
    end = cluster.ended(job)
    said = log.read_text()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert "training ended with 75" in said and "start 2" in said and "resuming" in said
    assert steps(run) == steps(undisturbed) and weights(run) == weights(undisturbed)


def test_a_job_resumes_after_a_node_failure(
    cluster: Cluster, repository: Path, words: Words, undisturbed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    mine = words("failing", "stage.save_every=2")
    run = undisturbed.parent / "failing"
    job = submit(cluster, repository, log, *TWO, *mine)
    until(
        lambda: (run / "checkpoints/step-000002").exists() and len(steps(run)) >= 3, "three steps", 180, log.read_text
    )
    with held(ranks_of(job)[1]):  # in the middle of a step, and not done before
        assert len(ranks_of(job)) == 2
        cluster.kill_node("n2")
    until(lambda: "a node does not answer" in log.read_text(), "the script notices", 180, log.read_text)
    cluster.start_node("n2")
    end = cluster.ended(job)
    said = log.read_text()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert "start 2" in said and "resuming" in said
    assert steps(run) == steps(undisturbed) and weights(run) == weights(undisturbed)


def test_a_job_of_an_array_resumes_after_preemption(
    cluster: Cluster, repository: Path, words: Words, clips: Path, tmp_path: Path
) -> None:
    mine = words("clips", "stage.steps=4", "stage.save_every=0")
    options = ("--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2")  # each has a node of its own
    job = submit(cluster, repository, tmp_path / "%a", *options, *mine, script="slurm_array.sh")
    runs, logs = [clips.parent / f"clips-seed-{seed}" for seed in (0, 1)], [tmp_path / str(seed) for seed in (0, 1)]
    until(lambda: logs[0].exists() and steps(runs[0]), "the first step", 180, cluster.logs)
    # The rank is held, so that the job does not end before SLURM's TERM. SLURM sends CONT with TERM.
    first = cluster.job(f"{job}_0")
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks_of(first["JobId"])[0], signal.SIGSTOP)
    urgent = cluster.submit(
        "--partition=urgent",
        "--exclusive",
        f"--nodelist={first['NodeList']}",
        "--output=/dev/null",
        "--wrap=true",
        cwd=clips,
    )
    assert cluster.ended(urgent)["ExitCode"] == "0:0", logs[0].read_text() + cluster.logs()
    ends = [cluster.ended(f"{job}_{seed}") for seed in (0, 1)]
    assert [(end["ExitCode"], end["Restarts"]) for end in ends] == [("0:0", "1"), ("0:0", "0")], logs[0].read_text()
    assert "training ended with 75" in logs[0].read_text() and "resuming" in logs[0].read_text()
    assert [[step for step, *_ in steps(run)] for run in runs] == [[1, 2, 3, 4]] * 2
    assert steps(runs[0]) != steps(runs[1])
    assert not (clips / "checkpoints").exists()


@pytest.mark.parametrize("mistake", ["stage.stepps=3", "data.frames=5"])
def test_a_user_error_is_not_queued_again(
    cluster: Cluster, repository: Path, words: Words, tmp_path: Path, mistake: str
) -> None:
    """One error is in the words, found before any task starts; the other only training finds, on both ranks."""
    log = tmp_path / "log"
    job = submit(cluster, repository, log, *TWO, *words(f"mistaken-{mistake[:5]}", mistake))
    end = cluster.ended(job)
    said = log.read_text()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert said.count("ConfigError:") == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_tasks_of_a_bare_srun_train_one_run(
    cluster: Cluster, repository: Path, words: Words, undisturbed: Path, nodes: int
) -> None:
    run = undisturbed.parent / f"bare-{nodes}"
    task = ["env", "WANDB_MODE=disabled", sys.executable, "-m", "cogflow", "stage=train", *words(run.name)]
    options = [f"--nodes={nodes}", "--ntasks=2", f"--chdir={repository}"]
    said = cluster.run("srun", *options, *task, seconds=300)
    assert said.count("checkpoint: ") == 1, "one rank prints"
    assert steps(run) == steps(undisturbed) and weights(run) == weights(undisturbed)


WHO = """
import os
from cogflow import rank_identity
rank_identity.adopt_slurm_step()
print(rank_identity.rank(), "of", rank_identity.world_size(), os.environ.get("LOCAL_WORLD_SIZE", ""))
"""


def test_one_process_of_a_job_of_two_tasks_is_one_process(cluster: Cluster, repository: Path, tmp_path: Path) -> None:
    """SLURM sets the number of tasks of the job in the batch script, in the shell of salloc and in their steps."""
    who = shlex.join([sys.executable, "-c", WHO])
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/bash\n{who}\nsrun --ntasks=1 {who}\nsrun {who} | sort\n")
    job = cluster.submit("--ntasks=2", f"--output={tmp_path}/log", str(script), cwd=repository)
    assert cluster.ended(job)["ExitCode"] == "0:0"
    assert (tmp_path / "log").read_text().splitlines() == ["0 of 1 ", "0 of 1 ", "0 of 2 2", "1 of 2 2"]
    assert cluster.run("salloc", "--ntasks=2", "bash", "-c", f"cd {repository}; {who}").split() == ["0", "of", "1"]
    terminal = cluster.run("script", "--quiet", "--return", "--command", f"srun --pty {who}", "/dev/null")
    assert "0 of 1" in terminal


@pytest.mark.parametrize("hosts", ["n1", "n[1-3,5]", "rack[1-2]n[01-04]", "a1,b[2,4]", "gpu-a-[007-009],x"])
def test_the_first_host_is_that_of_scontrol(cluster: Cluster, hosts: str) -> None:
    assert first_host(hosts) == cluster.run("scontrol", "show", "hostnames", hosts).split()[0]
