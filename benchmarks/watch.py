"""Simulate the quality watch on measured clips: detection and false alarms with their counts. ``python -m
benchmarks.watch``.

The input is the metrics of real contents, clean and degraded, several variants of each. One half of the contents
calibrates the noise model, and the watch is tested on the other half. A run has a baseline (one variant of some
contents) and validations (another variant of each), each moved by content drift: ``drift`` times the difference of two
random contents of the same half over the root of two, whose deviation is ``drift`` times the deviation over contents.
All metrics drift together, as they do in real contents. Drift is drawn anew for each prompt and validation; the share
``persistent`` of its variance stays over a run. With ``clips`` the watch has a VAE reconstruction bound of that many
contents, drawn independently of the prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.degrade import CLEAN
from benchmarks.output import add_size_options, new_parser, report
from benchmarks.separation import DEGRADATIONS, MetricsByContent, contents_of, measure_contents
from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.errors import DataError
from cogflow.runtime.progress import progress
from cogflow.sharpness.metrics import METRICS, Metrics
from cogflow.sharpness.noise_model import WATCH_NOISE, WatchNoise
from cogflow.sharpness.quality_watch import IN_BLUR_UNITS, QualityWatch, WatchVerdict, blur_composite
from cogflow.sharpness.verdict import metric_changes

BLURRED = "gauss 1"
DAMAGES = ("gauss 0.8", BLURRED)
LEAST = 1e-3
"""Smallest calibrated deviation, because a few contents may have equal values."""
VALIDATIONS = 5
"""Validations of a run without damage."""
SPLITS = 10
"""Random splits of the contents into halves."""


@dataclass(frozen=True)
class Trial:
    """Settings of one simulation. ``rounds``: validations without damage. ``damaged``: runs per degradation."""

    prompts: int = 8
    drift: float = 0.5
    persistent: float = 0.0
    clips: int = 0
    rounds: int = 5000
    damaged: int = 300


TRIALS = (
    Trial(drift=0.0),
    Trial(drift=0.25),
    Trial(rounds=20000, damaged=600),
    Trial(drift=1.0),
    Trial(prompts=4),
    Trial(prompts=16),
    Trial(persistent=0.5),
    Trial(clips=8),
    Trial(clips=32),
    Trial(clips=256),
)
USUAL = 2
"""Index in :data:`TRIALS` of the trial that the summary quotes."""


@dataclass(frozen=True)
class AlarmRates:
    """Counts of a trial. ``alarms`` and ``warnings`` of ``rounds`` validations without damage; ``defects``: those
    alarms by defect.

    ``first`` and ``within``: degradation -> number of ``damaged`` runs with an alarm for softness in the first
    validation, and within three.
    """

    rounds: int
    alarms: int
    warnings: int
    defects: dict[str, int]
    damaged: int
    first: dict[str, int]
    within: dict[str, int]


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("watch", __doc__)
    parser.add_argument(
        "--clips", type=Path, help="a folder of videos or frames; default: contents of installed packages"
    )
    parser.add_argument(
        "--variants", type=int, default=3, help="variants of each content, 2 or more; default: %(default)s"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the simulated runs; a smaller share is faster and less exact"
    )
    add_size_options(parser)
    given = parser.parse_args(words)
    size = (given.frames, given.height, given.width)
    contents = contents_of(given.clips)
    degradations = {name: DEGRADATIONS[name] for name in (CLEAN, *DAMAGES)}
    with progress(len(contents), "contents") as bar:
        measured = measure_contents(
            contents, max(2, given.variants), size, degradations=degradations, advance=bar.advance
        )
    if len(measured) < 4:
        raise DataError(
            f"{len(measured)} clips are large enough for {size[1]}x{size[2]}; 4 are needed.",
            "Give more or larger clips.",
        )
    with progress(len(TRIALS), "trials") as bar:
        rates = run_trials(measured, WATCH_NOISE, given.share, advance=bar.advance)
    report(watch_result(rates, len(measured), calibrate(measured, WATCH_NOISE)), given.output)


def watch_result(rates: Sequence[tuple[Trial, AlarmRates]], contents: int, noise: WatchNoise) -> BenchmarkResult:
    """Return a table with one row per trial."""
    trial, usual = rates[USUAL]
    summary = (
        f"watch: {contents} contents; {trial.prompts} prompts, drift {trial.drift}: {usual.alarms} false alarms in "
    )
    summary += f"{usual.rounds} validations; {BLURRED} at once {usual.first[BLURRED]}, {DAMAGES[0]} within three "
    summary += f"{usual.within[DAMAGES[0]]} of {usual.damaged}"
    columns = ["prompts", "drift", "persistent", "clips", "rounds", "damaged", "false alarms", "by defect"]
    columns += [f"{damage}, {when}" for damage in DAMAGES for when in ("first", "third")]
    rows = [_row(trial, found) for trial, found in rates]
    details = {"rows": [asdict(trial) | asdict(found) for trial, found in rates], "noise": asdict(noise)}
    return BenchmarkResult(summary, columns, rows, details)


def _row(trial: Trial, found: AlarmRates) -> list[Cell]:
    defects = ", ".join(f"{defect} {count}" for defect, count in found.defects.items())
    seen = [count[damage] for damage in DAMAGES for count in (found.first, found.within)]
    settings = [trial.prompts, trial.drift, trial.persistent, trial.clips]
    return [*settings, found.rounds, found.damaged, found.alarms, defects, *seen]


def run_trials(
    measured: MetricsByContent, noise: WatchNoise, share: float = 1.0, advance: Callable[[], None] = lambda: None
) -> list[tuple[Trial, AlarmRates]]:
    """Run all :data:`TRIALS` with ``share`` of their rounds and runs.

    ``noise``: the model whose deviations are calibrated anew.
    """
    rates = []
    for trial in TRIALS:
        rounds, damaged = (max(10, round(count * share)) for count in (trial.rounds, trial.damaged))
        scaled = replace(trial, rounds=rounds, damaged=damaged)
        rates.append((scaled, run_trial(measured, noise, scaled)))
        advance()
    return rates


def run_trial(
    measured: MetricsByContent, noise: WatchNoise, trial: Trial, damages: Sequence[str] = DAMAGES, seed: int = 0
) -> AlarmRates:
    """Simulate ``trial`` over :data:`SPLITS` random splits of the contents, which share its counts, rounded down.

    Raises ``ValueError`` for fewer than four contents.
    """
    names = list(measured)
    if len(names) < 4:
        raise ValueError(f"a simulation needs at least 4 contents, not {len(names)}")
    random = np.random.default_rng(seed)
    levels: Counter[str] = Counter()
    defects: Counter[str] = Counter()
    first = Counter(dict.fromkeys(damages, 0))
    within = Counter(dict.fromkeys(damages, 0))
    for split in range(SPLITS):
        halves = np.array_split(random.permutation(len(names)), 2)
        calibration, tried = ({names[i]: measured[names[i]] for i in half} for half in halves)
        simulation = WatchSimulation(tried, calibrate(calibration, noise), trial, seed=seed + split)
        for _ in range(trial.rounds // (VALIDATIONS * SPLITS)):
            for verdict in simulation.run([CLEAN] * VALIDATIONS):
                levels[verdict.level] += 1
                defects.update(finding.defect for finding in verdict.findings if finding.level == "alarm")
        for damage in damages:
            for _ in range(trial.damaged // SPLITS):
                soft = [_is_soft_alarm(verdict) for verdict in simulation.run([damage] * 3)]
                first[damage] += soft[0]
                within[damage] += any(soft)
    return AlarmRates(
        rounds=levels.total(),
        alarms=levels["alarm"],
        warnings=levels["warning"],
        defects=dict(defects),
        damaged=trial.damaged // SPLITS * SPLITS,
        first=dict(first),
        within=dict(within),
    )


def _is_soft_alarm(verdict: WatchVerdict) -> bool:
    return any(finding.defect == "soft" and finding.level == "alarm" for finding in verdict.findings)


def calibrate(measured: MetricsByContent, noise: WatchNoise, blur: str = BLURRED) -> WatchNoise:
    """Return ``noise`` with deviations, unit and gain measured on these contents; ``blur`` is the degradation whose
    blur value is -1."""
    clean = [[row[CLEAN] for row in variants] for variants in measured.values()]
    own = np.array([[blur_composite(metrics) for metrics in variants] for variants in clean])
    taken = own - np.array([[blur_composite(row[blur]) for row in variants] for variants in measured.values()])
    unit = float(np.median(taken))
    slope, at_zero = np.polyfit(own.ravel() / unit, taken.ravel() / unit, 1)
    prompt_noise = {}
    for name, one in noise.prompt_noise.items():
        scale = unit if name in IN_BLUR_UNITS else 1.0
        # Changes from one fixed clip: on a metric's scale they differ from the values by a constant.
        values = np.array([[metric_changes(row, clean[0][0])[name] for row in variants] for variants in clean]) / scale
        means = values.mean(axis=1)
        rest = values - means[:, None]
        variants_deviation = np.sqrt(2 * np.square(rest).sum() / (rest.size - len(rest)))
        prompt_noise[name] = replace(
            one, contents=max(LEAST, float(means.std(ddof=1))), variants=max(LEAST, float(variants_deviation))
        )
    return replace(noise, prompt_noise=prompt_noise, unit=unit, gain=(float(at_zero), float(slope)))


def metric_array(measured: MetricsByContent, degradation: str, metrics: Sequence[str]) -> np.ndarray:
    """Return ``[contents, variants, metrics]`` on the scale on which differences are changes."""
    rows = [[[row[degradation][name] for name in metrics] for row in variants] for variants in measured.values()]
    values = np.array(rows, dtype=np.float64)
    for place, name in enumerate(metrics):
        if METRICS[name].scale == "log":
            values[..., place] = np.log(values[..., place] + METRICS[name].floor)
    return values


class WatchSimulation:
    """Runs of a watch on ``measured``, with ``noise`` calibrated on other contents."""

    def __init__(self, measured: MetricsByContent, noise: WatchNoise, trial: Trial, *, seed: int) -> None:
        self.noise, self.trial = noise, trial
        self.random = np.random.default_rng(seed)
        self.metrics = tuple(METRICS)
        degradations = next(iter(measured.values()))[0]
        self.values = {name: metric_array(measured, name, self.metrics) for name in degradations}
        means = self.values[CLEAN].mean(axis=1)
        self.moves = means - means.mean(axis=0)
        self.moves[:, [self.metrics.index(name) for name in ("repeated", "finite")]] = 0

    def run(self, damage: Sequence[str]) -> list[WatchVerdict]:
        """Return the verdicts of one run's validations; ``damage``: the degradation at each."""
        prompts, persistent = self.trial.prompts, self.trial.persistent
        contents, variants = self.values[CLEAN].shape[:2]
        which = self.random.choice(contents, prompts, replace=prompts > contents)
        base = self.random.integers(0, variants, prompts)
        lasting = self._draw_drift()
        watch = QualityWatch(
            self._to_metrics(self.values[CLEAN][which, base]), self._reconstruction_bound(), noise=self.noise
        )
        verdicts = []
        for step, name in enumerate(damage, start=1):
            variant = (base + self.random.integers(1, variants, prompts)) % variants
            moved = np.sqrt(persistent) * lasting + np.sqrt(1 - persistent) * self._draw_drift()
            values = self.values[name][which, variant] + self.trial.drift * moved
            verdicts.append(watch.update(step, self._to_metrics(values)))
        return verdicts

    def _reconstruction_bound(self) -> dict[str, Metrics] | None:
        """Return the metrics of ``trial.clips`` contents, drawn independently of the prompts."""
        if not self.trial.clips:
            return None
        clean = self.values[CLEAN]
        which, variant = (self.random.integers(0, length, self.trial.clips) for length in clean.shape[:2])
        return {f"clip:{name}": metrics for name, metrics in self._to_metrics(clean[which, variant]).items()}

    def _draw_drift(self) -> np.ndarray:
        """Draw a symmetric drift: without damage, baseline and sample are interchangeable."""
        one, other = self.random.integers(0, len(self.moves), (2, self.trial.prompts))
        return np.asarray((self.moves[one] - self.moves[other]) / np.sqrt(2))

    def _to_metrics(self, values: np.ndarray) -> dict[str, Metrics]:
        """Return the rows of ``values`` as metrics, with logarithmic scales undone."""
        undone = values.copy()
        for place, metric in enumerate(METRICS.values()):
            if metric.scale == "log":
                undone[:, place] = np.exp(undone[:, place]) - metric.floor
            if metric.name == "brightness":  # drift represents other content, not a black or white frame
                undone[:, place] = undone[:, place].clip(0.1, 0.9)
        return {str(index): dict(zip(self.metrics, row, strict=True)) for index, row in enumerate(undone.tolist())}


if __name__ == "__main__":
    main()
