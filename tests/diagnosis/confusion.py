"""Diagnose every planted fault and every clean pair with real samples, and write a table to FOLDER/confusion.md.

python -m tests.diagnosis.confusion FOLDER [OVERRIDES...]
"""

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
from tests.diagnosis.faults import CLEAN, FAULTS, Fault, World, planted


def world_in(root: Path) -> World:
    """Return two short flows; they run once for each ``root``."""
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


def diagnose(candidate: Path, reference: Path | None, root: Path, *overrides: str) -> dict[str, Any]:
    """Return the diagnosis.json of stage=diagnose."""
    given = [
        "stage=diagnose",
        f"stage.candidate={candidate}",
        f"run.root={root}",
        "run.name=diagnosis",
        "tracking.wandb=disabled",
        *overrides,
    ]
    given += [f"stage.reference={reference}"] if reference is not None else ["model=tiny"]
    with contextlib.suppress(QualityGateError):
        load("diagnose").run(compose(given))
    found: dict[str, Any] = json.loads((root / "diagnosis" / "diagnosis.json").read_text())
    return found


def named(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return (component, field or tensor, confidence) of each finding."""
    return [
        (one["component"], str(one.get("field") or one.get("tensor") or ""), one["confidence"])
        for one in found["findings"]
    ]


def verdict_of(found: list[tuple[str, str, float]], expected: Fault | None) -> str:
    """Return whether the findings name the ``expected`` fault; ``None``: there is none."""
    if expected is None:
        return "wrong" if found else "agrees"
    right = [one for one in found if one[0] == expected.component and one[1].startswith(expected.name)]
    if not right:
        return "missed"
    return "named" if len(right) == len(found) else "named, and more"


def main(root: Path, overrides: list[str]) -> None:
    world = world_in(root)
    rows = []
    for title, plant, expected in [
        *((fault.title, fault.plant, fault) for fault in FAULTS),
        *((f"clean: {title}", plant, None) for title, plant in CLEAN.items()),
    ]:
        shutil.rmtree(root / "candidate", ignore_errors=True)
        began = time.time()
        found = diagnose(planted(root / "candidate", plant, world), world.pipeline, root, *overrides)
        found_faults = named(found)
        verdict = verdict_of(found_faults, expected)
        psnr = (found["steps"].get("rungs") or {}).get("psnr")
        samples = "not needed" if psnr is None else f"{psnr:.1f} dB"
        cells = ", ".join(
            f"{component}.{name}".rstrip(".") + f" ({confidence:.2f})" for component, name, confidence in found_faults
        )
        rows.append(f"| {title} | {verdict} | {cells or '-'} | {samples} | {time.time() - began:.0f} s |")
        print(rows[-1], flush=True)
    head = "| planted | verdict | findings (confidence) | samples | time |\n" + "| --- " * 5 + "|\n"
    (root / "confusion.md").write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
