"""Callbacks of the training loop, and the state that they share.

:mod:`cogflow.training.loop` decides when something is due and calls the methods of every callback in the order of their
list. A callback does the work: it logs, evaluates, samples or saves. Every method is called on all ranks, so it may use
collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.records.history_records import RollbackEntry
from cogflow.records.training_records import CallbackStates
from cogflow.tracking.tracker import Tracker
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine


@dataclass(frozen=True)
class StepUpdate:
    """Results of one training step.

    ``step``: finished steps, this one included. ``table``: :mod:`cogflow.training.metric_table`, summed over the ranks,
    on the device. ``gradient_norm``: before clipping; infinite when the update was skipped. ``applied``: whether
    weights changed. ``spike``: the update was skipped because of a loss spike. ``unchanged``: share of sampled weights
    that kept their bits, when this step was checked. ``data_wait``: seconds for which the step waited for batches.
    """

    step: int
    table: torch.Tensor
    gradient_norm: torch.Tensor | float
    learning_rate: float
    applied: bool
    spike: bool
    unchanged: torch.Tensor | None
    data_wait: float


@dataclass(frozen=True)
class ValidationOutcome:
    """Result of one validation. ``message`` is empty at the levels good and learning.

    ``defects``: those found at any level.
    """

    step: int
    level: str
    score: float
    message: str
    defects: tuple[str, ...]


@dataclass
class TrainingContext:
    """State that the loop and its callbacks share.

    ``folder``: the run's. ``stop_requested``: collective, the same answer on every rank. ``step``: finished steps.
    ``stopping``: the run ends after this step because of a signal. ``pending``: the checkpoint was saved on a signal,
    and the work due after its step is left. ``outcome``: that of the newest validation. ``last_good_step``: step of the
    last validation at which nothing was wrong. ``line``: of the run's history.
    """

    config: Config[TrainStage]
    stage: TrainStage
    folder: Path
    engine: Engine
    ema: EMA | None
    tracker: Tracker
    stop_requested: Callable[[], bool]
    step: int = 0
    stopping: bool = False
    pending: bool = False
    rollbacks: Sequence[RollbackEntry] = ()
    line: int = 1
    outcome: ValidationOutcome | None = None
    last_good_step: int | None = None


class Callback:
    """Hooks of the training loop. Each does nothing unless a subclass overrides it."""

    def on_train_start(self, context: TrainingContext) -> None:
        """Training starts after ``context.step`` steps, also when it is resumed or rolled back."""

    def on_step_start(self, context: TrainingContext) -> None:
        """Step ``context.step`` (from 0) starts."""

    def on_step_end(self, context: TrainingContext, update: StepUpdate) -> None:
        """A step is finished. Work that is due after it follows, unless ``context.stopping``."""

    def on_not_finite(self, context: TrainingContext, message: str) -> None:
        """The step after ``context.step`` changed no weight for the reason in ``message``.

        Raise, or return to continue without it.
        """

    def on_evaluate(self, context: TrainingContext) -> None:
        """The held-out losses are due."""

    def on_validate(self, context: TrainingContext) -> None:
        """Samples are due. Raises :class:`~cogflow.sampling.sampler.Interrupted` when a stop is requested meanwhile."""

    def on_save_weights(self, context: TrainingContext) -> None:
        """Weights without optimizer states are due."""

    def on_save(self, context: TrainingContext) -> None:
        """A checkpoint is due."""

    def on_stop(self, context: TrainingContext) -> None:
        """The run stops on a signal: save ``context.step`` and leave other work that is due to the resumed run."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state that a checkpoint must carry: fields of :class:`CallbackStates`.

        A callback without state has none.
        """
        return {}

    def load_state_dict(self, states: CallbackStates) -> None:
        """Restore this callback's field of ``states``."""


@dataclass
class Callbacks(Callback):
    """Calls a list of callbacks in its order."""

    items: list[Callback] = field(default_factory=list)

    def on_train_start(self, context: TrainingContext) -> None:
        for callback in self.items:
            callback.on_train_start(context)

    def on_step_start(self, context: TrainingContext) -> None:
        for callback in self.items:
            callback.on_step_start(context)

    def on_step_end(self, context: TrainingContext, update: StepUpdate) -> None:
        for callback in self.items:
            callback.on_step_end(context, update)

    def on_not_finite(self, context: TrainingContext, message: str) -> None:
        for callback in self.items:
            callback.on_not_finite(context, message)

    def on_evaluate(self, context: TrainingContext) -> None:
        for callback in self.items:
            callback.on_evaluate(context)

    def on_validate(self, context: TrainingContext) -> None:
        for callback in self.items:
            callback.on_validate(context)

    def on_save_weights(self, context: TrainingContext) -> None:
        for callback in self.items:
            callback.on_save_weights(context)

    def on_save(self, context: TrainingContext) -> None:
        for callback in self.items:
            callback.on_save(context)

    def on_stop(self, context: TrainingContext) -> None:
        for callback in self.items:
            callback.on_stop(context)

    def state_dict(self) -> dict[str, Any]:
        return {name: state for callback in self.items for name, state in callback.state_dict().items()}

    def load_state_dict(self, states: CallbackStates) -> None:
        for callback in self.items:
            callback.load_state_dict(states)
