"""Validation: sample every prompt from its fixed noise, record the rungs of the sharpness ladder, and update the
quality watch.

The state of the watch is a function of the samples so far: a resumed run replays it from
``samples/step-*/samples.json``. Rank 0 watches, and all ranks get the same outcome.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from cogflow.artifacts.run_layout import SAMPLES_RECORD, RunLayout, step_folders, step_name, step_of
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.latent_cache import LatentCache
from cogflow.data.media import open_picture
from cogflow.data.media_bytes import ClipError
from cogflow.ladder import ladder_report, sample_rungs, vae_roundtrip
from cogflow.ladder.causes import describe_finding
from cogflow.ladder.reconstruction_bound import read_reconstruction_bound
from cogflow.ladder.rung import Rung
from cogflow.ladder.schedule_probe import record_schedule_probe
from cogflow.records.sample_records import SampledWeights, SamplesRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.sampling import sample_folder
from cogflow.sampling.sample_record import read_sample_record
from cogflow.sampling.sampler import Request, Sampler
from cogflow.sharpness.metrics import METRICS
from cogflow.sharpness.quality_watch import LEVELS, QualityWatch, WatchVerdict
from cogflow.tracking.html_report import write_report
from cogflow.training.callback import Callback, TrainingContext, ValidationOutcome
from cogflow.training.retention import GOOD_LEVELS
from cogflow.weights.tensor_source import weights_fingerprint

COMPARABLE = ("sampling", "height", "width", "frames", "dtype")
"""Fields of two sample records that must be equal for their frames to be comparable."""


class Validation(Callback):
    """Samples and watches.

    ``make_sampler``: returns a sampler of the model in training. It is called once for each validation, because a
    sampler may copy the VAE. ``scaling_factor``: that of training.
    """

    def __init__(
        self,
        config: Config[TrainStage],
        cache: LatentCache,
        make_sampler: Callable[[], Sampler],
        requests: Sequence[Request],
        scaling_factor: float,
    ) -> None:
        self.config, self.cache, self.make_sampler = config, cache, make_sampler
        self.requests, self.scaling_factor = requests, scaling_factor
        self.reconstruction_bound: dict[str, dict[str, float]] | None = None
        self._watch: QualityWatch | None = None
        self._base: SamplesRecord | None = None
        self._last: WatchVerdict | None = None

    def on_train_start(self, context: TrainingContext) -> None:
        if context.step > 0:
            self.replay(context)

    def on_validate(self, context: TrainingContext) -> None:
        """Sample, judge, and set ``context.outcome`` where there is something to compare with. Collective."""
        began = time.perf_counter()
        sampler = self.make_sampler()
        sampler.stop = context.stop_requested
        self._measure_reconstruction_bound(context, sampler)
        if context.step == 0:
            self._record_schedule_probe(context, sampler)
        samples = RunLayout(context.folder).samples / step_name(context.step)
        record = self._sample(context, sampler, samples)
        verdict = None
        if ranks.is_main():
            sample_folder.remove_older_frames(RunLayout(context.folder).samples, keep=samples)
            self._log_samples(context, samples, record, seconds=time.perf_counter() - began)
            before = self._last
            verdict = self._judge(context, context.step, record)
            self._record_rungs(context, sampler, record, verdict)
            if verdict is not None:
                self._report_verdict(context, verdict, before, samples)
            write_report(context.folder)
        self._share_outcome(context, verdict)

    def replay(self, context: TrainingContext) -> None:
        """Restore the watch after ``context.step`` steps from the samples of the run. Collective."""
        self._watch = self._base = self._last = None
        context.outcome = None
        context.last_good_step = None
        folders = [path for path in step_folders(RunLayout(context.folder).samples) if step_of(path) <= context.step]
        if not ranks.broadcast(bool(folders)):
            return
        if self.reconstruction_bound is None:
            self._measure_reconstruction_bound(context, self.make_sampler())
        verdict = None
        if ranks.is_main():
            for folder in folders:
                if (folder / SAMPLES_RECORD).is_file():
                    verdict = self._judge(context, step_of(folder), read_sample_record(folder))
        self._share_outcome(context, verdict)

    def _measure_reconstruction_bound(self, context: TrainingContext, sampler: Sampler) -> None:
        """Measure the VAE reconstruction bound, once for each process."""
        if self.reconstruction_bound is None:
            vae_roundtrip.measure_roundtrip(context.folder, self.config, self.cache, sampler, self.scaling_factor)
            self.reconstruction_bound = ranks.run_on_main(lambda: read_reconstruction_bound(context.folder))

    def _record_schedule_probe(self, context: TrainingContext, sampler: Sampler) -> None:
        record_schedule_probe(context.folder, sampler, self.cache, self.scaling_factor)
        context.engine.flush_prefetch()

    def _sample(self, context: TrainingContext, sampler: Sampler, target: Path) -> SamplesRecord:
        """Sample all requests into ``target``, from the EMA where there is one; return the record of the samples."""
        with context.ema.applied(context.engine) if context.ema is not None else contextlib.nullcontext():
            weights = SampledWeights(
                weights_sha256=weights_fingerprint(context.engine.weights()),
                step=context.step,
                weights="ema" if context.ema is not None else "model",
            )
            title = f"samples at step {context.step}"
            return sample_folder.write_samples(
                target, sampler, self.requests, fps=self.config.data.fps, weights=weights, title=title
            )

    def _log_samples(self, context: TrainingContext, target: Path, record: SamplesRecord, *, seconds: float) -> None:
        step, tracker = context.step, context.tracker
        tracker.log(step, {**sample_folder.mean_sharpness(record), "validation/seconds": seconds})
        tracker.image(step, "samples/contact_sheet", target / "contact.png")
        for sample in record.samples:
            tracker.video(step, f"samples/{sample.name}", target / sample.video, sample.text)

    def _record_rungs(
        self, context: TrainingContext, sampler: Sampler, record: SamplesRecord, verdict: WatchVerdict | None
    ) -> None:
        if context.step == 0:
            sample_rungs.record_base_rung(context.folder, record, self.config.model.name, sampler)
        else:
            findings = verdict.findings if verdict is not None else None
            sample_rungs.record_tuned_rung(context.folder, record, findings)
        ladder_report.report_ladder(context.tracker, context.folder, context.step)

    def _judge(self, context: TrainingContext, step: int, record: SamplesRecord) -> WatchVerdict | None:
        """Update the watch with ``record``; the record of step 0 is the base of all comparisons. Rank 0 only."""
        metrics = record.metrics()
        if any(missing := set(METRICS) - set(values) for values in metrics.values()):
            echo(f"note: the samples of step {step} have no {', '.join(sorted(missing))}: the watch skips them")
            return None
        if step == 0:
            self._base, self._last = record, None
            self._watch = QualityWatch(metrics, self.reconstruction_bound or None)
            context.last_good_step = 0
            return None
        if self._watch is None or self._base is None:
            echo("note: there are no samples from before the first step: the watch has nothing to compare these with")
            return None
        different = [name for name in COMPARABLE if getattr(record, name) != getattr(self._base, name)]
        if different or set(self._base.metrics()) != set(metrics):
            what = ", ".join(different) or "the prompts"
            echo(f"warning: step {step} was sampled with other settings than step 0 ({what}); the watch skips it")
            return None
        self._last = self._watch.update(step, metrics)
        if self._last.level in GOOD_LEVELS:
            context.last_good_step = step
        return self._last

    def _report_verdict(
        self, context: TrainingContext, verdict: WatchVerdict, before: WatchVerdict | None, samples: Path
    ) -> None:
        """Log the verdict, and alert for each finding that the validation before did not have at this level."""
        values = {f"watch/{name}": value + 0.0 for name, value in verdict.z.items()}
        level = {"watch/level": float(LEVELS.index(verdict.level)), "watch/score": verdict.score + 0.0}
        context.tracker.log(verdict.step, {**level, **values})
        known = {(finding.defect, finding.level) for finding in before.findings} if before is not None else set()
        fresh = [finding for finding in verdict.findings if (finding.defect, finding.level) not in known]
        if not fresh:
            return
        picture = self._comparison_picture(context, verdict.step, samples)
        for finding in fresh:
            title = f"step {verdict.step}: {finding.defect.replace('_', ' ')}"
            severity = "ERROR" if finding.level == "alarm" else "WARN"
            context.tracker.alert(title[:63], describe_finding(finding, Rung.TUNED), severity, picture=picture)

    def _comparison_picture(self, context: TrainingContext, step: int, samples: Path) -> Path | None:
        """Write ``watch/step-....png``, the contact sheet of step 0 above that of ``step``; return its path."""
        sheets = []
        for folder in (samples.parent / step_name(0), samples):
            with contextlib.suppress(ClipError), open_picture(folder / "contact.png") as picture:
                sheets.append(picture.convert("RGB"))
        if not sheets:
            return None
        both = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)))
        top = 0
        for sheet in sheets:
            both.paste(sheet, (0, top))
            top += sheet.height
        path = RunLayout(context.folder).watch / f"{step_name(step)}.png"
        path.parent.mkdir(exist_ok=True)
        both.save(path)
        return path

    def _share_outcome(self, context: TrainingContext, verdict: WatchVerdict | None) -> None:
        """Give every rank rank 0's outcome and last good step. Collective."""
        mine = None if verdict is None else outcome_of(verdict)
        outcome, last_good_step = ranks.broadcast((mine, context.last_good_step))
        context.outcome = outcome or context.outcome
        context.last_good_step = last_good_step


def outcome_of(verdict: WatchVerdict) -> ValidationOutcome:
    """Return a verdict of the watch in the form that policies and checkpoints use."""
    worst = [finding for finding in verdict.findings if finding.level == verdict.level]
    return ValidationOutcome(
        step=verdict.step,
        level=verdict.level,
        score=float(verdict.score),
        message=""
        if verdict.level in GOOD_LEVELS
        else "; ".join(describe_finding(finding, Rung.TUNED) for finding in worst),
        defects=tuple(finding.defect for finding in verdict.findings),
    )
