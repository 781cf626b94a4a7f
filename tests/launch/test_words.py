"""The commands that ``launch/slurm.sh`` runs, with and without containers.

Stand-ins for srun, scontrol and apptainer record their commands and run them, except the training.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STANDINS = {
    "srun": (
        "while [[ $1 = -* ]]; do case $1 in --nodes|--ntasks) shift ;; esac; shift; done\n"
        'SLURM_PROCID=0 SLURM_LOCALID=3 exec "$@"'
    ),
    "scontrol": (
        'case "$*" in "show hostnames "*) echo n1 ;; *"show node n1") echo "NodeName=n1 NodeAddr=127.0.0.1 X=1" ;; esac'
    ),
    "apptainer": 'while [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"',
    "python-inside": 'env | grep -E "^(LOCAL_)?RANK=" >>"$WORDS"\ncase "$*" in *--cfg*) exec PYTHON "$@" ;; esac',
}


def job(
    folder: Path, repository: Path, script: str = "slurm.sh", **env: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a job and return its result and its commands: one line for each call of a stand-in."""
    calls = folder / "calls"
    for name, body in STANDINS.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$WORDS"\n{body.replace("PYTHON", sys.executable)}\n')
        path.chmod(0o755)
    given = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "WORDS": str(calls),
        "COGFLOW_PYTHON": "python-inside",
        "SLURM_SUBMIT_DIR": str(repository),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "1",
    }
    command = ["bash", f"launch/{script}", f"run.root={folder}", "run.name=mine", "stage.steps=9"]
    done = subprocess.run(command, cwd=repository, env={**given, **env}, capture_output=True, text=True, timeout=120)
    return done, calls.read_text().splitlines() if calls.exists() else []


def run(folder: Path, repository: Path, script: str = "slurm.sh", **env: str) -> list[str]:
    """Run a job that must succeed and return its commands."""
    done, calls = job(folder, repository, script, **env)
    assert done.returncode == 0 and "training ended with 0" in done.stderr, done.stdout + done.stderr
    return calls


def test_apptainer_runs_the_settings_and_the_training(tmp_path: Path, repository: Path) -> None:
    calls = run(tmp_path, repository, CONTAINER="image.sif", CONTAINER_MOUNTS="/clips:/clips", CUDA_VISIBLE_DEVICES="5")
    inside = (
        f"apptainer exec --nv --bind {repository},/clips:/clips --pwd {repository} image.sif python-inside -m cogflow"
    )
    assert [call for call in calls if call.startswith("apptainer")] == [
        f"{inside} --cfg stage=train run.root={tmp_path} run.name=mine stage.steps=9",
        f"{inside} stage=train run.root={tmp_path} run.name=mine stage.steps=9",
    ]
    # In a task that sees only one GPU, the GPU has number 0.
    assert "RANK=0" in calls and "LOCAL_RANK=0" in calls


def test_pyxis_options_are_given_to_srun(tmp_path: Path, repository: Path) -> None:
    calls = run(tmp_path, repository, CONTAINER="image.sqsh", CUDA_VISIBLE_DEVICES="0,1,2,3")
    options = (
        f"--container-image=image.sqsh --container-workdir={repository} --container-mounts={repository}:{repository}"
    )
    first, second = (call for call in calls if call.startswith("srun"))
    assert first.startswith(f"srun --nodes 1 --ntasks 1 {options} python-inside -m cogflow --cfg stage=train")
    assert second.startswith(f"srun --kill-on-bad-exit=1 {options} bash -c")
    assert "LOCAL_RANK=3" in calls


def test_the_words_of_a_sweep_task_replace_those_of_all_tasks(tmp_path: Path, repository: Path) -> None:
    """The task trains on the clips of the run that ``run.name`` names."""
    (tmp_path / "mine/cache").mkdir(parents=True)
    (tmp_path / "sweep").write_text("stage.steps=7\nstage.learning_rate=1e-5 stage.steps=8\n")
    calls = run(tmp_path, repository, "slurm_array.sh", SWEEP=str(tmp_path / "sweep"), SLURM_ARRAY_TASK_ID="1")
    last = next(call for call in reversed(calls) if call.startswith("python-inside"))
    words = f"stage=train run.root={tmp_path} run.name=mine-1 stage.learning_rate=1e-5 stage.steps=8"
    assert last == f"python-inside -m cogflow {words}"
    assert (tmp_path / "mine-1/cache").samefile(tmp_path / "mine/cache")


def test_a_job_is_given_up_after_too_many_starts_without_a_checkpoint(tmp_path: Path, repository: Path) -> None:
    """A new checkpoint resets the count."""
    starts = tmp_path / "mine/slurm/7.starts"
    checkpoint = tmp_path / "mine/checkpoints/step-000100"
    for _ in range(3):
        run(tmp_path, repository)
    done, calls = job(tmp_path, repository)
    assert done.returncode == 1 and "3 starts in a row saved no checkpoint" in done.stderr, done.stderr
    assert calls[-1].startswith("python-inside -m cogflow --cfg"), "the job trained"
    checkpoint.mkdir(parents=True)
    run(tmp_path, repository)
    assert starts.read_text().split() == ["none"] * 4 + ["step-000100"]


def test_a_sweep_without_a_line_for_the_task_is_refused(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "sweep").write_text("stage.steps=7\n")
    done, calls = job(tmp_path, repository, "slurm_array.sh", SWEEP=str(tmp_path / "sweep"), SLURM_ARRAY_TASK_ID="1")
    assert (done.returncode, calls) == (2, []) and "has no line for task 1" in done.stderr
