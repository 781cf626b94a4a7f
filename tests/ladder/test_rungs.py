"""The rungs gathered from real files: drawn clips, the shipped VAE and transformer."""

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

from cogflow.data import clips, softness
from cogflow.data.cache import LatentCache
from cogflow.ladder import clip_rungs, crops, ladder_report, reconstruction_bound, sample_rungs, store, vae_roundtrip
from cogflow.ladder.rungs import work_out
from cogflow.sharpness.metrics import METRICS
from cogflow.tracking.tracker import Tracker

World = Any  # of conftest.py: folder, config, cache, sampler(**settings)
CPU, FP32 = torch.device("cpu"), torch.float32


class Heard(Tracker):
    """A tracker that remembers."""

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


def own(world: World, tmp_path: Path) -> Path:
    """A run folder of one's own with the same clips."""
    folder = tmp_path / "run"
    shutil.copytree(world.folder / "data", folder / "data")
    return folder


def test_prepared_clips_bring_their_first_two_rungs(world: World, tmp_path: Path) -> None:
    clip_rungs.gather(tmp_path, world.folder / "cache", world.config.data)
    heard = Heard()
    assert ladder_report.tell(heard, tmp_path) == [] and heard.alerts == []
    ladder = store.read(tmp_path)
    assert set(ladder["rungs"]) == {"0", "1"} and len(ladder["rungs"]["1"]["panels"]) == len(world.cache)
    assert (
        ladder["rungs"]["0"]["facts"]["measured"] == len(world.cache)
        and ladder["rungs"]["0"]["facts"]["scaled_up"] == {}
    )
    assert -0.1 < heard.values["ladder/rung1_blur"] < 0.05
    assert [row[0] for row in heard.tables["ladder/rungs"]] == ["0 source", "1 clip"]


def test_a_cache_from_before_clips_were_measured_still_works(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world.folder / "cache", cache)
    index = json.loads((cache / "index.json").read_text())
    del index["softness"]
    (cache / "index.json").write_text(json.dumps(index))
    clip_rungs.gather(tmp_path, cache, world.config.data)
    assert "without measuring" in capsys.readouterr().out and store.read(tmp_path)["rungs"] == {}
    assert len(LatentCache(cache)) == len(world.cache)


def test_a_loader_that_softens_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips drawn at twice the size, loaded as they should be and by way of a small picture."""
    data = replace(world.config.data, height=32, width=48)
    path = next((world.folder / "data" / "videos").glob("*.mp4"))
    healthy = softness.measured(clips.read_clip(path, data), data, "", resampled=True)["loader"]
    fit = clips.fit

    def soft(planes: Any, data: Any, content: str, out: torch.Tensor) -> None:
        fit(planes, data, content, out)
        small = Image.fromarray(out.permute(1, 2, 0).numpy()).resize((30, 20), Image.Resampling.BILINEAR)
        out.copy_(
            torch.from_numpy(np.asarray(small.resize((48, 32), Image.Resampling.BILINEAR)).copy()).permute(2, 0, 1)
        )

    monkeypatch.setattr(clips, "fit", soft)
    softened = softness.measured(clips.read_clip(path, data), data, "", resampled=True)["loader"]
    kinds = []
    for changes in (healthy, softened):
        facts = {"clips_in_all": 1, "upscaled": {}, "loader": {"a": changes}}
        kinds.append(
            [
                one.kind
                for one in work_out(
                    {"rungs": {"0": {"panels": {}, "facts": {}}, "1": {"panels": {"a": {}}, "facts": facts}}}
                )[1]
            ]
        )
    assert kinds == [[], ["soft"]]


def test_a_healthy_round_trip_is_no_finding_and_is_read_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own(world, tmp_path)
    measured = vae_roundtrip.measure(folder, world.config, world.cache, world.sampler(), 0.7)
    rung = store.read(folder)["rungs"]["2"]
    assert len(measured) == 2 and set(measured) == set(rung["panels"]) and min(rung["facts"]["psnr"].values()) > 24
    assert set(store.read(folder)["variants"]["2"]) == {"bf16", "fp32, tiled"}
    assert work_out(store.read(folder))[1] == []
    assert (folder / "ladder" / "clips.png").is_file()
    monkeypatch.setattr(vae_roundtrip, "_read", lambda *_: pytest.fail("measured again"))
    assert vae_roundtrip.measure(folder, world.config, world.cache, world.sampler(), 0.7) == measured


def test_the_ceiling_is_every_clip_moved_by_the_round_trip() -> None:
    plain = dict.fromkeys(METRICS, 0.5) | {"finite": 1.0}
    every = {f"c{index}": plain | {"contrast": 0.2 + 0.1 * index, "wavelet_ratio": -2.0} for index in range(6)}
    before = {name: every[name] for name in ("c0", "c3")}
    trip = {
        name: panel | {"contrast": 1.5 * panel["contrast"], "wavelet_ratio": -2.25} for name, panel in before.items()
    }
    found = reconstruction_bound.project(every, trip, before)
    assert set(found) == set(every) and found["c5"]["wavelet_ratio"] == pytest.approx(-2.25)
    assert found["c3"]["contrast"] == pytest.approx(trip["c3"]["contrast"], rel=0.05)
    assert found["c5"]["brightness"] == pytest.approx(0.5) and found["c5"]["finite"] == 1
    assert reconstruction_bound.project({}, trip, before) == trip  # clips that were prepared unmeasured
    assert reconstruction_bound.project(every, trip | {"c0": trip["c0"] | {"finite": 0.9}}, before) == {}


@pytest.mark.parametrize(("factor", "kind"), [(1.15258426 / 0.7, "saturated"), (0.7 / 1.15258426, "washed_out")])
def test_a_wrong_scale_is_rung_2(world: World, tmp_path: Path, factor: float, kind: str) -> None:
    folder = own(world, tmp_path)
    vae_roundtrip.measure(folder, world.config, world.cache, world.sampler(), 0.7 * factor)
    heard = Heard()
    (finding,) = ladder_report.tell(heard, folder)
    assert (finding.rung, finding.kind, finding.level, finding.field) == (2, kind, "alarm", "vae.scaling_factor")
    assert f"about {1 / 0.607 if factor > 1 else 1 / 1.6465:.2f} times" in finding.line
    assert len(heard.alerts) == 1 and heard.alerts[0].startswith("ERROR rung 2")
    ladder_report.tell(heard, folder)
    assert len(heard.alerts) == 1  # told once


def test_an_overflow_is_named_with_its_dtype(world: World, tmp_path: Path) -> None:
    folder = own(world, tmp_path)
    sampler = world.sampler(vae_dtype="fp16")
    torch.nn.init.constant_(sampler.vae.decoder.conv_out.conv.bias, 6e4)
    torch.nn.init.constant_(sampler.vae.decoder.conv_out.conv.weight, 6e4)
    config = replace(world.config, sampling=replace(world.config.sampling, roundtrip_clips=1))
    vae_roundtrip.measure(folder, config, world.cache, sampler, 0.7)
    findings = [one for one in work_out(store.read(folder))[1] if one.kind == "non_finite"]
    assert findings and all(one.rung == 2 and one.level == "alarm" for one in findings) and "fp16" in findings[0].line


def test_clips_that_are_gone_or_changed_are_passed_over(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own(world, tmp_path)
    videos = sorted((folder / "data" / "videos").glob("*.mp4"))
    videos[0].unlink()
    shutil.copy(videos[2], videos[1])
    measured = vae_roundtrip.measure(folder, world.config, world.cache, world.sampler(), 0.7)
    told = capsys.readouterr().out
    assert set(measured) == {f"videos/{path.name}" for path in videos[2:]} and "its file is gone" in told
    shutil.rmtree(folder / "data")
    assert vae_roundtrip.measure(tmp_path / "other", world.config, world.cache, world.sampler(), 0.7) == {}
    assert (
        vae_roundtrip.measure(
            folder,
            replace(world.config, sampling=replace(world.config.sampling, roundtrip_clips=0)),
            world.cache,
            world.sampler(),
            0.7,
        )
        == {}
    )


def test_the_weights_know_their_schedule(world: World, tmp_path: Path) -> None:
    sampler = world.sampler()
    other = CogVideoXDDIMScheduler.from_config({**sampler.pipeline.scheduler.config, "snr_shift_scale": 3.0})
    for scheduler, expected in ((sampler.pipeline.scheduler, []), (other, ["scheduler.snr_shift_scale"] * 2)):
        sample_rungs.schedule_evidence(
            tmp_path, sampler.transformer, scheduler, world.cache, 0.7, device=CPU, dtype=FP32
        )
        sample_rungs.base(tmp_path, {"step": 0, "samples": []}, family="tiny", scheduler=scheduler, vae=sampler.vae)
        findings = work_out(store.read(tmp_path))[1]
        assert [one.field for one in findings] == expected and all(one.rung == 3 for one in findings)
    lines = " ".join(one.line for one in findings)
    assert "snr_shift_scale is 3.0; tiny has 1.0" in lines and "denoise better under snr_shift_scale 1" in lines


def test_facts_of_the_vae_and_of_no_known_family(world: World) -> None:
    scheduler = dict(world.sampler().pipeline.scheduler.config)
    (wrong,) = sample_rungs.contradictions("cogvideox-5b", scheduler, {"scaling_factor": 1.15258426})
    assert wrong == {"field": "vae.scaling_factor", "value": 1.15258426, "expected": 0.7, "family": "cogvideox-5b"}
    assert sample_rungs.contradictions("auto", scheduler, {}) == []


def test_a_sheet_shows_the_crop_that_lost_most(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    before = np.full((64, 96, 3), 128, np.uint8)
    before[8:24, 64:80] = random.integers(0, 255, (16, 16, 3))
    before[40:56, 8:24] = random.integers(0, 255, (16, 16, 3))
    after = before.copy()
    after[8:24, 64:80] = 128
    row, column = crops.worst_crop(before, after, 24)
    assert row <= 12 and 52 <= column <= 68
    rungs = {
        "source": torch.from_numpy(before.repeat(2, 0).repeat(2, 1))[None],
        "clip": torch.from_numpy(before)[None],
        "roundtrip": torch.from_numpy(after)[None].float() / 255,
    }
    crops.save(tmp_path / "a" / "sheet.png", {"one": rungs})
    assert Image.open(tmp_path / "a" / "sheet.png").width > 3 * 24
