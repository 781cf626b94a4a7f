"""Test that the report shows a run, escapes its text, links relative paths, and copes with missing files."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cogflow.config.config import Config
from cogflow.data.video import write_video
from cogflow.files.record_io import write_record
from cogflow.records.history_records import HistoryRecord, ReplacedRecord, RunLine
from cogflow.records.run_records import MachineRecord, RunToken, StageRecord
from cogflow.records.sample_records import SampleRecord, SamplesRecord, SamplingRecord
from cogflow.tracking.contact_sheet import contact_sheet
from cogflow.tracking.curves import Chart, ChartSpec, Line, draw_chart, running_mean
from cogflow.tracking.formatting import short
from cogflow.tracking.html_report import write_report
from cogflow.tracking.run_data import Points
from cogflow.tracking.stage_record import write_stage_record
from cogflow.tracking.tracker import open_tracker

EVIL = """a "star" <script>alert('x')</script> & <b>more</b>"""


class Page(HTMLParser):
    """Tags with their attributes, in order; fails for tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def samples_record(step: int, samples: list[SampleRecord]) -> SamplesRecord:
    sampling = SamplingRecord("sat_dpm", "SAT VPSDEDPMPP2MSampler", "zeros", 20, 6.0, True, "fp32", False)
    return SamplesRecord(
        step=step,
        weights_sha256="ab",
        sampling=sampling,
        height=64,
        width=96,
        frames=9,
        fps=8.0,
        max_sequence_length=32,
        dtype="fp32",
        device="cpu",
        samples=samples,
        weights="model",
    )


def stage_record(stage: str, **results: float) -> StageRecord:
    return StageRecord(
        stage=stage,
        status="done",
        started="2026-01-01T00:00:00Z",
        finished="2026-01-01T00:00:05Z",
        seconds=5.0,
        command="python -m cogflow",
        folder="runs/demo",
        inputs={},
        results=results,
        settings={},
        versions={},
        machine=MachineRecord("Linux", 2, 1),
    )


@pytest.fixture
def run(tmp_path: Path, config: Config, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = tmp_path / "demo run"
    with open_tracker(config, "train", folder) as tracker:
        for step in range(5):
            tracker.log(
                step, {"train/loss": 1.0 / (step + 1), "train/loss_q1": 0.5, "train/lr": 4e-4, "train/step_time": 0.5}
            )
        for step in (0, 4):
            tracker.log(step, {"sharpness/wavelet_ratio": 0.3 - 0.01 * step, "heldout/loss": 0.5})
            samples = folder / f"samples/step-{step:06d}"
            entries = []
            for index in range(2):
                name = f"p{index} #-seed0"
                write_video(samples / f"{name}.mp4", clip if step else clip[:, ::-1], 8)
                sharpness = {"wavelet_ratio": 0.3 - 0.01 * step, "contrast": math.nan}
                entries.append(SampleRecord(name, f"p{index}", EVIL, 0, f"{name}.mp4", sharpness))
            contact_sheet({"p": clip}, 3).save(samples / "contact.png")
            write_record(samples / "samples.json", samples_record(step, entries))
        tracker.table("train/closing_table", ["prompt", "ratio"], [[EVIL, 0.5]])
        tracker.alert("soft", EVIL)
        tracker.artifact("latents", "dataset", folder / "metrics.jsonl", uses=["clips"])
    write_stage_record(
        folder,
        "train",
        config,
        {"cache": {"sha256": "abc123"}},
        {"summary": "4 steps " + EVIL, "where": str(folder / "samples")},
    )
    return folder


def test_the_report_shows_identity_progress_and_tables_of_the_run(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    assert (
        "demo" in text
        and "abc123" in text
        and "step 4 of 4" in text
        and "demo-latents" in text
        and "Train: closing table" in text
    )
    titles = {svg["aria-label"] for svg in page.all("svg")}
    assert {
        "Loss",
        "Wavelet ratio",
        "Training loss by timestep",
        "Held-out loss by timestep",
        "Learning rate",
        "Step time",
    } - titles == {"Held-out loss by timestep"}
    videos = page.all("video")
    assert len(videos) == 4 and all({"muted", "loop", "autoplay", "playsinline"} <= set(video) for video in videos)
    assert "9 frames of 64x96, 20 denoising steps, guidance 6, sampler sat_dpm" in text
    assert text.count('<th class="number">ratio</th>') == 1 and text.count('<td class="number">0.5</td>') == 1
    assert "<em>−0.04</em>" in text  # 0.26 after 0.30: a difference, for the wavelet ratio is a logarithm


def test_users_text_is_escaped(run: Path) -> None:
    text = write_report(run).read_text()
    assert "<script>alert" not in text and "<b>more" not in text
    assert text.count("&lt;script&gt;alert") >= 5  # prompts, table, alert, summary, records
    assert len(Page(text).all("script")) == 1


def test_every_link_is_relative_and_leads_to_a_file(run: Path, tmp_path: Path) -> None:
    write_report(run)
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    text = (moved / "report.html").read_text()
    page = Page(text)
    from urllib.parse import unquote

    links = [tag.get("src") or tag.get("href") or "" for name in ("video", "img", "a") for tag in page.all(name)]
    assert len(links) == 4 + 2 + 2 + 1
    for link in links:
        assert not re.match(r"/|\w+:", link) and (moved / unquote(link)).exists(), link
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", text), (
        "the page would load something from the network"
    )


@pytest.mark.parametrize(
    "missing",
    [
        "samples",
        "metrics.jsonl",
        "events.jsonl",
        "train.json",
        "samples/step-000000",
        "samples/step-000004/p0 #-seed0.mp4",
    ],
)
def test_missing_files_are_left_out(run: Path, missing: str) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(run).read_text())


def chart(title: str, line: Line, *, reference: bool = False, least: float = 0.0) -> Chart | None:
    return draw_chart(ChartSpec(title, [line], reference=reference, least=least))


def test_an_empty_folder_and_damaged_files_still_give_a_page(tmp_path: Path) -> None:
    assert "Nothing has been recorded yet" in write_report(tmp_path).read_text()
    (tmp_path / "train.json").write_text("{torn")
    write_record(tmp_path / "prepare.json", stage_record("prepare", clips=96, share=0.25))
    (tmp_path / "export.json").write_text('{"stage": "export", "results": {}}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": null}\n[1]\n{"step": "x"}\n{"step": 2, "train/lo'
    )
    bad = tmp_path / "samples" / "step-000001"
    bad.mkdir(parents=True)
    outside = SampleRecord("a-seed0", "a", "b", 0, "../../../etc/passwd", {})
    write_record(bad / "samples.json", samples_record(1, [outside]))
    damaged = tmp_path / "samples" / "step-000002"
    damaged.mkdir()
    (damaged / "samples.json").write_text('{"step": 2, "samples": [3]}')
    text = write_report(tmp_path).read_text()
    assert "clips 96, share 0.25" in text and "no video" in text and "passwd" not in text
    assert "step 1" in text and "step 2" not in text


def test_a_curve_is_well_formed_and_not_flattened_by_a_spike() -> None:
    values: list[float | None] = [1.0 / (index + 1) for index in range(2000)]
    values[7], values[1500] = 1e9, None
    one = chart("Loss <&>", Line("a <b>", Points("a", list(range(2000)), values), smooth=True))
    assert one is not None
    root = ET.fromstring(one.svg)
    drawn = [element for element in root.iter() if "line" in element.get("class", "").split()]
    assert len(drawn) == 3  # two raw stretches around the gap, one running mean
    assert len(one.svg) < 60_000 and len([e for e in root.iter() if e.get("class") == "broken"]) == 1
    ticks = [
        float(element.text or "nan")
        for element in root.iter()
        if element.get("class") == "tick" and element.get("text-anchor") == "end"
    ]
    assert max(ticks) < 10, "one spike must not flatten the curve"
    assert json.loads(unescape(root.attrib["data-points"]))[0]["label"] == "a <b>"


def test_constant_single_and_missing_curves() -> None:
    assert (
        chart("x", Line("a", Points("a", [], []))) is None and chart("x", Line("a", Points("a", [1], [None]))) is None
    )
    for points in (Points("a", [5], [0.0]), Points("a", [0, 1], [2.0, 2.0]), Points("a", [3, 9], [-1.0, 1e-7])):
        one = chart("x", Line("a", points), reference=True)
        assert one is not None and "nan" not in one.svg.lower().replace("none", "")
        ET.fromstring(one.svg)


def test_a_small_change_does_not_look_like_a_fall() -> None:
    one = chart("x", Line("a", Points("a", [0, 4], [-2.257, -2.267])), least=0.4)
    assert one is not None
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", one.svg)]
    assert abs(heights[0] - heights[1]) < 10
    labels = re.findall(r'text-anchor="end">([^<]+)<', one.svg)
    assert len(set(labels)) == len(labels) >= 3


@pytest.mark.parametrize(
    "spacing", [factor * 10.0**power for power in range(-9, 9) for factor in (1, 1.3, 2, 2.5, 3, 5, 9.99)]
)
@pytest.mark.parametrize("start", [0.0, 1.2345, -70.0])
def test_every_spacing_of_ticks_has_different_labels(start: float, spacing: float) -> None:
    one = chart("x", Line("a", Points("a", list(range(5)), [start + spacing * index for index in range(5)])))
    assert one is not None
    labels = re.findall(r'text-anchor="end">([^<]+)<', one.svg)
    if 4 * spacing > 1e-5 * abs(start):
        assert len(set(labels)) == len(labels) >= 2


def test_numbers_have_three_digits() -> None:
    numbers = (0, 0.1234, 12.34, 1234.5, 4e-4, 1.5e6, -0.5, 1.0)
    assert [short(value) for value in numbers] == ["0", "0.123", "12.3", "1234", "4e-4", "1.5e6", "-0.5", "1"]
    assert running_mean([2.0, 2.0, 2.0], 10) == pytest.approx([2.0, 2.0, 2.0])


def test_an_alert_links_its_picture(tmp_path: Path) -> None:
    event = {"kind": "alert", "title": "step 4: soft", "text": "x", "picture": "watch/a.png"}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert '<a href="watch/a.png">frames</a>' in write_report(tmp_path).read_text()


def test_the_page_names_its_line_and_lists_those_that_it_replaced(run: Path) -> None:
    assert "Replaced lines" not in write_report(run).read_text()
    lines = [
        RunLine(1, "2026-01-01T00:00:00Z", "new run", "", {}),
        RunLine(2, "2026-01-02T00:00:00Z", "rollback after step 8: <soft>", "", {}, 4, kept=4, replaced="replaced/01"),
        RunLine(3, "2026-01-03T00:00:00Z", "stage.resume=never", "", {}, replaced="replaced/02"),
    ]
    write_record(run / HistoryRecord.file_name, HistoryRecord(lines))
    moved = ReplacedRecord(1, 4, "2026-01-02T03:04:05Z", lines[1].reason, "", 2, [6, 8], [8], 4)
    write_record(run / "replaced" / "01" / ReplacedRecord.file_name, moved)
    text = write_report(run).read_text()
    assert "<span>line 3, from step 0: stage.resume=never</span>" in text
    rows = re.findall(r"<tr>(.*?)</tr>", text.partition("<h2>Replaced lines</h2>")[2].partition("</table>")[0], re.S)
    cells = [[unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    kept = "2 checkpoints, 1 validations, 4 rows of metrics"
    assert cells[1:] == [
        ["1", "step 4", "rollback after step 8: <soft>", "2026-01-02 03:04:05", kept, "replaced/01"],
        ["2", "its beginning", "stage.resume=never", "2026-01-03 00:00:00", "", "replaced/02"],
    ]
    assert {"href": "replaced/01"} in Page(text).all("a") and {"href": "replaced/02"} not in Page(text).all("a")


def test_the_page_names_the_command_that_uploads_the_run(run: Path) -> None:
    write_record(run / "wandb" / RunToken.file_name, RunToken("ab"))
    folder = run / "wandb" / "offline-run-20260101_000000-ab-train"
    folder.mkdir()
    (folder / "run-ab-train.wandb").touch()
    assert f"wandb sync '{folder.resolve()}'" in unescape(write_report(run).read_text())
