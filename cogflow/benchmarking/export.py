"""stage=export against ``cp`` and against CogVideo's converter, on a checkpoint of the real size."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from cogflow.benchmarking.measure import Measured, measure
from cogflow.benchmarking.sat_checkpoint import make_checkpoint
from cogflow.errors import ConfigError
from cogflow.models.family import FAMILY
from cogflow.runtime.console import echo


def compare_export(
    folder: Path, family: str, layers: int | None, repeats: int, clone: Path | None, keep: bool
) -> list[dict[str, Any]]:
    """One row per way and repeat: seconds, peak memory in bytes, and the ratio to ``cp`` followed by ``sync`` in that repeat.

    ``clone``: a CogVideo repository, run with this Python; ``None``: without the peer. The files lie in ``folder`` and are removed at
    the end unless ``keep``. Raises :class:`ConfigError` for a clone that is none.
    """
    member = FAMILY[family]
    if clone is not None and not (clone / "tools" / "convert_weight_sat2hf.py").is_file():
        raise ConfigError(
            f"stage.vs={clone} holds no tools/convert_weight_sat2hf.py.", "Name a clone of zai-org/CogVideo."
        )
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "sat"
    if not (source / "latest").is_file():
        make_checkpoint(source, family, layers)
    file = source / "1" / "mp_rank_00_model_states.pt"
    size = file.stat().st_size
    echo(f"checkpoint: {file} ({size / 1e9:.2f} GB)")
    count = str(layers or member.layers)
    ways: dict[str, list[str]] = {
        "cp + sync": ["sh", "-c", f'cp "{file}" "{folder / "copy.pt"}" && sync'],
        "cogflow, verified": _cogflow(source, folder / "verified", "auto"),
        "cogflow, stage.verify=off": _cogflow(source, folder / "plain", "off"),
    }
    if clone is not None:
        script = str(Path(__file__).parent / "cogvideo_export.py")
        ways["CogVideo's script"] = [
            sys.executable, script, str(clone), str(file), str(folder / "theirs"), count, str(member.heads), str(member.rotary),
        ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for repeat in range(repeats):
        base = None
        for way, command in ways.items():
            clean(folder)
            warm(file)
            result = measure(command, folder / "output.log")
            base = result.seconds if base is None else base
            rows.append(row(way, repeat, result, base, size))
            echo(f"{way}: {told(rows[-1])}")
    if not keep:
        shutil.rmtree(folder)
    return rows


def row(way: str, repeat: int, result: Measured, base: float, size: int) -> dict[str, Any]:
    return {
        "way": way,
        "repeat": repeat,
        "seconds": result.seconds if result.ok else None,
        "ratio_to_cp": result.seconds / base if result.ok else None,
        "gb_per_second": size / 1e9 / result.seconds if result.ok else None,
        "peak_anonymous_gb": result.anonymous / 1e9,
        "peak_resident_gb": result.resident / 1e9,
        "failed": None if result.ok else f"exit code {result.returncode} after {result.seconds:.0f} s: {result.tail}",
    }


def told(one: dict[str, Any]) -> str:
    if one["failed"]:
        return f"{one['failed']} (peak {one['peak_anonymous_gb']:.2f} GB anonymous)"
    return (
        f"{one['seconds']:.1f} s, {one['ratio_to_cp']:.2f} x cp, {one['peak_anonymous_gb']:.2f} GB anonymous, "
        f"{one['peak_resident_gb']:.2f} GB resident"
    )


def _cogflow(source: Path, output: Path, verify: str) -> list[str]:
    return [
        sys.executable, "-m", "cogflow", "stage=export", f"stage.source={source}", f"stage.output={output / 'export'}",
        f"run.root={output}", "run.name=run", f"stage.verify={verify}", "tracking.wandb=disabled",
    ]  # fmt: skip


def clean(folder: Path) -> None:
    """Every way starts with the disk as empty as the first."""
    for name in ("copy.pt", "verified", "plain", "theirs"):
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def warm(file: Path) -> None:
    """Read the source once, so that each way finds as much of it in the page cache as fits."""
    with open(file, "rb", buffering=0) as data:
        while data.read(1 << 24):
            pass
