"""A small model of the history of a run: which checkpoints, rows and replaced lines a command must leave.

A checkpoint is described by its lineage: the learning rate of each of its steps. Two checkpoints with the same lineage
have equal weights, however often their runs were interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

T = TypeVar("T")
Lineage = tuple[float, ...]
RATIO = 0.5
"""Learning rate ratio of rollbacks; a power of two, so that products are exact."""


@dataclass(frozen=True)
class Command:
    """Words of stage=train. ``resume``: auto, never or a path."""

    rate: float
    steps: int
    save_every: int
    keep_last: int
    resume: str = "auto"
    on_not_finite: str = "stop"


@dataclass(frozen=True)
class Saved:
    """A checkpoint. ``line``: of the run's history that it was saved on. ``command``: that saved it.

    ``pending``: it was saved on a signal, and the save that is due at its step is left to the next command.
    """

    lineage: Lineage
    line: int
    command: Command
    pending: bool = False


@dataclass(frozen=True)
class Aside:
    """Content of ``replaced/NN``. ``after``: steps above it are here. ``rows``: steps with a row of metrics."""

    after: int
    checkpoints: Mapping[int, Saved]
    rows: Mapping[int, float]


@dataclass(frozen=True)
class Line:
    """A line: the command that began it, rollbacks in force as (step, ratio), and the checkpoint it starts from."""

    command: Command
    rollbacks: tuple[tuple[int, float], ...] = ()
    start: Saved | None = None


@dataclass(frozen=True)
class State:
    """Content of a run folder.

    ``rows``: learning rate by step, of the steps with a row of metrics. ``finished``: the command that wrote
    ``train.json``.
    """

    checkpoints: Mapping[int, Saved] = field(default_factory=dict)
    rows: Mapping[int, float] = field(default_factory=dict)
    aside: tuple[Aside, ...] = ()
    lines: tuple[Line, ...] = ()
    finished: Command | None = None

    @property
    def newest(self) -> int:
        """The newest step with a checkpoint; 0 without one."""
        return max(self.checkpoints, default=0)

    def later(self, kept: int) -> bool:
        """Return whether training has results after the step ``kept``."""
        return any(step > kept for step in (*self.checkpoints, *self.rows))

    def begun(self, line: Line, kept: int, restored: Mapping[int, Saved], rows: Mapping[int, float]) -> State:
        """Return the state after ``line`` has begun with the results up to ``kept`` and those that are restored."""
        if not self.lines:
            return replace(self, lines=(line,))
        aside = self.aside
        if self.later(kept) or self.finished is not None:
            moved = Aside(kept, _above(self.checkpoints, kept), _above(self.rows, kept))
            aside = (*aside, moved)
        return State(
            checkpoints={**_up_to(self.checkpoints, kept), **restored},
            rows={**_up_to(self.rows, kept), **rows},
            aside=aside,
            lines=(*self.lines, line),
        )


def _above(values: Mapping[int, T], step: int) -> dict[int, T]:
    return {one: value for one, value in values.items() if one > step}


def _up_to(values: Mapping[int, T], step: int) -> dict[int, T]:
    return {one: value for one, value in values.items() if one <= step}


@dataclass(frozen=True)
class Start:
    """The start of a command. ``state``: after it began a line. ``saved``: the checkpoint that it loads."""

    state: State
    saved: Saved | None
    rollbacks: tuple[tuple[int, float], ...]

    @property
    def lineage(self) -> Lineage:
        """The learning rate of each step that is trained already."""
        return self.saved.lineage if self.saved is not None else ()


def start(state: State, command: Command, named: Saved | None = None, place: int | None = None) -> Start | str:
    """Return where ``command`` starts from ``state``; "finished" or "refused" where it trains nothing.

    ``named``: the checkpoint that ``stage.resume=PATH`` names, where it exists. ``place``: index of the replaced line
    it is in; -1 for the run's own checkpoints; None for another run.
    """
    current = state.lines[-1] if state.lines else None
    if command.resume == "auto" or (current is not None and current.command == command):
        return _continue(state, command)
    if command.resume == "never":
        line = Line(command)
        return Start(state.begun(line, -1, {}, {}), None, ())
    assert named is not None
    step = len(named.lineage)
    if place is None:
        if step >= command.steps:
            return "refused"
        line = Line(command, start=named)
        return Start(state.begun(line, -1, {}, {}), named, ())
    assert current is not None
    if place == -1:
        if not state.later(step):
            return _after_finish(state, command, Start(state, named, current.rollbacks))
        line = Line(command, current.rollbacks, named)
        return Start(state.begun(line, step, {}, {}), named, current.rollbacks)
    rollbacks = state.lines[named.line - 1].rollbacks
    restored, rows, kept = _restored(state, place, step)
    line = Line(command, rollbacks, named)
    return Start(state.begun(line, kept, restored, rows), named, rollbacks)


def _restored(state: State, place: int, step: int) -> tuple[dict[int, Saved], dict[int, float], int]:
    """Return the checkpoints and rows up to ``step`` that come back from replaced lines, and the last step that stayed.

    Each step is searched in the line itself, then in the lines that were replaced later, oldest first.
    """
    checkpoints: dict[int, Saved] = {}
    rows: dict[int, float] = {}
    kept = min(aside.after for aside in state.aside[place:])
    for one in range(kept + 1, step + 1):
        holder = next(aside for aside in state.aside[place:] if aside.after < one)
        if one in holder.checkpoints:
            checkpoints[one] = holder.checkpoints[one]
        if one in holder.rows:
            rows[one] = holder.rows[one]
    return checkpoints, rows, kept


def _continue(state: State, command: Command) -> Start | str:
    current = state.lines[-1] if state.lines else Line(command)
    if not state.checkpoints:
        if not state.lines:
            return Start(state.begun(current, -1, {}, {}), None, ())
        if current.start is not None:
            return Start(state, current.start, current.rollbacks)
        if state.rows and current.command != command:
            return Start(state.begun(Line(command), -1, {}, {}), None, ())
        return Start(state, None, ())
    step = state.newest
    saved = state.checkpoints[step]
    changed = (saved.command.rate, saved.command.steps) != (command.rate, command.steps)
    if changed and state.later(step):
        if step > command.steps:
            return "refused"
        line = Line(command, current.rollbacks, saved)
        return Start(state.begun(line, step, {}, {}), saved, current.rollbacks)
    return _after_finish(state, command, Start(state, saved, current.rollbacks))


def _after_finish(state: State, command: Command, found: Start) -> Start | str:
    step = len(found.lineage)
    if step < command.steps:
        return found
    if step > command.steps:
        return "refused"
    finished = state.finished
    if finished is None or finished.steps != step:
        return "finished"
    same = replace(finished, resume=command.resume) == command
    return "finished" if same else "refused"


def states(begun: Start, command: Command, stop: int | None = None) -> Iterator[State]:
    """Yield the states of the folder while ``command`` trains, one for each change of its checkpoints.

    ``stop``: the step after which it saves and stops.
    """
    state, line = begun.state, len(begun.state.lines)
    lineage = begun.lineage
    state = replace(state, rows={step: rate for step, rate in state.rows.items() if step <= len(lineage)})
    yield state
    if begun.saved is not None and begun.saved.pending and len(lineage) % command.save_every == 0:
        state = replace(state, checkpoints={**state.checkpoints, len(lineage): Saved(lineage, line, command)})
        yield state
    for step in range(len(lineage) + 1, command.steps + 1):
        rate = command.rate
        for to, ratio in begun.rollbacks:
            rate *= ratio if step - 1 >= to else 1.0
        lineage = (*lineage, rate)
        state = replace(state, rows={**state.rows, step: rate})
        if step != stop and step % command.save_every and step != command.steps:
            continue
        saved = Saved(lineage, line, command, pending=step == stop and step < command.steps)
        state = replace(state, checkpoints={**state.checkpoints, step: saved})
        yield state
        for old in sorted(state.checkpoints)[: -command.keep_last]:
            state = replace(state, checkpoints={one: saved for one, saved in state.checkpoints.items() if one != old})
            yield state
        if step == stop:
            return
