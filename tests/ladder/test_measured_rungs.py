"""The rungs measured on real files: drawn clips, the shipped VAE and transformer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from PIL import Image

from cogflow.config.data_section import DataConfig
from cogflow.data import clips, softness
from cogflow.data.latent_cache import LatentCache
from cogflow.ladder import crop_sheet, vae_roundtrip
from cogflow.ladder.clip_rungs import record_clip_rungs
from cogflow.ladder.ladder_record import MOST_CLIPS, read_ladder, write_rung
from cogflow.ladder.ladder_report import report_ladder
from cogflow.ladder.reconstruction_bound import project_clips
from cogflow.ladder.rung import Rung
from cogflow.ladder.rung_findings import evaluate_ladder
from cogflow.ladder.sample_rungs import config_contradictions, record_base_rung
from cogflow.ladder.schedule_probe import record_schedule_probe
from cogflow.ladder.vae_roundtrip import measure_roundtrip
from cogflow.records.ladder_records import BaseRung, ClipRung, LadderRecord, LadderRungs, TunedRung
from cogflow.records.sample_records import ClipMetrics, SamplesRecord, SamplingRecord
from cogflow.sampling.sampler import Sampler
from cogflow.sharpness.metrics import METRICS
from cogflow.tracking.tracker import Tracker
from tests.ladder.conftest import World

NO_SAMPLES = SamplesRecord(
    step=0,
    weights_sha256="ab",
    sampling=SamplingRecord("default", "CogVideoXDDIMScheduler", "empty caption", 2, 6.0, True, "fp32", False),
    height=64,
    width=96,
    frames=9,
    fps=8.0,
    max_sequence_length=32,
    dtype="fp32",
    device="cpu",
    samples=[],
)


class RecordingTracker(Tracker):
    """A tracker that keeps what is reported."""

    def __init__(self) -> None:
        self.alerts: list[str] = []
        self.values: dict[str, Any] = {}
        self.tables: dict[str, Any] = {}

    def alert(self, title: str, text: str, level: str = "WARN", picture: Path | None = None) -> None:
        self.alerts.append(f"{level} {title}: {text}")

    def log(self, step: int, values: Any) -> None:
        self.values |= values

    def table(self, key: str, columns: Any, rows: Any) -> None:
        self.tables[key] = rows


def copy_run(world: World, tmp_path: Path) -> Path:
    """A run folder with the same clips, to write into."""
    folder = tmp_path / "run"
    shutil.copytree(world.folder / "data", folder / "data")
    return folder


def with_shift(sampler: Sampler, shift: float) -> Sampler:
    """The sampler with another SNR shift in its scheduler."""
    config = {**sampler.pipeline.scheduler.config, "snr_shift_scale": shift}
    sampler.pipeline.register_modules(scheduler=CogVideoXDDIMScheduler.from_config(config))
    return sampler


def test_prepared_clips_give_the_source_and_clip_rungs(world: World, tmp_path: Path) -> None:
    record_clip_rungs(tmp_path, world.folder / "cache", world.config.data)
    tracker = RecordingTracker()
    assert report_ladder(tracker, tmp_path) == [] and tracker.alerts == []
    rungs = read_ladder(tmp_path).rungs
    assert rungs.source is not None and rungs.clip is not None and rungs.roundtrip is None
    assert len(rungs.clip.metrics) == rungs.source.measured == len(world.cache) and rungs.source.scaled_up == {}
    assert -0.1 < tracker.values["ladder/rung1_blur"] < 0.05
    assert [row[0] for row in tracker.tables["ladder/rungs"]] == ["0 source", "1 clip"]


def test_a_cache_without_clip_metrics_gives_a_note_and_no_rung(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world.folder / "cache", cache)
    index = json.loads((cache / "index.json").read_text())
    del index["softness"]
    (cache / "index.json").write_text(json.dumps(index))
    record_clip_rungs(tmp_path, cache, world.config.data)
    assert "without measuring" in capsys.readouterr().out and read_ladder(tmp_path) == LadderRecord()
    assert len(LatentCache(cache)) == len(world.cache)


def test_a_rung_keeps_a_bounded_number_of_clips_evenly_spread(tmp_path: Path) -> None:
    names = [f"{index:04d}" for index in range(3 * MOST_CLIPS)]
    write_rung(tmp_path, Rung.TUNED, TunedRung({name: {"contrast": 0.5} for name in names}, 1, "model"))
    tuned = read_ladder(tmp_path).rungs.tuned
    assert tuned is not None and len(tuned.metrics) == MOST_CLIPS
    assert {names[0], names[-1]} <= set(tuned.metrics)


def test_writing_a_rung_keeps_the_others(tmp_path: Path) -> None:
    write_rung(tmp_path, Rung.BASE, BaseRung({"a": {"contrast": 0.5}}, step=0))
    write_rung(tmp_path, Rung.TUNED, TunedRung({"a": {"contrast": 0.4}}, 5, "model"))
    assert [row.rung for row in evaluate_ladder(read_ladder(tmp_path))[0]] == [Rung.BASE, Rung.TUNED]


def loader_changes(path: Path, data: DataConfig) -> ClipMetrics:
    """Return the changes of the loader's frames against an independent resampling."""
    measurement = softness.measure_softness(clips.read_clip(path, data), data, "", resampled=True)
    assert measurement is not None
    assert measurement.loader is not None
    return measurement.loader


def test_a_loader_that_softens_is_a_clip_finding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return clips drawn at twice the size, loaded correctly and through a small picture."""
    data = replace(world.config.data, height=32, width=48)
    path = next((world.folder / "data" / "videos").glob("*.mp4"))
    healthy = loader_changes(path, data)
    fit = clips.fit_frame

    def soft(planes: Any, data: Any, content: str, out: torch.Tensor) -> None:
        fit(planes, data, content, out)
        small = Image.fromarray(out.permute(1, 2, 0).numpy()).resize((30, 20), Image.Resampling.BILINEAR)
        enlarged = np.asarray(small.resize((48, 32), Image.Resampling.BILINEAR)).copy()
        out.copy_(torch.from_numpy(enlarged).permute(2, 0, 1))

    monkeypatch.setattr(clips, "fit_frame", soft)
    softened = loader_changes(path, data)
    defects = []
    for changes in (healthy, softened):
        rung = ClipRung({"a": {}}, 1, upscaled={}, size="48x32", loader={"a": changes})
        findings = evaluate_ladder(LadderRecord(LadderRungs(clip=rung)))[1]
        defects.append([one.defect for one in findings])
    assert defects == [[], ["soft"]]


def test_a_healthy_round_trip_has_no_finding_and_is_not_measured_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_run(world, tmp_path)
    measured = measure_roundtrip(folder, world.config, world.cache, world.sampler(), 0.7)
    rung = read_ladder(folder).rungs.roundtrip
    assert rung is not None and len(measured) == 2 and set(measured) == set(rung.metrics)
    assert min(rung.psnr.values()) > 24
    assert set(rung.variants) == {"bf16", "fp32, tiled"}
    assert evaluate_ladder(read_ladder(folder))[1] == []
    assert (folder / "ladder" / "clips.png").is_file()
    monkeypatch.setattr(vae_roundtrip, "_read_clips", lambda *_: pytest.fail("measured again"))
    assert measure_roundtrip(folder, world.config, world.cache, world.sampler(), 0.7) == measured


def test_trying_decoders_restores_the_samplers_own(world: World, tmp_path: Path) -> None:
    sampler = world.sampler()
    vae = sampler.vae
    measure_roundtrip(copy_run(world, tmp_path), world.config, world.cache, sampler, 0.7)
    assert sampler.vae is vae


def test_the_bound_shifts_every_clip_by_the_change_of_the_round_trip() -> None:
    plain = dict.fromkeys(METRICS, 0.5) | {"finite": 1.0}
    every = {f"c{index}": plain | {"contrast": 0.2 + 0.1 * index, "wavelet_ratio": -2.0} for index in range(6)}
    before = {name: every[name] for name in ("c0", "c3")}
    after = {name: one | {"contrast": 1.5 * one["contrast"], "wavelet_ratio": -2.25} for name, one in before.items()}
    bound = project_clips(every, after=after, before=before)
    assert set(bound) == set(every) and bound["c5"]["wavelet_ratio"] == pytest.approx(-2.25)
    assert bound["c3"]["contrast"] == pytest.approx(after["c3"]["contrast"], rel=0.05)
    assert bound["c5"]["brightness"] == pytest.approx(0.5) and bound["c5"]["finite"] == 1
    assert project_clips({}, after=after, before=before) == after  # clips that were prepared without measuring
    broken = after | {"c0": after["c0"] | {"finite": 0.9}}
    assert project_clips(every, after=broken, before=before) == {}


@pytest.mark.parametrize(("factor", "defect"), [(1.15258426 / 0.7, "saturated"), (0.7 / 1.15258426, "washed_out")])
def test_a_wrong_latent_scale_is_a_roundtrip_finding(world: World, tmp_path: Path, factor: float, defect: str) -> None:
    folder = copy_run(world, tmp_path)
    measure_roundtrip(folder, world.config, world.cache, world.sampler(), 0.7 * factor)
    tracker = RecordingTracker()
    (finding,) = report_ladder(tracker, folder)
    assert (finding.rung, finding.defect, finding.level) == (Rung.ROUNDTRIP, defect, "alarm")
    assert finding.field == "vae.scaling_factor"
    assert f"about {1 / 0.607 if factor > 1 else 1 / 1.6465:.2f} times" in finding.line
    assert len(tracker.alerts) == 1 and tracker.alerts[0].startswith("ERROR rung 2 (roundtrip)")
    report_ladder(tracker, folder)
    assert len(tracker.alerts) == 1  # a known finding is no new alert


def test_an_overflow_of_the_vae_is_reported_with_its_dtype(world: World, tmp_path: Path) -> None:
    folder = copy_run(world, tmp_path)
    sampler = world.sampler(vae_dtype="fp16")
    torch.nn.init.constant_(sampler.vae.decoder.conv_out.conv.bias, 6e4)
    torch.nn.init.constant_(sampler.vae.decoder.conv_out.conv.weight, 6e4)
    config = replace(world.config, sampling=replace(world.config.sampling, roundtrip_clips=1))
    measure_roundtrip(folder, config, world.cache, sampler, 0.7)
    findings = [one for one in evaluate_ladder(read_ladder(folder))[1] if one.defect == "non_finite"]
    assert findings and all(one.rung == Rung.ROUNDTRIP and one.level == "alarm" for one in findings)
    assert "fp16" in findings[0].line


def test_clips_that_are_gone_or_changed_are_skipped_with_a_note(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_run(world, tmp_path)
    videos = sorted((folder / "data" / "videos").glob("*.mp4"))
    videos[0].unlink()
    shutil.copy(videos[2], videos[1])
    measured = measure_roundtrip(folder, world.config, world.cache, world.sampler(), 0.7)
    output = capsys.readouterr().out
    assert set(measured) == {f"videos/{path.name}" for path in videos[2:]} and "the file is missing" in output
    shutil.rmtree(folder / "data")
    assert measure_roundtrip(tmp_path / "other", world.config, world.cache, world.sampler(), 0.7) == {}


def test_no_round_trip_is_measured_when_it_is_turned_off(world: World, tmp_path: Path) -> None:
    config = replace(world.config, sampling=replace(world.config.sampling, roundtrip_clips=0))
    assert measure_roundtrip(copy_run(world, tmp_path), config, world.cache, world.sampler(), 0.7) == {}


def test_a_wrong_shift_is_found_before_the_first_step(world: World, tmp_path: Path) -> None:
    for shift, expected in ((1.0, []), (3.0, ["scheduler.snr_shift_scale"] * 2)):
        sampler = with_shift(world.sampler(), shift)
        record_schedule_probe(tmp_path, sampler, world.cache, 0.7)
        record_base_rung(tmp_path, NO_SAMPLES, "tiny", sampler)
        findings = evaluate_ladder(read_ladder(tmp_path))[1]
        assert [one.field for one in findings] == expected and all(one.rung == Rung.BASE for one in findings)
    lines = " ".join(one.line for one in findings)
    assert "snr_shift_scale is 3.0; tiny has 1.0" in lines and "denoise better under snr_shift_scale 1" in lines


def test_contradictions_name_field_value_and_family(world: World) -> None:
    scheduler = dict(world.sampler().pipeline.scheduler.config)
    (wrong,) = config_contradictions("cogvideox-5b", scheduler, {"scaling_factor": 1.15258426})
    assert (wrong.field, wrong.value, wrong.expected) == ("vae.scaling_factor", 1.15258426, 0.7)
    assert wrong.family == "cogvideox-5b"
    assert config_contradictions("auto", scheduler, {}) == []


def test_a_crop_sheet_shows_the_crop_that_lost_most_detail(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    before = np.full((64, 96, 3), 128, np.uint8)
    before[8:24, 64:80] = random.integers(0, 255, (16, 16, 3))
    before[40:56, 8:24] = random.integers(0, 255, (16, 16, 3))
    after = before.copy()
    after[8:24, 64:80] = 128
    row, column = crop_sheet.worst_crop(before, after, 24)
    assert row <= 12 and 52 <= column <= 68
    columns = {
        "source": torch.from_numpy(before.repeat(2, 0).repeat(2, 1))[None],
        "clip": torch.from_numpy(before)[None],
        "roundtrip": torch.from_numpy(after)[None].float() / 255,
    }
    crop_sheet.write_crop_sheet(tmp_path / "a" / "sheet.png", {"one": columns})
    assert Image.open(tmp_path / "a" / "sheet.png").width > 3 * 24
