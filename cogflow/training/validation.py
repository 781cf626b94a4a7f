"""A validation: every prompt sampled from its fixed noise, the rungs of the ladder, and the watch over what the samples look like.

What the watch knows is a function of the samples so far, so a resumed run replays it from ``samples/step-*/samples.json``. Rank 0
watches; all ranks get the same :class:`Outcome`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cogflow.artifacts.run_layout import SAMPLES_RECORD, RunLayout, step_folders, step_name, step_of
from cogflow.config.schema import Config, TrainStage
from cogflow.data.cache import LatentCache
from cogflow.ladder import ladder_report as ladder_report
from cogflow.ladder import sample_rungs, vae_roundtrip
from cogflow.ladder.causes import describe_finding
from cogflow.ladder.reconstruction_bound import read_reconstruction_bound
from cogflow.ladder.rung import Rung
from cogflow.ladder.schedule_probe import record_schedule_probe
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.sampling import sample_folder
from cogflow.sampling.sample_record import read_sample_record
from cogflow.sampling.sampler import Request, Sampler
from cogflow.sharpness.metrics import METRICS
from cogflow.sharpness.quality_watch import LEVELS, QualityWatch, WatchVerdict
from cogflow.tracking.html_report import write_report
from cogflow.tracking.tracker import Tracker
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.retention import SHARP
from cogflow.weights.tensor_source import weights_fingerprint

SAME = ("sampling", "height", "width", "frames", "dtype")
"""What the records of two validations must share for their frames to be comparable."""


@dataclass(frozen=True)
class Outcome:
    """What a validation showed. ``line`` tells what is wrong; empty at the levels good and learning."""

    step: int
    level: str
    score: float
    line: str
    kinds: tuple[str, ...]


class Validation:
    """Samples and watches. ``sampler`` makes one with the weights of the moment; ``scaling_factor`` is training's own."""

    def __init__(
        self, config: Config[TrainStage], cache: LatentCache, folder: Path, tracker: Tracker, engine: Engine, ema: EMA | None,
        sampler: Callable[[], Sampler], wanted: Sequence[Request], scaling_factor: float,
    ) -> None:  # fmt: skip
        self.config, self.cache, self.folder, self.tracker = config, cache, folder, tracker
        self.engine, self.ema, self.sampler, self.wanted, self.scaling_factor = (
            engine,
            ema,
            sampler,
            wanted,
            scaling_factor,
        )
        self.watch: QualityWatch | None = None
        self.base: dict[str, Any] | None = None
        self.reconstruction_bound: dict[str, dict[str, float]] | None = None
        self.last: WatchVerdict | None = None
        self.outcome: Outcome | None = None
        self.stop: Callable[[], bool] | None = None
        """Whether training is asked to stop: then sampling ends with :class:`~cogflow.sampling.sampler.Interrupted`. Collective."""
        self.quiet: int | None = None
        """Step of the last validation at which nothing was wrong; of the samples before the first step, too."""

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What a checkpoint records of the newest validation."""
        if self.outcome is None:
            return None
        one = self.outcome
        return {"step": one.step, "level": one.level, "score": one.score, "kinds": list(one.kinds), "line": one.line}

    def __call__(self, done: int) -> Outcome | None:
        """Sample after ``done`` steps and judge; ``None`` where there is nothing to judge by. Collective."""
        began = time.perf_counter()
        self._measure_bound()
        if done == 0:
            self._schedule()
        target = RunLayout(self.folder).samples / step_name(done)
        record = self._sample(done, target)
        reading = None
        if ranks.is_main():
            sample_folder.remove_older_frames(RunLayout(self.folder).samples, keep=target)
            self._tell_samples(done, target, record, began)
            before = self.last
            reading = self._judge(done, record)
            self._rungs(done, record, reading)
            if reading is not None:
                self._tell(reading, before, target)
            write_report(self.folder)
        return self._share(reading)

    def replay(self, step: int) -> None:
        """Bring the watch to where it stood after ``step`` steps. Collective."""
        self.watch = self.base = self.last = self.outcome = self.quiet = None
        folders = [path for path in step_folders(RunLayout(self.folder).samples) if step_of(path) <= step]
        if not ranks.broadcast(bool(folders)):
            return
        self._measure_bound()
        reading = None
        if ranks.is_main():
            for folder in folders:
                if (folder / SAMPLES_RECORD).is_file():
                    record = read_sample_record(folder)
                    reading = self._judge(int(record["step"]), record)
        self._share(reading)

    def _measure_bound(self) -> None:
        if self.reconstruction_bound is None:
            vae_roundtrip.measure_roundtrip(self.folder, self.config, self.cache, self.sampler(), self.scaling_factor)
            self.reconstruction_bound = ranks.broadcast(
                read_reconstruction_bound(self.folder) if ranks.is_main() else None
            )

    def _schedule(self) -> None:
        record_schedule_probe(self.folder, self.sampler(), self.cache, self.scaling_factor)
        self.engine.settle()

    def _sample(self, done: int, target: Path) -> dict[str, Any]:
        with self.ema.applied(self.engine) if self.ema is not None else contextlib.nullcontext():
            facts = {
                "step": done,
                "weights": "ema" if self.ema is not None else "model",
                "weights_sha256": weights_fingerprint(self.engine.weights()),
            }
            sampler = self.sampler()
            sampler.stop = self.stop
            return sample_folder.write_samples(
                target, sampler, self.wanted, fps=self.config.data.fps, facts=facts, title=f"samples at step {done}"
            )

    def _tell_samples(self, done: int, target: Path, record: dict[str, Any], began: float) -> None:
        self.tracker.log(
            done, {**sample_folder.mean_sharpness(record), "validation/seconds": time.perf_counter() - began}
        )
        self.tracker.image(done, "samples/contact_sheet", target / "contact.png")
        for sample in record["samples"]:
            self.tracker.video(done, f"samples/{sample['name']}", target / sample["video"], sample["text"])

    def _rungs(self, done: int, record: dict[str, Any], reading: WatchVerdict | None) -> None:
        if done == 0:
            sample_rungs.record_base_rung(self.folder, record, self.config.model.name, self.sampler())
        else:
            sample_rungs.record_tuned_rung(self.folder, record, reading.findings if reading is not None else None)
        ladder_report.report_ladder(self.tracker, self.folder, done)

    def _judge(self, done: int, record: dict[str, Any]) -> WatchVerdict | None:
        """Let the watch see ``record``; the first record is what all others are held against. Rank 0 only."""
        panels = {sample["name"]: sample["sharpness"] for sample in record["samples"]}
        if any(missing := set(METRICS) - set(panel) for panel in panels.values()):
            echo(f"note: the samples of step {done} have no {', '.join(sorted(missing))}: the watch leaves them out")
            return None
        if done == 0:
            self.base, self.watch, self.last, self.quiet = (
                record,
                QualityWatch(panels, self.reconstruction_bound or None),
                None,
                0,
            )
            return None
        if self.watch is None or self.base is None:
            echo("note: no samples from before the first step: the watch has nothing to hold these against")
            return None
        other = [name for name in SAME if record.get(name) != self.base.get(name)]
        if other or {sample["name"] for sample in self.base["samples"]} != set(panels):
            what = ", ".join(other) or "the prompts"
            echo(f"warning: step {done} was sampled otherwise than step 0 ({what}); the watch leaves it out")
            return None
        self.last = self.watch.update(done, panels)
        if self.last.level in SHARP:
            self.quiet = done
        return self.last

    def _tell(self, reading: WatchVerdict, before: WatchVerdict | None, target: Path) -> None:
        """Numbers always; an alert for each finding that the validation before did not have at this level."""
        values = {f"watch/{name}": value + 0.0 for name, value in reading.z.items()}
        self.tracker.log(
            reading.step,
            {"watch/level": float(LEVELS.index(reading.level)), "watch/score": reading.score + 0.0, **values},
        )
        known = {(finding.defect, finding.level) for finding in before.findings} if before is not None else set()
        fresh = [finding for finding in reading.findings if (finding.defect, finding.level) not in known]
        if not fresh:
            return
        picture = self._picture(reading.step, target)
        for finding in fresh:
            title = f"step {reading.step}: {finding.defect.replace('_', ' ')}"
            level = "ERROR" if finding.level == "alarm" else "WARN"
            self.tracker.alert(title[:63], describe_finding(finding, Rung.TUNED), level, picture=picture)

    def _picture(self, done: int, target: Path) -> Path | None:
        """The sheets of step 0 and of now above each other, as ``watch/step-....png``."""
        sheets = [
            Image.open(path).convert("RGB")
            for folder in (target.parent / step_name(0), target)
            if (path := folder / "contact.png").is_file()
        ]
        if not sheets:
            return None
        both = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)))
        top = 0
        for sheet in sheets:
            both.paste(sheet, (0, top))
            top += sheet.height
        path = RunLayout(self.folder).watch / f"{step_name(done)}.png"
        path.parent.mkdir(exist_ok=True)
        both.save(path)
        return path

    def _share(self, reading: WatchVerdict | None) -> Outcome | None:
        """Rank 0's reading on every rank, in short."""
        mine = None
        if reading is not None:
            bad = (
                [finding for finding in reading.findings if finding.level == reading.level]
                if reading.level not in SHARP
                else []
            )
            line = "; ".join(describe_finding(finding, Rung.TUNED) for finding in bad)
            mine = Outcome(
                reading.step,
                reading.level,
                float(reading.score),
                line,
                tuple(finding.defect for finding in reading.findings),
            )
        outcome, self.quiet = ranks.broadcast((mine, self.quiet))
        self.outcome = outcome or self.outcome
        return outcome
