"""All planted faults and clean pairs through stage=diagnose; prints a table: python -m tests.diagnosis.confusion FOLDER [words]"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cogflow.config.compose import compose
from cogflow.errors import QualityGateError
from cogflow.models import tiny
from cogflow.stages import load
from tests.diagnosis.faults import CLEAN, FAULTS, World, spoiled


def world_in(root: Path) -> World:
    """Two short flows, made once."""
    for seed, name in enumerate(("run", "other")):
        if not (root / name / "pipeline" / "assembly.json").is_file():
            words = ["stage=flow", "debug=quick", f"run.root={root}", f"run.name={name}", "tracking.wandb=disabled"]
            words += [
                "stage.train.steps=12",
                "stage.train.save_every=6",
                "stage.train.sample_every=0",
                "stage.train.ema_decay=0.8",
            ]
            words += [f"stage.train.seed={seed}", "stage.assemble.verify=false"]
            subprocess.run([sys.executable, "-m", "cogflow", *words], check=True, capture_output=True, timeout=600)
    return World(root / "run", root / "other", tiny.folder())


def diagnose(candidate: Path, reference: Path | None, root: Path, *words: str) -> dict[str, Any]:
    """What stage=diagnose writes."""
    given = [
        "stage=diagnose",
        f"stage.candidate={candidate}",
        f"run.root={root}",
        "run.name=diagnosis",
        "tracking.wandb=disabled",
        *words,
    ]
    given += [f"stage.reference={reference}"] if reference is not None else ["model=tiny"]
    with contextlib.suppress(QualityGateError):
        load("diagnose").run(compose(given))
    found: dict[str, Any] = json.loads((root / "diagnosis" / "diagnosis.json").read_text())
    return found


def named(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(component, field or tensor, confidence) of each finding."""
    return [
        (one["component"], str(one.get("field") or one.get("tensor") or ""), one["confidence"])
        for one in found["findings"]
    ]


def main(root: Path, words: list[str]) -> None:
    world = world_in(root)
    rows = []
    for title, plant, expected in [
        *((fault.title, fault.plant, fault) for fault in FAULTS),
        *((f"clean: {title}", plant, None) for title, plant in CLEAN.items()),
    ]:
        shutil.rmtree(root / "candidate", ignore_errors=True)
        began = time.time()
        found = diagnose(spoiled(root / "candidate", plant, world), world.pipeline, root, *words)
        accused = named(found)
        right = [
            one
            for one in accused
            if expected is not None and one[0] == expected.component and one[1].startswith(expected.name)
        ]
        verdict = (
            "named"
            if right and len(right) == len(accused)
            else "named, and more"
            if right
            else "missed"
            if expected
            else "quiet"
        )
        verdict = "accused" if expected is None and accused else verdict
        psnr = (found["steps"].get("rungs") or {}).get("psnr")
        told = ", ".join(
            f"{component}.{name}".rstrip(".") + f" ({confidence:.2f})" for component, name, confidence in accused
        )
        rows.append(
            f"| {title} | {verdict} | {told or '-'} | {'' if psnr is None else f'{psnr:.1f} dB'} | {time.time() - began:.0f} s |"
        )
        print(rows[-1], flush=True)
    head = "| planted | verdict | accused (confidence) | samples | time |\n" + "| --- " * 5 + "|\n"
    (root / "confusion.md").write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
