"""Test that no sequence of commands loses a checkpoint or mixes up two lines of a run.

Hypothesis draws sequences of commands, faults, moves and copies. Each runs against the real program, and a model
(:mod:`tests.faults.histories`) says what must be there afterwards. ``COGFLOW_SEQUENCES=N`` draws N other sequences of
twelve commands; a failure prints its commands.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from cogflow.artifacts.run_history import finish_line
from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.config.data_section import DataConfig
from cogflow.data.shapes import draw_folder
from cogflow.files.publish import check_manifest, read_manifest
from cogflow.records.history_records import read_history
from cogflow.runtime.run_lock import hold_run
from tests.faults.conftest import World
from tests.faults.histories import RATIO, Aside, Command, Line, Lineage, Saved, Start, State, start, states
from tests.faults.server import Done, Server

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
RATES = (1e-4, 3e-4)
MOST_STEPS = 6
FOLDER = ("data=folder", "debug=quick", "data.clips=5", "data.holdout=1")
MICRO_STEPS = 2
"""Micro steps of a step in these runs."""
KILLED_AT = (
    "update",
    "states-written",
    "weights-written",
    "hashed",
    "manifest-written",
    "renaming",
    "renamed",
    "pointing",
    "deleting",
    "deleted",
    "line-recorded",
    "line-moving",
    "line-moved",
    "line-restoring",
)

commands = st.builds(
    Command,
    rate=st.sampled_from(RATES),
    steps=st.integers(2, MOST_STEPS),
    save_every=st.integers(1, 3),
    keep_last=st.integers(1, 3),
    resume=st.sampled_from(("auto", "auto", "never")),
    on_not_finite=st.sampled_from(("stop", "rollback")),
)
faults = st.one_of(
    st.builds("kill@{}#{}".format, st.sampled_from(KILLED_AT), st.integers(1, 3)),
    st.builds("term@micro#{}".format, st.integers(1, 8)),
    st.builds("full@{}#1".format, st.sampled_from(("states-written", "manifest"))),
    st.builds("nan@losses#{}".format, st.integers(1, 8)),
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of videos with captions."""
    folder = tmp_path_factory.mktemp("clips")
    draw_folder(folder, DataConfig(clips=5))
    return folder


@pytest.fixture(scope="module")
def world(server: Server, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a folder of runs on ``clips``."""
    root = tmp_path_factory.mktemp("histories")
    words = ["stage=prepare", *FOLDER, f"data.path={clips}", f"run.root={root}", "run.name=source"]
    done = server.run(*words, "tracking.wandb=disabled")
    assert done.code == 0, done.text
    return World(root, server, root / "source")


@dataclass(frozen=True)
class Trained:
    """The undisturbed training of a lineage: hash of its weights, and its last loss and gradient norm."""

    weights_sha256: str
    row: tuple[float, float]


class Oracle:
    """Trains lineages without disturbance, each once."""

    def __init__(self, world: World, clips: Path) -> None:
        self.world, self.clips = world, clips
        self._known: dict[Lineage, Trained] = {}
        self._folders: dict[Lineage, str] = {}

    def __getitem__(self, lineage: Lineage) -> Trained:
        if lineage not in self._known:
            self._train(lineage)
        return self._known[lineage]

    def _train(self, lineage: Lineage) -> None:
        """Train the last rate of ``lineage`` to the end, from where it last changed."""
        last = len(lineage)
        while last and lineage[last - 1] == lineage[-1]:
            last -= 1
        before = lineage[:last]
        if before:
            _ = self[before]
        name = f"undisturbed-{len(self._folders)}"
        folder = self.world.root / name
        if before:
            self.world.words(name)
            shutil.copytree(self.world.root / self._folders[before] / "checkpoints", folder / "checkpoints")
            for path in step_folders(folder / "checkpoints"):
                if step_of(path) > last:
                    shutil.rmtree(path)
        done = self.world.train(name, *words(Command(lineage[-1], MOST_STEPS, 1, 99), self.clips))
        assert done.code == 0, done.text
        rows = self.world.losses(name)
        for step in range(last + 1, MOST_STEPS + 1):
            whole = (*before, *([lineage[-1]] * (step - last)))
            self._known[whole] = Trained(sha256(folder, step), rows[step])
            self._folders[whole] = name


def words(command: Command, clips: Path) -> list[str]:
    """Return ``command`` on the prepared ``clips`` as words of the command line."""
    return [
        *FOLDER,
        f"data.path={clips}",
        f"stage.learning_rate={command.rate!r}",
        f"stage.steps={command.steps}",
        f"stage.save_every={command.save_every}",
        f"stage.keep_last={command.keep_last}",
        f"stage.resume={command.resume}",
        f"stage.on_not_finite={command.on_not_finite}",
        f"stage.rollback.learning_rate_ratio={RATIO}",
        "stage.schedule=constant",
        "stage.warmup_steps=0",
    ]


def sha256(run: Path, step: int) -> str:
    return read_manifest(run / "checkpoints" / f"step-{step:06d}").files[WEIGHTS].sha256


class Histories(RuleBasedStateMachine):
    """Draws commands on one run and compares the folder with the model after each."""

    world: ClassVar[World]
    clips: ClassVar[Path]
    oracle: ClassVar[Oracle]
    numbers: ClassVar[itertools.count[int]] = itertools.count()
    counts: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.name = f"run-{next(self.numbers)}"
        self.world.words(self.name)
        self.state = State()
        self.others: list[tuple[Path, State]] = []
        self.last: Command | None = None
        self.fault = ""
        self.transferred = False
        self.exported = False
        self.counts["sequences"] = self.counts.get("sequences", 0) + 1

    @property
    def folder(self) -> Path:
        return self.world.root / self.name

    @rule(command=commands)
    def train(self, command: Command) -> None:
        self.run(command, start(self.state, command))

    @rule(command=commands, fault=faults)
    def train_disturbed(self, command: Command, fault: str) -> None:
        self.run(command, start(self.state, command), fault)

    @precondition(lambda self: self.last is not None)
    @rule(fault=st.one_of(st.just(""), faults))
    def repeat(self, fault: str) -> None:
        """Give the last command again, as a job that is queued again does."""
        assert self.last is not None
        named = self.named().get(self.last.resume)
        begun = self.state.lines[-1].command == self.last if self.state.lines else False
        if named is None and "/" in self.last.resume and not begun:
            return
        self.run(self.last, start(self.state, self.last, *(named or ())), fault)

    @precondition(lambda self: self.named())
    @rule(command=commands, fault=st.one_of(st.just(""), st.just(""), faults), data=st.data())
    def train_from_a_checkpoint(self, command: Command, fault: str, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.named())))
        saved, place = self.named()[path]
        command = replace(command, resume=path, steps=max(command.steps, len(saved.lineage)))
        self.run(command, start(self.state, command, saved, place), fault)

    @precondition(lambda self: self.state.lines and not self.transferred)
    @rule()
    def move(self) -> None:
        self.count("move")
        self.transferred = True
        target = f"moved-{next(self.numbers)}"
        self.folder.rename(self.world.root / target)
        self.name = target

    @precondition(lambda self: self.state.lines and not self.transferred and len(self.others) < 2)
    @rule()
    def copy(self) -> None:
        self.count("copy")
        self.transferred = True
        target = f"copied-{next(self.numbers)}"
        shutil.copytree(self.folder, self.world.root / target)
        self.others.append((self.folder, self.state))
        self.name = target

    @precondition(lambda self: self.state.checkpoints and not self.exported)
    @rule()
    def export(self) -> None:
        self.count("export")
        self.exported = True
        output = self.folder / "export"
        shutil.rmtree(output, ignore_errors=True)
        done = self.world.server.run(
            "stage=export",
            f"run.root={self.world.root}",
            f"run.name={self.name}",
            f"stage.source={self.folder}",
            "stage.components=[transformer]",
            "tracking.wandb=disabled",
        )
        assert done.code == 0, done.text
        record = json.loads((output / "export.json").read_text())
        assert record["step"] == self.state.newest
        self.compare()

    @precondition(lambda self: self.state.lines)
    @rule(command=commands)
    def train_after_a_caption_was_edited(self, command: Command) -> None:
        self.count("edited caption")
        metadata = self.clips / "metadata.jsonl"
        before = metadata.read_text()
        row = json.loads(before.splitlines()[0])
        metadata.write_text(before.replace(row["text"], "another caption"))
        try:
            done = self.world.train(self.name, *words(command, self.clips))
        finally:
            metadata.write_text(before)
        self.output = f"edited caption: {done.codes}\n{done.text[-3000:]}"
        expected = start(self.state, command)
        if expected == "finished":
            self.state = replace(self.state, finished=self.state.finished or command)
        else:
            assert done.code == 2 and ("caption changed" in done.text or expected == "refused"), self.output
        self.compare()

    @precondition(lambda self: self.state.lines and not self.transferred)
    @rule(command=commands)
    def second_writer(self, command: Command) -> None:
        """Train while this process holds the lock of the run, as another training does."""
        self.count("second writer")
        with hold_run(self.folder, "another training"):
            done = self.world.train(self.name, *words(command, self.clips))
        self.output = f"second writer: {done.codes}\n{done.text[-3000:]}"
        assert done.code == 2 and "is in use" in done.text, self.output
        self.compare()

    def named(self) -> dict[str, tuple[Saved, int | None]]:
        """Return the checkpoints that ``stage.resume`` may name by path, with the replaced line that they are in."""
        found: dict[str, tuple[Saved, int | None]] = {}
        for step, saved in self.state.checkpoints.items():
            found[str(self.folder / f"checkpoints/step-{step:06d}")] = saved, -1
        for number, aside in enumerate(self.state.aside):
            for step, saved in aside.checkpoints.items():
                found[str(self.folder / f"replaced/{number + 1:02d}/checkpoints/step-{step:06d}")] = saved, number
        for folder, state in self.others:
            for step, saved in state.checkpoints.items():
                found[str(folder / f"checkpoints/step-{step:06d}")] = saved, None
        return found

    def run(self, command: Command, expected: Start | str, fault: str = "") -> None:
        """Run ``command``, and compare exit code and folder with what is expected."""
        self.last, self.fault = command, fault
        self.transferred = self.exported = False
        self.count(fault.partition("@")[0] or "train")
        done = self.world.train(self.name, *words(command, self.clips), fault=fault)
        self.output = f"{command}\n{fault}\n{done.codes} {done.fired}\n{done.text[-3000:]}"
        assert not done.timed_out, self.output
        assert done.code in (0, 2, 3, 75, -9) and "Traceback" not in done.text, self.output
        if isinstance(expected, str):
            assert done.code == {"finished": 0, "refused": 2}[expected] and not done.fired, self.output
            if expected == "finished" and (self.state.finished is None or self.state.finished.steps != command.steps):
                self.state = replace(self.state, finished=command)
        elif not done.fired:
            assert done.code == 0, self.output
            *_, self.state = states(expected, command)
            self.state = replace(self.state, finished=command)
        else:
            self.disturbed(command, expected, fault, done)
        self.compare()

    def disturbed(self, command: Command, expected: Start, fault: str, done: Done) -> None:
        """Set the state after a fault that happened."""
        action, _, point = fault.partition("@")
        number = int(point.partition("#")[2])
        # A signal or a NaN in micro step N is in this step.
        step = len(expected.lineage) + (number + MICRO_STEPS - 1) // MICRO_STEPS
        if action == "term":
            *_, self.state = states(expected, command, stop=step)
            if step >= command.steps:
                self.state = replace(self.state, finished=command)
            assert done.code == (75 if step < command.steps else 0), self.output
        elif action == "nan":
            self.not_finite(command, expected, step, done.code)
        else:
            assert done.code == (-9 if action == "kill" else 2), self.output
            self.check_pointer()
            finish_line(self.folder)
            self.choose([self.state, *states(expected, command)], command, expected)

    def not_finite(self, command: Command, expected: Start, step: int, code: int) -> None:
        """Set the state after the update of ``step`` was not finite."""
        before = [one for one in states(expected, command) if max(one.rows, default=0) < step]
        self.state = before[-1]
        rows = {**{one: rate for one, rate in self.full_rows(expected, command).items() if one < step}}
        newest = self.state.newest
        self.state = replace(self.state, rows=rows)
        if command.on_not_finite == "rollback" and newest:
            rollbacks = self.state.lines[-1].rollbacks
            refused = len(rollbacks) >= 2
            rollbacks = (*rollbacks, (newest, 1.0 if refused else RATIO))
            line = Line(command, rollbacks, self.state.checkpoints[newest])
            begun = Start(self.state.begun(line, newest, {}, {}), self.state.checkpoints[newest], rollbacks)
            assert code == (3 if refused else 0), self.output
            if refused:
                self.state = begun.state
            else:
                *_, self.state = states(begun, command)
                self.state = replace(self.state, finished=command)
            return
        assert code == 3, self.output
        if step > 1 and newest != step - 1:
            *_, self.state = states(expected, replace(command, steps=step - 1), stop=step - 1)
            saved = replace(self.state.checkpoints[step - 1], command=command, pending=False)
            self.state = replace(self.state, checkpoints={**self.state.checkpoints, step - 1: saved})

    def choose(self, possible: list[State], command: Command, expected: Start) -> None:
        """Set the state to that of ``possible`` which the folder has after a kill."""
        line = read_history(self.folder).current.number if (self.folder / "history.json").is_file() else 0
        found = set(self.steps("checkpoints"))
        fitting = [one for one in possible if len(one.lines) == line and set(one.checkpoints) == found]
        assert fitting, f"checkpoints {found}, line {line}\n{self.output}"
        state = fitting[-1]
        rows, full = self.rows(self.folder), self.full_rows(expected, command)
        if state is not self.state:
            assert set(rows) <= set(full) and set(state.rows) & set(range(state.newest + 1)) <= set(rows), self.output
            state = replace(state, rows={step: full[step] for step in rows})
        self.state = state

    def full_rows(self, expected: Start, command: Command) -> Mapping[int, float]:
        *_, last = states(expected, command)
        return last.rows

    def steps(self, name: str) -> list[int]:
        return [step_of(path) for path in step_folders(self.folder / name)]

    def rows(self, folder: Path) -> dict[int, dict[str, float]]:
        """Return the training rows by step; each step must be there once."""
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        lines = [line for line in lines if "train/loss" in line]
        assert len({line["step"] for line in lines}) == len(lines), f"a step is there twice\n{self.output}"
        return {line["step"]: line for line in lines}

    def check_pointer(self) -> None:
        """Check that ``latest.json`` names a whole checkpoint that is there."""
        path = self.folder / "checkpoints/latest.json"
        if path.is_file():
            named = self.folder / "checkpoints" / json.loads(path.read_text())["checkpoint"]
            assert check_manifest(named) == [], self.output

    def compare(self) -> None:
        """Compare the folder with the state."""
        self.check_pointer()
        if "kill" not in self.fault:
            path = self.folder / "checkpoints/latest.json"
            named = json.loads(path.read_text())["step"] if path.is_file() else 0
            assert named == self.state.newest, self.output
        self.compare_checkpoints(self.folder, self.state.checkpoints)
        rows = self.rows(self.folder)
        assert {step: row["train/lr"] for step, row in rows.items()} == self.state.rows, self.output
        lineage = self.lineage()
        for step, row in rows.items():
            if len(lineage) >= step:
                assert (row["train/loss"], row["train/grad_norm"]) == self.oracle[lineage[:step]].row, self.output
        folders = sorted(self.folder.glob("replaced/*"))
        assert len(folders) == len(self.state.aside), self.output
        for folder, aside in zip(folders, self.state.aside, strict=True):
            self.compare_aside(folder, aside)
        if self.state.lines:
            assert read_history(self.folder).current.number == len(self.state.lines), self.output
        record = self.folder / "train.json"
        assert record.is_file() == (self.state.finished is not None), self.output
        if self.state.finished is not None:
            stage = json.loads(record.read_text())["settings"]["stage"]
            wanted = self.state.finished
            assert (stage["steps"], stage["learning_rate"]) == (wanted.steps, wanted.rate), self.output

    def compare_aside(self, folder: Path, aside: Aside) -> None:
        self.compare_checkpoints(folder, aside.checkpoints)
        assert {step: row["train/lr"] for step, row in self.rows(folder).items()} == aside.rows, self.output
        assert json.loads((folder / "replaced.json").read_text())["after"] == aside.after

    def compare_checkpoints(self, folder: Path, expected: Mapping[int, Saved]) -> None:
        """Compare names, hashes and weights with those of undisturbed trainings."""
        paths = step_folders(folder / "checkpoints")
        assert [step_of(path) for path in paths] == sorted(expected), f"{folder}\n{self.output}"
        for path in paths:
            saved = expected[step_of(path)]
            assert check_manifest(path) == [], self.output
            assert sha256(folder, step_of(path)) == self.oracle[saved.lineage].weights_sha256, self.output
            assert json.loads((path / "trainer.json").read_text())["line"] == saved.line, self.output

    def lineage(self) -> Lineage:
        """Return the learning rates of the rows of the current line, where they begin at the first step."""
        rows = self.state.rows
        return tuple(rows[step] for step in sorted(rows)) if sorted(rows) == list(range(1, len(rows) + 1)) else ()

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def teardown(self) -> None:
        """Remove the runs of the sequence."""
        for folder in (self.folder, *(folder for folder, _ in self.others)):
            shutil.rmtree(folder, ignore_errors=True)


def draw(world: World, clips: Path, sequences: int, length: int, *, derandomize: bool) -> dict[str, int]:
    """Run ``sequences`` sequences of ``length`` commands; return how often each kind was drawn."""
    Histories.world, Histories.clips = world, clips
    Histories.oracle, Histories.counts = Oracle(world, clips), {}
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=length,
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
    print(f"sequences of {length} commands: {Histories.counts}")
    return Histories.counts


def test_drawn_commands_lose_nothing_and_mix_up_nothing(world: World, clips: Path) -> None:
    counts = draw(world, clips, 6, 6, derandomize=True)
    assert counts["sequences"] >= 6


@pytest.mark.slow
@pytest.mark.timeout(36_000)
@pytest.mark.skipif("COGFLOW_SEQUENCES" not in os.environ, reason="set COGFLOW_SEQUENCES=N; a sequence takes a minute")
def test_many_drawn_commands_lose_nothing_and_mix_up_nothing(world: World, clips: Path) -> None:
    draw(world, clips, int(os.environ["COGFLOW_SEQUENCES"]), 12, derandomize=False)
