"""Start and stop a real SLURM of two nodes on this machine: munged, slurmctld and two slurmd."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """\
ClusterName=cogflow
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
OverTimeLimit=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=200000,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str | None:
    """Return why no cluster can be started here, or ``None``."""
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"{', '.join(absent)} not found: apt-get install slurmctld slurmd slurm-client munge"
    return None


class Cluster:
    """``with Cluster(folder) as cluster:`` runs the daemons; all their files are in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
            for name, port in zip(NODES, ports, strict=True)
        ]
        user = pwd.getpwuid(os.geteuid()).pw_name
        text = CONF.format(
            user=user,
            host=host,
            controller=controller,
            folder=self.folder,
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
        (self.folder / "slurm.conf").write_text(text)
        try:
            places = [f"--{what}={self.folder}/munge.{end}" for what, end in MUNGE]
            # --force: the owner of the folders does not matter, because one user runs all daemons.
            self._start("munged", "munged", "--foreground", "--force", *places)
            until(lambda: (self.folder / "munge.socket").exists(), "munged listens")
            self._start("slurmctld", "slurmctld", "-D")
            for name in NODES:
                self.start_node(name)
            until(lambda: self.states() == dict.fromkeys(NODES, "idle"), "both nodes are idle", 60, self.logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.run("scancel", f"--user={os.geteuid()}", check=False)
            until(lambda: not self.run("squeue", "--noheader").strip(), "no job is left", 40)
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill a node like a loss of power: its daemon and its job's processes end without a message."""
        daemon = self._daemons.pop(name)
        # A step's processes are not children of the daemon; their environment names their node.
        victims = [pid for pid in processes() if of_step(pid, str(self.folder), name)]
        for pid in [daemon.pid, *victims]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def run(self, *words: str, check: bool = True, seconds: float = 60) -> str:
        """Return what a command prints."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=seconds)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, **env: str) -> str:
        """Return the id of the job that ``sbatch words`` creates in ``cwd``."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            env={**self.env, **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return SLURM's record of a job, or of an array task such as ``12_3``."""
        line = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def ended(self, job: str, seconds: float = 300) -> dict[str, str]:
        """Wait for a job's end. A job that was queued again starts without SLURM's pause."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            now = self.job(job)
            if now["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"):
                return now
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                # A node refuses a start in the second in which it removes the job before.
                time.sleep(3)
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            time.sleep(0.5)
        raise AssertionError(f"job {job} did not end in {seconds:.0f} s: {self.job(job)}\n{self.logs()}")

    def states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
        return dict(line.split() for line in lines)

    def logs(self) -> str:
        """Return the end of every daemon's log."""
        return "\n".join(
            f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, name: str, *words: str) -> None:
        # In a new session, so that Ctrl-C of the tests does not end it.
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=self.folder,
            )


MUNGE = (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("seed-file", "seed"), ("log-file", "log"))


def free_ports(count: int) -> list[int]:
    """Return different ports without listeners."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until(true: Callable[[], object], what: str, seconds: float = 30, context: Callable[[], str] = str) -> None:
    """Wait until ``true()``; fail with the name of the condition after a time limit."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}\n{context()}"
        time.sleep(0.1)


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def environment(pid: int) -> dict[str, str]:
    """Return the environment of a process; empty when it has ended."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def of_step(pid: int, folder: str, node: str) -> bool:
    """Return whether a process belongs to a step of this cluster's ``node``: a task or its slurmstepd."""
    known = environment(pid)
    if known.get("SLURM_CONF") != f"{folder}/slurm.conf":
        return False
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return known.get("SLURMD_NODENAME") == node or ("slurmstepd" in command and known.get("SLURM_NODE") == node)
