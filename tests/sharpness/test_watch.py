"""The watch on measured samples of the tiny model: silent on other seeds, awake to each kind, the same after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cogflow.sharpness.metrics import METRICS, Metrics, moved
from cogflow.sharpness.quality_watch import QualityWatch, WatchVerdict

STORED = json.loads((Path(__file__).parent / "data" / "null_samples.json").read_text())
"""Panels of the shipped model's samples, ``prompt-seedN`` to the values of ``channels``."""
SEEDS = 24
CLIPS = 8


def sample(prompt: str, seed: int) -> Metrics:
    return dict(zip(STORED["channels"], STORED["panels"][f"{prompt}-seed{seed}"], strict=True))


PROMPTS = sorted({name.rsplit("-seed", 1)[0] for name in STORED["panels"]})


def drawn(random: np.random.Generator, prompts: int) -> tuple[dict[str, Metrics], Callable[[], dict[str, Metrics]]]:
    """A baseline of ``prompts`` samples, and what gives the same prompts from other seeds, always new ones."""
    names = [(PROMPTS[place % len(PROMPTS)], place) for place in range(prompts)]
    seeds = {place: list(random.permutation(SEEDS)) for _, place in names}

    def take() -> dict[str, Metrics]:
        return {f"{prompt}-{place}": sample(prompt, int(seeds[place].pop())) for prompt, place in names}

    return take(), take


def altered(panels: dict[str, Metrics], **channels: float) -> dict[str, Metrics]:
    """Each channel moved by that change (on its own scale)."""
    found = {}
    for name, panel in panels.items():
        new = dict(panel)
        for channel, by in channels.items():
            new[channel] = moved(channel, panel[channel], by)
        found[name] = new
    return found


SOFT = {"edge_sharpness": -0.15, "reblur": -0.08, "wavelet_ratio": -0.55, "temporal_sharpness": -0.6}
"""What a Gaussian of about one pixel does to real clips."""


def kinds(reading: WatchVerdict, level: str = "alarm") -> set[str]:
    return {finding.kind for finding in reading.findings if finding.level == level}


def base(prompts: int = CLIPS) -> dict[str, Metrics]:
    return drawn(np.random.default_rng(0), prompts)[0]


def test_stored_panels_have_todays_channels() -> None:
    assert STORED["channels"] == list(METRICS)
    assert len(STORED["panels"]) == len(PROMPTS) * SEEDS


@pytest.mark.parametrize("prompts", [4, 8])
def test_a_hundred_null_validations_raise_no_alarm(prompts: int) -> None:
    """Other seeds of the same model: a wider null than a finetune's, which keeps its seeds."""
    random, validations = np.random.default_rng(0), 0
    for _ in range(10):
        baseline, take = drawn(random, prompts)
        watch = QualityWatch(baseline, {f"clip {name}": panel for name, panel in drawn(random, CLIPS)[0].items()})
        for step in range(1, 11):
            reading = watch.update(step, take())
            assert reading.level in ("quiet", "learning"), reading.line()
            assert reading.score == 0
            validations += 1
    assert validations == 100


def test_the_same_run_again_gives_the_same_readings() -> None:
    def readings() -> list[WatchVerdict]:
        baseline, take = drawn(np.random.default_rng(3), CLIPS)
        watch = QualityWatch(baseline)
        return [
            watch.update(1, take()),
            watch.update(2, altered(take(), **SOFT)),
            watch.update(3, altered(take(), **SOFT)),
        ]

    assert readings() == readings()


def test_replayed_from_json_it_goes_on_as_if_never_stopped() -> None:
    baseline, take = drawn(np.random.default_rng(4), CLIPS)
    ceiling = drawn(np.random.default_rng(5), CLIPS)[0]
    validations = [take(), altered(take(), **SOFT), altered(take(), **SOFT)]
    one = QualityWatch(baseline, ceiling)
    through = [one.update(step, panels) for step, panels in enumerate(validations, start=1)]
    other = QualityWatch(json.loads(json.dumps(baseline)), json.loads(json.dumps(ceiling)))
    for step, panels in enumerate(validations[:2], start=1):
        other.update(step, json.loads(json.dumps(panels)))
    assert other.update(3, validations[2]) == through[2]


def test_order_of_the_prompts_does_not_matter() -> None:
    baseline, panels = base(), altered(base(), **SOFT)
    backwards = dict(reversed(list(panels.items())))
    assert QualityWatch(baseline).update(1, panels) == QualityWatch(baseline).update(1, backwards)


@pytest.mark.parametrize(
    ("kind", "change"),
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
def test_each_kind_is_named(kind: str, change: dict[str, float]) -> None:
    reading = QualityWatch(base()).update(100, altered(base(), **change))
    assert reading.level == "alarm"
    assert kinds(reading) == {kind}
    (finding,) = reading.findings
    assert (finding.rung, finding.since) == (4, 100)
    assert reading.score < 0


def test_a_tenth_of_a_percent_is_never_an_alarm_however_sure() -> None:
    watch = QualityWatch(base(24))
    for step in range(1, 200):
        reading = watch.update(
            step, altered(base(24), edge_sharpness=-0.001, reblur=-0.001, contrast=-0.001, motion=-0.01)
        )
        assert reading.level == "quiet"


def test_a_level_that_stays_does_not_add_up() -> None:
    watch, small = QualityWatch(base()), {name: by / 4 for name, by in SOFT.items()}
    scores = [watch.update(step, altered(base(), **small)).z["blur"] for step in range(1, 100)]
    assert scores[-1] == pytest.approx(scores[0], abs=1e-6)


def test_one_prompt_alone_is_no_alarm() -> None:
    panels = base()
    first = next(iter(panels))
    panels[first] = altered({first: panels[first]}, **{name: 4 * by for name, by in SOFT.items()})[first]
    assert QualityWatch(base()).update(1, panels).level in ("quiet", "learning")


def test_since_is_where_the_unbroken_run_began() -> None:
    watch = QualityWatch(base())
    soft, fine = altered(base(), **SOFT), altered(base(), brightness=0.001)
    found = [watch.update(step, panels) for step, panels in ((10, fine), (20, soft), (30, soft), (40, soft))]
    assert found[0].level == "quiet"
    assert {finding.since for reading in found[1:] for finding in reading.findings if finding.kind == "soft"} == {20}
    for step in range(50, 200, 10):
        cleared = watch.update(step, fine)
    assert cleared.level == "quiet"
    assert watch.update(200, soft).findings[0].since == 200


def test_moving_towards_softer_data_is_learning_and_below_it_is_damage() -> None:
    softer = {
        f"clip {name}": panel for name, panel in altered(base(), **{name: 2 * by for name, by in SOFT.items()}).items()
    }
    watch = QualityWatch(base(), softer)
    reading = watch.update(1, altered(base(), **SOFT))
    assert reading.level == "learning"
    assert "softer" in reading.line()
    assert (
        QualityWatch(base()).update(1, altered(base(), **SOFT)).level == "alarm"
    )  # without those clips it would be one
    assert "soft" in kinds(watch.update(2, altered(base(), **{name: 4 * by for name, by in SOFT.items()})))


def test_moving_towards_sharper_data_is_learning_and_beyond_it_is_damage() -> None:
    up = {name: -by for name, by in SOFT.items()}
    sharper = altered(base(), **{name: 2 * by for name, by in up.items()})
    assert QualityWatch(base(), sharper).update(1, altered(base(), **up)).level == "learning"
    assert "over_sharpened" in kinds(
        QualityWatch(base(), sharper).update(1, altered(base(), **{name: 5 * by for name, by in up.items()}))
    )
    assert "soft" in kinds(QualityWatch(base(), sharper).update(1, altered(base(), **SOFT)))


def test_what_needs_no_statistics() -> None:
    panels = base()
    first = next(iter(panels))

    def one(**values: float) -> WatchVerdict:
        return QualityWatch(base()).update(5, panels | {first: panels[first] | values})

    assert kinds(one(finite=0.99)) == {"non_finite"}
    assert "black" in kinds(one(brightness=0.0, contrast=0.0))
    assert kinds(one(repeated=1.0), "warning") == {"identical"}  # one still picture may be what was asked for
    still = QualityWatch(base()).update(5, altered(base(), repeated=1.0, motion=-9.0))
    assert kinds(still) == {"identical"}  # and is not told as frozen, too


def test_samples_that_never_change_are_told() -> None:
    reading = QualityWatch(base()).update(50, base())
    assert (reading.level, [finding.kind for finding in reading.findings]) == ("warning", ["unchanged"])
    assert "not made with the trained weights" in reading.line()


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="samples to start from"):
        QualityWatch({})
    panels = base()
    panels.pop(next(iter(panels)))
    with pytest.raises(ValueError, match="names of the baseline"):
        QualityWatch(base()).update(1, panels)


def test_one_prompt_is_enough_to_run() -> None:
    reading = QualityWatch(base(1)).update(1, altered(base(1), **{name: 6 * by for name, by in SOFT.items()}))
    assert "soft" in kinds(reading)
