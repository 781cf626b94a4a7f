"""<run>/report.html: the whole run on one page that needs no network, no account and no server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cogflow.config.schema import AnyConfig
from cogflow.files.atomic_write import write_text
from cogflow.runtime.progress import clock
from cogflow.tracking import formatting
from cogflow.tracking.contact_sheet import pick
from cogflow.tracking.curves import SMOOTH_FROM, Chart, running_mean, short
from cogflow.tracking.report_charts import loss_charts, other_charts, sharpness_charts, watch_charts
from cogflow.tracking.run_data import RunData, Validation, read_run
from cogflow.tracking.secrets import scrub
from cogflow.tracking.stage_record import write_record

COLUMNS = 6  # validations side by side; of more, the first, the last and some between are shown
ROWS = 24
LADDER = "ladder/rungs"  # the table that has a section of its own
CELLS = ("wavelet_ratio", "blur_effect", "contrast")


def record_stage(
    folder: Path,
    stage: str,
    config: AnyConfig,
    inputs: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    started: float | None = None,
) -> Path:
    """Write ``folder/<stage>.json`` (see :func:`cogflow.tracking.stage_record.write_record`), bring the report up to date; the record's path."""
    record = write_record(folder, stage, config, inputs, results, started=started)
    write_report(folder)
    return record


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from what lies in the run folder and return its path. Missing pieces are left out.

    Videos and pictures are linked by relative paths: the folder can be moved or copied as a whole. Text from prompts,
    configs and logs is escaped, secrets are replaced.
    """
    folder = Path(folder)
    path = folder / "report.html"
    write_text(path, render(read_run(folder)))
    return path


def render(run: RunData) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        head=_head(run),
        facts=_facts(run),
        alerts=[_alert(alert) | {"picture": str(alert.get("picture", ""))} for alert in run.alerts],
        stages=[_stage(run, record) for record in run.records],
        loss=[_svg(one) for one in loss_charts(run)],
        ladder=_ladder(run),
        sharpness=[_svg(one) for one in sharpness_charts(run)],
        watch=[_svg(one) for one in watch_charts(run)],
        others=[_svg(one) for one in other_charts(run)],
        samples=_samples(run),
        sheets=[{"step": one.step, "src": _link(run.folder, one.sheet)} for one in _shown(run) if one.sheet],
        tables=[_table(run, table) for key, table in run.tables.items() if key != LADDER and not _closing(run, table)],
        artifacts=[_artifact(run, artifact) for artifact in run.artifacts],
        provenance=[_provenance(record) for record in run.records],
    )
    return str(page)


def _head(run: RunData) -> dict[str, Any]:
    main = run.record("flow") or run.record("train") or (run.records[-1] if run.records else {})
    settings = main.get("settings", {}) if isinstance(main.get("settings"), dict) else {}
    trained = run.record("train")
    wanted = formatting.dig(settings, "stage", "train", "steps") or formatting.dig(settings, "stage", "steps")
    status = str(main.get("status", "done")) if main else "running"
    if not trained and run.last_step is not None:
        status = "running"
    return {
        "name": str(formatting.dig(settings, "run", "name") or run.folder.resolve().name),
        "model": str(formatting.dig(settings, "model", "name") or ""),
        "data": str(formatting.dig(settings, "data", "name") or ""),
        "status": {"done": "done", "stopped": "stopped", "failed": "failed", "running": "in progress"}.get(
            status, status
        ),
        "tone": {"done": "good", "failed": "bad", "stopped": "warn"}.get(status, "plain"),
        "step": f"step {run.last_step}" + (f" of {wanted}" if wanted else "") if run.last_step is not None else "",
        "command": scrub(str(main.get("command", ""))),
        "started": str(min((str(record["started"]) for record in run.records if record.get("started")), default=""))
        .replace("T", " ")
        .rstrip("Z"),
        "written": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def _facts(run: RunData) -> list[dict[str, str]]:
    """The few numbers at the top: label, value, remark."""
    facts = []

    def add(label: str, value: str, remark: str = "") -> None:
        facts.append({"label": label, "value": value, "remark": remark})

    loss = [value for _, value in run.curve("train/loss").finite]
    if loss:
        dense = len(loss) >= SMOOTH_FROM
        means = running_mean(loss, max(5.0, len(loss) / 30)) if dense else loss
        add("training loss", short(means[-1]), f"from {short(means[4 if dense else 0])}")
    for label, name, compare in (
        ("held-out loss", "heldout/loss", formatting.change),
        ("wavelet ratio", "sharpness/wavelet_ratio", formatting.difference),
    ):
        points = run.curve(name).finite
        if points:
            first, last = points[0][1], points[-1][1]
            change = (
                f"{compare(first, last)} since step {points[0][0]}" if len(points) > 1 else f"at step {points[0][0]}"
            )
            add(label, short(last), change)
    seconds = [value for _, value in run.curve("train/step_time").finite]
    if seconds:
        add("step time", f"{short(median(seconds))} s", "median")
    memory = [value for _, value in run.curve("train/memory_gb").finite]
    if memory:
        add("memory", f"{short(max(memory))} GB", "peak")
    flow = run.record("flow")
    spent = (
        flow["seconds"]
        if flow and formatting.is_number(flow.get("seconds"))
        else sum(formatting.seconds(record) for record in run.records)
    )
    if spent:
        add("all stages", clock(float(spent)), "wall clock")
    return facts


def _shown(run: RunData) -> list[Validation]:
    return [run.validations[index] for index in pick(len(run.validations), COLUMNS)]


def _samples(run: RunData) -> dict[str, Any] | None:
    """The grid: a row per prompt and seed, a column per validation."""
    if not run.validations:
        return None
    shown = _shown(run)
    keys = list(dict.fromkeys(key for validation in reversed(shown) for key in validation.samples))
    several = len({seed for _, seed in keys}) > 1
    rows = []
    for key in keys[:ROWS]:
        texts = [validation.samples[key].text for validation in shown if key in validation.samples]
        first = next((validation.samples[key].sharpness for validation in shown if key in validation.samples), {})
        rows.append(
            {
                "id": f"{key[0]}, seed {key[1]}" if several else key[0],
                "text": texts[-1],
                "cells": [_cell(run, validation, key, first) for validation in shown],
            }
        )
    facts = shown[-1].facts
    sampling: dict[str, Any] = facts["sampling"] if isinstance(facts.get("sampling"), dict) else {}
    how = (
        [f"{facts['frames']} frames of {facts['height']}x{facts['width']}"]
        if {"frames", "height", "width"} <= set(facts)
        else []
    )
    how += [f"{sampling['steps']} denoising steps"] if "steps" in sampling else []
    how += (
        [f"guidance {short(float(sampling['guidance_scale']))}"]
        if formatting.is_number(sampling.get("guidance_scale"))
        else []
    )
    how += [f"sampler {sampling['sampler']}"] if sampling.get("sampler", "default") != "default" else []
    small = max(validation.width for validation in shown) < 320
    return {
        "steps": [validation.step for validation in shown],
        "hidden": len(run.validations) - len(shown),
        "rows": rows,
        "more": max(0, len(keys) - ROWS),
        "how": ", ".join(how),
        "small": small,
        "ratio": f"{shown[-1].width or 3} / {shown[-1].height or 2}",
    }


def _cell(run: RunData, validation: Validation, key: tuple[str, int], first: Mapping[str, float]) -> dict[str, Any]:
    sample = validation.samples.get(key)
    if sample is None:
        return {"src": None, "value": "", "change": "", "title": "", "step": validation.step}
    value = sample.sharpness.get(CELLS[0])
    return {
        "src": _link(run.folder, sample.video) if sample.video else None,
        "step": validation.step,
        "value": short(value) if value is not None else "",
        "change": formatting.difference(first[CELLS[0]], value)
        if value is not None and CELLS[0] in first and first is not sample.sharpness
        else "",
        "title": ", ".join(
            f"{name.replace('_', ' ')} {short(sample.sharpness[name])}" for name in CELLS if name in sample.sharpness
        ),
    }


def _ladder(run: RunData) -> dict[str, Any] | None:
    """The ladder's table, and the pictures of where detail is lost."""
    if LADDER not in run.tables:
        return None
    sheets = [
        ("ladder/clips.png", "a clip's file, the loaded clip, its round trip"),
        ("ladder/samples.png", "a prompt on rungs 3 to 5"),
    ]
    found = [
        {"src": _link(run.folder, run.folder / name), "title": title}
        for name, title in sheets
        if (run.folder / name).is_file()
    ]
    return {"table": _table(run, run.tables[LADDER]), "sheets": found}


def _closing(run: RunData, table: Mapping[str, Any]) -> bool:
    """The table of stages, which the page has from their records."""
    return bool(run.records) and table["columns"][:2] == ["stage", "result"]


def _svg(one: Chart) -> dict[str, Any]:
    # The charts escape what they hold themselves; nothing else on the page is marked as safe.
    return {"title": one.title, "svg": Markup(one.svg), "legend": one.legend, "note": one.note}


def _stage(run: RunData, record: Mapping[str, Any]) -> dict[str, Any]:
    results = record["results"]
    where = results.get("where") or results.get("output") or ""
    summary = results.get("summary")
    if not summary:
        simple = [
            (name, value) for name, value in results.items() if name != "where" and isinstance(value, str | int | float)
        ]
        summary = ", ".join(f"{name.replace('_', ' ')} {formatting.text(value)}" for name, value in simple[:4])
    status = str(record.get("status", "done"))
    place = _inside(run, str(where)) if where else None
    return {
        "name": record["stage"],
        "status": status,
        "tone": {"done": "good", "failed": "bad"}.get(status, "warn"),
        "summary": str(summary or "-"),
        "time": clock(formatting.seconds(record)) if formatting.seconds(record) else "",
        "where": place.relative_to(run.folder.resolve()).as_posix() or "." if place else str(where),
        "href": _link(run.folder, place) if place and place.exists() else "",
    }


def _table(run: RunData, table: Mapping[str, Any]) -> dict[str, Any]:
    rows = [row for row in table["rows"] if isinstance(row, list)]

    def cell(value: Any, index: int) -> dict[str, Any]:
        path = (
            _inside(run, value)
            if isinstance(value, str) and value.lower().endswith((".mp4", ".png", ".jpg", ".webm"))
            else None
        )
        kind = (
            ""
            if path is None or not path.is_file()
            else "video"
            if path.suffix.lower() in (".mp4", ".webm")
            else "image"
        )
        return {
            "text": formatting.text(value),
            "number": index < len(columns) and columns[index]["number"],
            "kind": kind,
            "src": _link(run.folder, path) if path and kind else "",
        }

    columns = []
    for index, name in enumerate(table["columns"]):
        values = [row[index] for row in rows if index < len(row) and row[index] is not None]
        columns.append({"name": str(name), "number": bool(values) and all(map(formatting.looks_like_number, values))})
    title = str(table.get("key")).replace("/", ": ").replace("_", " ")
    return {
        "title": title[:1].upper() + title[1:],
        "columns": columns,
        "rows": [[cell(value, index) for index, value in enumerate(row)] for row in rows],
    }


def _artifact(run: RunData, artifact: Mapping[str, Any]) -> dict[str, str]:
    uses = artifact.get("uses")
    return {
        "name": str(artifact["name"]),
        "type": str(artifact.get("type", "")),
        "stage": str(artifact.get("stage", "")),
        "uses": ", ".join(map(str, uses)) if isinstance(uses, list) else "",
        "size": formatting.size(artifact.get("bytes")),
        "hash": str(artifact.get("manifest_sha256", ""))[:12],
    }


def _provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    groups = [
        (name, formatting.flat(scrub(record.get(name))))
        for name in ("results", "inputs", "versions", "machine", "settings")
    ]
    return {
        "stage": record["stage"],
        "command": scrub(str(record.get("command", ""))),
        "finished": str(record.get("finished", "")).replace("T", " ").rstrip("Z"),
        "groups": [(name, rows) for name, rows in groups if rows],
    }


def _alert(alert: Mapping[str, Any]) -> dict[str, str]:
    level = str(alert.get("level", "WARN"))
    return {
        "tone": {"ERROR": "bad", "INFO": "plain"}.get(level, "warn"),
        "title": str(alert.get("title", "")),
        "text": str(alert.get("text", "")),
        "stage": str(alert.get("stage", "")),
    }


def _inside(run: RunData, where: str) -> Path | None:
    """``where`` as a path when it lies in the run folder (written absolutely, from the working folder, or from the run)."""
    folder = run.folder.resolve()
    for path in (Path(where), folder / where):
        if path.resolve().is_relative_to(folder):
            return path.resolve()
    return None


def _link(folder: Path, path: Path) -> str:
    return quote(path.resolve().relative_to(folder.resolve()).as_posix() or ".")
