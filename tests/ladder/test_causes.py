"""Test the likely causes by defect and rung, and the texts of findings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cogflow.ladder.causes import describe_change, describe_finding, gaussian_width, likely_causes
from cogflow.ladder.rung import Rung
from cogflow.sharpness import DEFECTS
from cogflow.sharpness.quality_watch import UNCHANGED
from cogflow.sharpness.verdict import Finding


@pytest.mark.parametrize("rung", Rung)
@pytest.mark.parametrize("defect", [*DEFECTS, UNCHANGED])
def test_every_defect_has_distinct_causes_at_every_rung(defect: str, rung: Rung) -> None:
    causes = likely_causes(defect, rung)
    assert causes
    assert len(set(causes)) == len(causes)


def test_known_incidents_have_their_cause_first() -> None:
    assert "scaling_factor" in likely_causes("washed_out", Rung.ROUNDTRIP)[0]
    assert likely_causes("soft", Rung.TUNED)[0] == "learning rate too high"
    assert "snr_shift_scale" in likely_causes("soft", Rung.BASE)[0]
    assert "config" in likely_causes("soft", Rung.EXPORTED)[0]
    assert "fp16" in likely_causes("non_finite", Rung.ROUNDTRIP)[0]


def test_an_unknown_defect_has_the_rungs_general_causes() -> None:
    assert likely_causes("of no name", Rung.TUNED) == likely_causes("", Rung.TUNED)


def test_description_gives_rung_defect_size_step_and_causes() -> None:
    finding = Finding("soft", "alarm", "wavelet_ratio", -0.55, -6.0, since=300)
    line = describe_finding(finding, Rung.TUNED)
    assert line.startswith(
        "alarm: soft at rung 4 (tuned): fine detail is lost "
        "(wavelet ratio -42%, like a Gaussian blur of about 1.0 pixels"
    )
    assert "since step 300; likely: learning rate too high" in line
    assert "\n" not in line


def test_description_of_unchanged_samples_names_the_likeliest_cause() -> None:
    line = describe_finding(Finding(UNCHANGED, "warning", "finite", 0.0, 0.0, since=50), Rung.TUNED)
    assert "likely: the samples are not made with the trained weights" in line
    assert "finite" not in line


def test_changes_are_described_in_per_cent_or_as_differences() -> None:
    assert describe_change("contrast", -0.223) == "contrast -20%"
    assert describe_change("haze", 0.05) == "haze +0.05"
    assert gaussian_width(-9.0) == "1.5 pixels or more"
    assert gaussian_width(-0.35) == "about 0.8 pixels"


def test_sharpness_names_no_setting_of_cogflow(repository: Path) -> None:
    setting = re.compile(
        r"\b(stage|data|sampling|model|deepspeed)\.[a-z_]+ ?(=|higher|too|with)|ema_decay|learning rate"
    )
    for path in (repository / "cogflow" / "sharpness").glob("*.py"):
        text = re.sub(r"``stage=benchmark[^`]*``", "", path.read_text(encoding="utf-8"))
        assert not setting.search(text), (path.name, setting.search(text))
