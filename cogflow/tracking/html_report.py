"""Write ``<run>/report.html``: the whole run on one page that needs no network, no account and no server."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cogflow.config.config import AnyConfig
from cogflow.files.atomic_write import write_text
from cogflow.tracking import report_sections as sections
from cogflow.tracking.report_charts import loss_charts, other_charts, sharpness_charts, watch_charts
from cogflow.tracking.run_data import RunData, read_run
from cogflow.tracking.stage_record import NamedValues, write_stage_record

REPORT = "report.html"


def record_stage(
    folder: Path,
    stage: str,
    config: AnyConfig,
    inputs: NamedValues,
    results: NamedValues,
    *,
    started: float | None = None,
) -> Path:
    """Write ``folder/<stage>.json`` and the report, and return the record's path.

    See :func:`cogflow.tracking.stage_record.write_stage_record`.
    """
    record = write_stage_record(folder, stage, config, inputs, results, started=started)
    write_report(folder)
    return record


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from the files of the run folder and return its path. Missing files are left out.

    Videos and pictures are linked by relative paths: the folder can be moved or copied as a whole. Text from prompts,
    configs and logs is escaped, secrets are replaced.
    """
    path = Path(folder) / REPORT
    write_text(path, render_report(read_run(Path(folder))))
    return path


def render_report(run: RunData) -> str:
    """Return the page of ``run``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        head=sections.head(run),
        numbers=sections.key_numbers(run),
        alerts=[sections.alert_line(run, alert) for alert in run.alerts],
        stages=[sections.stage_row(run, record) for record in run.records],
        loss=[sections.figure(chart) for chart in loss_charts(run)],
        ladder=sections.ladder_section(run),
        sharpness=[sections.figure(chart) for chart in sharpness_charts(run)],
        watch=[sections.figure(chart) for chart in watch_charts(run)],
        others=[sections.figure(chart) for chart in other_charts(run)],
        samples=sections.sample_grid(run),
        sheets=sections.contact_sheets(run),
        tables=sections.other_tables(run),
        artifacts=[sections.artifact_row(artifact) for artifact in run.artifacts],
        replaced=[sections.replaced_row(run, former) for former in run.replaced],
        details=[sections.stage_details(record) for record in run.records],
    )
