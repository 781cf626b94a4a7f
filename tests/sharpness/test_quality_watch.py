"""The quality watch on measured samples of the tiny model: no alarm on other seeds, each defect by name, equal results
after a resume.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cogflow.sharpness.metrics import METRICS, Metrics, shift_value
from cogflow.sharpness.quality_watch import QualityWatch, WatchVerdict

STORED = json.loads((Path(__file__).parent / "data" / "null_samples.json").read_text())
"""Metrics of the shipped model's samples: ``prompt-seedN`` to the values of the metrics named in ``names``."""
SEEDS = 24
CLIPS = 8


def sample(prompt: str, seed: int) -> Metrics:
    return dict(zip(STORED["names"], STORED["metrics"][f"{prompt}-seed{seed}"], strict=True))


PROMPTS = sorted({name.rsplit("-seed", 1)[0] for name in STORED["metrics"]})


def drawn(random: np.random.Generator, prompts: int) -> tuple[dict[str, Metrics], Callable[[], dict[str, Metrics]]]:
    """A baseline of ``prompts`` samples, and what gives the same prompts from other seeds, always new ones."""
    names = [(PROMPTS[place % len(PROMPTS)], place) for place in range(prompts)]
    seeds = {place: list(random.permutation(SEEDS)) for _, place in names}

    def take() -> dict[str, Metrics]:
        return {f"{prompt}-{place}": sample(prompt, int(seeds[place].pop())) for prompt, place in names}

    return take(), take


def altered(samples: dict[str, Metrics], **changes: float) -> dict[str, Metrics]:
    """Samples with each metric changed by that much on its own scale."""
    found = {}
    for name, metrics in samples.items():
        new = dict(metrics)
        for metric, by in changes.items():
            new[metric] = shift_value(metric, metrics[metric], by)
        found[name] = new
    return found


SOFT = {"edge_sharpness": -0.15, "reblur": -0.08, "wavelet_ratio": -0.55, "temporal_sharpness": -0.6}
"""What a Gaussian of about one pixel does to real clips."""


def defects(verdict: WatchVerdict, level: str = "alarm") -> set[str]:
    return {finding.defect for finding in verdict.findings if finding.level == level}


def base(prompts: int = CLIPS) -> dict[str, Metrics]:
    return drawn(np.random.default_rng(0), prompts)[0]


def test_stored_samples_have_all_metrics() -> None:
    assert STORED["names"] == list(METRICS)
    assert len(STORED["metrics"]) == len(PROMPTS) * SEEDS


@pytest.mark.parametrize("prompts", [4, 8])
def test_a_hundred_validations_of_other_seeds_raise_no_alarm(prompts: int) -> None:
    """Samples of other seeds of one model vary more than those of a finetune, which keeps its seeds."""
    random, validations = np.random.default_rng(0), 0
    for _ in range(10):
        baseline, take = drawn(random, prompts)
        watch = QualityWatch(baseline, {f"clip {name}": metrics for name, metrics in drawn(random, CLIPS)[0].items()})
        for step in range(1, 11):
            verdict = watch.update(step, take())
            assert verdict.level in ("good", "learning"), verdict.line()
            assert verdict.score == 0
            validations += 1
    assert validations == 100


def test_equal_runs_give_equal_verdicts() -> None:
    def verdicts() -> list[WatchVerdict]:
        baseline, take = drawn(np.random.default_rng(3), CLIPS)
        watch = QualityWatch(baseline)
        return [
            watch.update(1, take()),
            watch.update(2, altered(take(), **SOFT)),
            watch.update(3, altered(take(), **SOFT)),
        ]

    assert verdicts() == verdicts()


def test_a_replayed_watch_continues_as_if_never_stopped() -> None:
    baseline, take = drawn(np.random.default_rng(4), CLIPS)
    bound = drawn(np.random.default_rng(5), CLIPS)[0]
    validations = [take(), altered(take(), **SOFT), altered(take(), **SOFT)]
    one = QualityWatch(baseline, bound)
    through = [one.update(step, samples) for step, samples in enumerate(validations, start=1)]
    other = QualityWatch(json.loads(json.dumps(baseline)), json.loads(json.dumps(bound)))
    for step, samples in enumerate(validations[:2], start=1):
        other.update(step, json.loads(json.dumps(samples)))
    assert other.update(3, validations[2]) == through[2]


def test_verdict_does_not_depend_on_the_order_of_prompts() -> None:
    baseline, samples = base(), altered(base(), **SOFT)
    backwards = dict(reversed(list(samples.items())))
    assert QualityWatch(baseline).update(1, samples) == QualityWatch(baseline).update(1, backwards)


@pytest.mark.parametrize(
    ("defect", "change"),
    [
        ("soft", SOFT),
        ("over_sharpened", {name: -by for name, by in SOFT.items()}),
        ("washed_out", {"contrast": -0.6}),
        ("washed_out", {"saturation": -1.2}),
        ("hazy", {"haze": 0.3}),
        ("smeared", {"temporal_sharpness": -1.2}),
        ("grainy", {"grain": 1.5}),
        ("saturated", {"saturation": 1.2}),
        ("frozen", {"motion": -2.5}),
        ("artefacts", {"artefacts": 0.4}),
        ("artefacts", {"artefacts": -0.4}),
    ],
)
def test_the_watch_names_the_defect(defect: str, change: dict[str, float]) -> None:
    verdict = QualityWatch(base()).update(100, altered(base(), **change))
    assert verdict.level == "alarm"
    assert defects(verdict) == {defect}
    (finding,) = verdict.findings
    assert finding.since == 100
    assert verdict.score < 0


def test_a_change_of_a_tenth_of_a_percent_is_never_an_alarm() -> None:
    watch = QualityWatch(base(24))
    for step in range(1, 200):
        verdict = watch.update(
            step, altered(base(24), edge_sharpness=-0.001, reblur=-0.001, contrast=-0.001, motion=-0.01)
        )
        assert verdict.level == "good"


def test_a_constant_change_does_not_accumulate() -> None:
    watch, small = QualityWatch(base()), {name: by / 4 for name, by in SOFT.items()}
    scores = [watch.update(step, altered(base(), **small)).z["blur"] for step in range(1, 100)]
    assert scores[-1] == pytest.approx(scores[0], abs=1e-6)


def test_one_soft_prompt_is_no_alarm() -> None:
    samples = base()
    first = next(iter(samples))
    samples[first] = altered({first: samples[first]}, **{name: 4 * by for name, by in SOFT.items()})[first]
    assert QualityWatch(base()).update(1, samples).level in ("good", "learning")


def test_since_is_the_first_step_of_an_unbroken_finding() -> None:
    watch = QualityWatch(base())
    soft, fine = altered(base(), **SOFT), altered(base(), brightness=0.001)
    found = [watch.update(step, samples) for step, samples in ((10, fine), (20, soft), (30, soft), (40, soft))]
    assert found[0].level == "good"
    assert {finding.since for verdict in found[1:] for finding in verdict.findings if finding.defect == "soft"} == {20}
    for step in range(50, 200, 10):
        cleared = watch.update(step, fine)
    assert cleared.level == "good"
    assert watch.update(200, soft).findings[0].since == 200


def test_change_towards_softer_data_is_learning_and_beyond_it_damage() -> None:
    softer = {
        f"clip {name}": metrics
        for name, metrics in altered(base(), **{name: 2 * by for name, by in SOFT.items()}).items()
    }
    watch = QualityWatch(base(), softer)
    verdict = watch.update(1, altered(base(), **SOFT))
    assert verdict.level == "learning"
    assert "softer" in verdict.line()
    assert (
        QualityWatch(base()).update(1, altered(base(), **SOFT)).level == "alarm"
    )  # without those clips it would be one
    assert "soft" in defects(watch.update(2, altered(base(), **{name: 4 * by for name, by in SOFT.items()})))


def test_change_towards_sharper_data_is_learning_and_beyond_it_damage() -> None:
    up = {name: -by for name, by in SOFT.items()}
    sharper = altered(base(), **{name: 2 * by for name, by in up.items()})
    assert QualityWatch(base(), sharper).update(1, altered(base(), **up)).level == "learning"
    assert "over_sharpened" in defects(
        QualityWatch(base(), sharper).update(1, altered(base(), **{name: 5 * by for name, by in up.items()}))
    )
    assert "soft" in defects(QualityWatch(base(), sharper).update(1, altered(base(), **SOFT)))


def test_immediate_defects_need_no_statistics() -> None:
    samples = base()
    first = next(iter(samples))

    def one(**values: float) -> WatchVerdict:
        return QualityWatch(base()).update(5, samples | {first: samples[first] | values})

    assert defects(one(finite=0.99)) == {"non_finite"}
    assert "black" in defects(one(brightness=0.0, contrast=0.0))
    assert defects(one(repeated=1.0), "warning") == {"identical"}  # one still picture may be what was asked for
    still = QualityWatch(base()).update(5, altered(base(), repeated=1.0, motion=-9.0))
    assert defects(still) == {"identical"}  # and not reported as frozen as well


def test_samples_equal_to_the_baseline_are_a_warning() -> None:
    verdict = QualityWatch(base()).update(50, base())
    assert (verdict.level, [finding.defect for finding in verdict.findings]) == ("warning", ["unchanged"])


def test_watch_refuses_empty_baselines_and_other_names() -> None:
    with pytest.raises(ValueError, match="samples to start from"):
        QualityWatch({})
    samples = base()
    samples.pop(next(iter(samples)))
    with pytest.raises(ValueError, match="names of the baseline"):
        QualityWatch(base()).update(1, samples)


def test_watch_works_with_one_prompt() -> None:
    verdict = QualityWatch(base(1)).update(1, altered(base(1), **{name: 6 * by for name, by in SOFT.items()}))
    assert "soft" in defects(verdict)
