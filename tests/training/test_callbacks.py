"""Test the training loop with the tiny model: the order of callbacks, stops, states, and one sampler for each
validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow.config.compose import compose
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.errors import Stopped
from cogflow.records.training_records import CallbackStates, EvaluationState, HeldoutLoss
from cogflow.sampling.sampler import Interrupted
from cogflow.training import validation
from cogflow.training.callback import Callback, Callbacks, StepUpdate, TrainingContext
from cogflow.training.loop import Trainer
from cogflow.training.step_monitor import due
from cogflow.training.validation import Validation

STEPS = 4


class FakeLoader:
    def __enter__(self) -> FakeLoader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FakeTrainer(Trainer):
    """The loop, with steps that compute nothing."""

    def train_step(self, step: int, loader: Any) -> StepUpdate:
        return StepUpdate(step + 1, torch.zeros(1), 1.0, 1e-4, True, False, None, 0.0)

    def loader(self) -> Any:
        return FakeLoader()


class Recorder(Callback):
    """Records the loop's calls with the number of finished steps; ``interrupts``: the validation that is stopped."""

    def __init__(self, interrupts: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.interrupts = interrupts
        self.last: HeldoutLoss | None = None

    def on_train_start(self, context: TrainingContext) -> None:
        self.calls.append(("start", context.step))

    def on_step_end(self, context: TrainingContext, update: StepUpdate) -> None:
        self.calls.append(("step", update.step))

    def on_evaluate(self, context: TrainingContext) -> None:
        self.calls.append(("evaluate", context.step))
        self.last = HeldoutLoss(context.step, 0.5)

    def on_validate(self, context: TrainingContext) -> None:
        if context.step == self.interrupts:
            raise Interrupted
        self.calls.append(("validate", context.step))

    def on_save_weights(self, context: TrainingContext) -> None:
        self.calls.append(("weights", context.step))

    def on_save(self, context: TrainingContext) -> None:
        self.calls.append(("save", context.step))

    def on_stop(self, context: TrainingContext) -> None:
        self.calls.append(("stop", context.step))

    def state_dict(self) -> dict[str, EvaluationState]:
        return {"evaluation": EvaluationState(last=self.last)}

    def load_state_dict(self, states: CallbackStates) -> None:
        self.last = states.evaluation.last


def config(*words: str) -> Config[TrainStage]:
    every = ["stage.evaluate_every=2", "stage.sample_every=2", "stage.save_every=2", "stage.weights_every=4"]
    return compose(["stage=train", "debug=quick", f"stage.steps={STEPS}", *every, *words])


def fake_trainer(recorder: Recorder, *words: str, stop_after: int | None = None) -> FakeTrainer:
    settings = config(*words)
    missing: Any = None
    objective: Any = type("FakeObjective", (), {"device": torch.device("cpu")})
    context = TrainingContext(
        settings,
        settings.stage,
        Path(),
        missing,
        None,
        tracker=missing,
        stop_requested=lambda: context.step == stop_after,
    )
    return FakeTrainer(context, missing, objective, missing, Callbacks([recorder]))


def test_due_work_runs_in_the_order_evaluate_validate_weights_save() -> None:
    recorder = Recorder()
    fake_trainer(recorder).run()
    assert recorder.calls == [
        *[("start", 0), ("evaluate", 0), ("validate", 0)],
        *[("step", 1), ("step", 2), ("evaluate", 2), ("validate", 2), ("save", 2)],
        *[("step", 3), ("step", 4), ("evaluate", 4), ("validate", 4), ("weights", 4), ("save", 4)],
    ]


def test_a_stop_saves_and_leaves_due_work_to_the_resumed_run() -> None:
    recorder = Recorder()
    with pytest.raises(Stopped, match="after step 2 of 4"):
        fake_trainer(recorder, stop_after=2).run()
    assert recorder.calls[-2:] == [("step", 2), ("stop", 2)]
    resumed = Recorder()
    trainer = fake_trainer(resumed)
    trainer.context.step = 2
    trainer.context.pending = True
    trainer.run()
    assert resumed.calls[:4] == [("start", 2), ("evaluate", 2), ("validate", 2), ("save", 2)]


def test_an_interrupted_validation_restores_the_states_and_saves() -> None:
    recorder = Recorder(interrupts=2)
    with pytest.raises(Stopped, match="in the validation after step 2"):
        fake_trainer(recorder).run()
    assert recorder.calls[-2:] == [("evaluate", 2), ("stop", 2)]
    assert recorder.last == HeldoutLoss(0, 0.5), "the evaluation after step 2 is made again"


def test_an_interrupted_validation_before_the_first_step_saves_nothing() -> None:
    recorder = Recorder(interrupts=0)
    with pytest.raises(Stopped, match="nothing is trained yet"):
        fake_trainer(recorder).run()
    assert recorder.calls == [("start", 0), ("evaluate", 0)]


def test_work_is_due_at_its_interval_and_after_the_last_step() -> None:
    assert [step for step in range(8) if due(step, 3, 7)] == [0, 3, 6, 7]
    assert not any(due(step, 0, 7) for step in range(8))


def test_each_validation_builds_one_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    passed: list[Any] = []

    def make_sampler() -> Any:
        built.append(type("FakeSampler", (), {"stop": None, "pipeline": None})())
        return built[-1]

    def passes(position: int) -> Any:
        def record(*arguments: Any, **_: Any) -> dict[str, list[Any]]:
            passed.append(arguments[position])
            return {"samples": []}

        return record

    monkeypatch.setattr(validation.vae_roundtrip, "measure_roundtrip", passes(3))  # type: ignore[attr-defined]
    monkeypatch.setattr(validation, "read_reconstruction_bound", lambda folder: {"clip": {"detail": 1.0}})
    monkeypatch.setattr(Validation, "_record_schedule_probe", passes(2))
    monkeypatch.setattr(Validation, "_sample", passes(2))
    monkeypatch.setattr(Validation, "_log_samples", lambda *_, **__: None)
    monkeypatch.setattr(Validation, "_record_rungs", passes(2))
    monkeypatch.setattr(Validation, "_judge", lambda *_: None)
    monkeypatch.setattr(validation, "write_report", lambda folder: None)
    trainer = fake_trainer(Recorder())
    context = trainer.context
    context.folder = tmp_path
    missing: Any = None
    validate = Validation(context.config, missing, make_sampler, [], 0.7)
    for step in (0, 2, 4):
        context.step = step
        validate.on_validate(context)
    assert len(built) == 3
    first, second, third = built
    assert passed == [first, first, first, first, second, second, third, third]
    assert all(sampler.stop == context.stop_requested for sampler in built)
