"""Provide the command-line options of all benchmarks in this folder, and their output: a table and a JSON file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cogflow.benchmarking.results import BenchmarkResult, format_cell
from cogflow.files.atomic_write import write_json
from cogflow.runtime.console import echo, table

RESULTS = Path("runs/benchmarks")


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for ``python -m benchmarks.NAME`` with the option --output."""
    summary = (description or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=summary)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="the JSON file (%(default)s)")
    return parser


def add_size_options(parser: argparse.ArgumentParser, frames: int = 9, height: int = 64, width: int = 96) -> None:
    """Add --frames, --height and --width; the defaults are the tiny model's size."""
    parser.add_argument("--frames", type=int, default=frames, help="default: %(default)s")
    parser.add_argument("--height", type=int, default=height, help="pixels, default: %(default)s")
    parser.add_argument("--width", type=int, default=width, help="pixels, default: %(default)s")


def report(result: BenchmarkResult, output: Path) -> None:
    """Print the table and the summary of ``result`` and write its record to the file ``output``."""
    table([[format_cell(cell) for cell in row] for row in result.rows], result.columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, json.loads(json.dumps(result.record())))
    echo(f"{result.summary}\nresults: {output}")
