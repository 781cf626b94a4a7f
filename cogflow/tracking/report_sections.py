"""Build the sections of ``report.html``: the text, numbers and links that its template shows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import quote

from markupsafe import Markup

from cogflow.files.record_io import JsonObject
from cogflow.files.secrets import scrub, scrub_text
from cogflow.records.event_records import AlertEvent, ArtifactEvent, Cell, TableEvent
from cogflow.records.history_records import RunLine
from cogflow.records.run_records import StageRecord
from cogflow.runtime.progress import clock
from cogflow.tracking.contact_sheet import pick
from cogflow.tracking.curves import SMOOTH_FROM, Chart, running_mean, smoothing_span
from cogflow.tracking.formatting import (
    byte_size,
    cell_text,
    difference,
    flatten,
    is_numeric,
    lookup,
    relative_change,
    short,
)
from cogflow.tracking.run_data import ReplacedLine, RunData, ValidationFolder
from cogflow.tracking.weights_origin import describe_origin, replaced_note

COLUMNS = 6
"""Largest number of validations side by side. When there are more, the first, the last and some between are shown."""
ROWS = 24
"""Prompts of the sample grid."""
LADDER_TABLE = "ladder/rungs"
"""The table that has a section of its own."""
SAMPLE_METRICS = ("wavelet_ratio", "blur_effect", "contrast")
"""Metrics of a sample; the first one is shown below its video, the others when the mouse is over it."""
SMALL_WIDTH = 320
"""Videos of fewer pixels are shown enlarged."""
TONES = {"done": "good", "failed": "bad"}


@dataclass(frozen=True)
class Head:
    """Title and status of the run. ``tone``: CSS class of the status. ``line``: the line of its history, and whence."""

    name: str
    model: str
    data: str
    status: str
    tone: str
    step: str
    command: str
    started: str
    written: str
    line: str
    sync: str


@dataclass(frozen=True)
class ReplacedRow:
    """A former line. ``after``: results of later steps were moved to ``where``; ``href``: link to it, or empty."""

    number: int
    after: str
    reason: str
    date: str
    content: str
    where: str
    href: str


@dataclass(frozen=True)
class KeyNumber:
    """One of the few numbers at the top."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class AlertLine:
    """One alert. ``picture``: link to an image, or empty."""

    tone: str
    title: str
    text: str
    stage: str
    picture: str


@dataclass(frozen=True)
class StageRow:
    """One stage. ``href``: link to its result when that is inside the run folder, or empty."""

    name: str
    status: str
    tone: str
    summary: str
    time: str
    where: str
    href: str


@dataclass(frozen=True)
class Figure:
    """One chart. ``svg`` is markup that needs no escaping."""

    title: str
    svg: Markup
    legend: list[tuple[str, int, str]]
    note: str


@dataclass(frozen=True)
class TableColumn:
    """Title of a column; ``number``: whether its cells are aligned to the right."""

    name: str
    number: bool


@dataclass(frozen=True)
class TableCell:
    """One cell. ``kind``: video, image or empty for text; ``src``: link to the video or image."""

    text: str
    number: bool
    kind: str
    src: str


@dataclass(frozen=True)
class TableSection:
    """One table."""

    title: str
    columns: list[TableColumn]
    rows: list[list[TableCell]]


@dataclass(frozen=True)
class Sheet:
    """A linked picture and its title."""

    title: str
    src: str


@dataclass(frozen=True)
class LadderSection:
    """The table of the sharpness ladder, and pictures of where most detail is lost."""

    table: TableSection
    sheets: list[Sheet]


@dataclass(frozen=True)
class SampleCell:
    """One sample of the grid. ``src``: link to its video, or empty. ``value`` and ``change``: of the first metric."""

    step: int
    src: str = ""
    value: str = ""
    change: str = ""
    title: str = ""


@dataclass(frozen=True)
class SampleRow:
    """One prompt of the grid."""

    id: str
    text: str
    cells: list[SampleCell]


@dataclass(frozen=True)
class SampleGrid:
    """Validation samples: a row for each prompt and seed, a column for each validation.

    ``hidden`` and ``more``: numbers of validations and prompts that are not shown. ``ratio``: CSS aspect ratio.
    """

    steps: list[int]
    hidden: int
    rows: list[SampleRow]
    more: int
    how: str
    small: bool
    ratio: str


@dataclass(frozen=True)
class ArtifactRow:
    """One artifact. ``hash``: the first digits of its manifest's sha256."""

    name: str
    type: str
    stage: str
    uses: str
    size: str
    hash: str


@dataclass(frozen=True)
class StageDetails:
    """Everything that one stage recorded. ``groups``: title and rows of dotted name and value."""

    stage: str
    command: str
    finished: str
    groups: list[tuple[str, list[tuple[str, str]]]]


def head(run: RunData) -> Head:
    """Return title and status of the run."""
    main = run.record("flow") or run.record("train") or (run.records[-1] if run.records else None)
    settings: JsonObject = main.settings if main else {}
    steps = lookup(settings, "stage", "train", "steps") or lookup(settings, "stage", "steps")
    training = run.last_step is not None and run.record("train") is None
    status = "in progress" if training or main is None else main.status
    return Head(
        name=str(lookup(settings, "run", "name") or run.folder.resolve().name),
        model=str(lookup(settings, "model", "name") or ""),
        data=str(lookup(settings, "data", "name") or ""),
        status=status,
        tone={"in progress": "plain", "stopped": "warn"}.get(status, TONES.get(status, "plain")),
        step="" if run.last_step is None else f"step {run.last_step}" + (f" of {steps}" if steps else ""),
        command=scrub_text(main.command) if main else "",
        started=_spaced(min((record.started for record in run.records), default="")),
        written=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        line=_line_text(run.line) if run.line is not None else "",
        sync=run.sync_command,
    )


def _line_text(line: RunLine) -> str:
    """Return which line of its history the run is on, and where it began."""
    return scrub_text(f"line {line.number}, from step {line.from_step}: {line.reason}")


def replaced_row(run: RunData, former: ReplacedLine) -> ReplacedRow:
    """Return the row of a line that another one replaced."""
    following, record = former.next, former.record
    content = ""
    if record is not None:
        counts = (len(record.checkpoints), "checkpoints"), (len(record.samples), "validations")
        content = ", ".join(f"{count} {name}" for count, name in (*counts, (record.metric_rows, "rows of metrics")))
    place = run.folder / following.replaced if following.replaced is not None else None
    return ReplacedRow(
        number=following.number - 1,
        after=f"step {following.kept}" if following.kept >= 0 else "its beginning",
        reason=scrub_text(following.reason),
        date=_spaced(record.moved_at if record is not None else following.began),
        content=content,
        where=following.replaced or "",
        href=_link(run.folder, place) if place is not None and _inside(run, str(place)) and place.is_dir() else "",
    )


def key_numbers(run: RunData) -> list[KeyNumber]:
    """Return the few numbers at the top."""
    numbers = _loss_numbers(run)
    seconds = [value for _, value in run.curve("train/step_time").finite]
    if seconds:
        numbers.append(KeyNumber("step time", f"{short(median(seconds))} s", "median"))
    memory = [value for _, value in run.curve("train/memory_gb").finite]
    if memory:
        numbers.append(KeyNumber("memory", f"{short(max(memory))} GB", "peak"))
    flow = run.record("flow")
    spent = flow.seconds if flow else sum(record.seconds for record in run.records)
    if spent:
        numbers.append(KeyNumber("all stages", clock(spent), "wall clock"))
    return numbers


def _loss_numbers(run: RunData) -> list[KeyNumber]:
    numbers = []
    loss = [value for _, value in run.curve("train/loss").finite]
    if loss:
        dense = len(loss) >= SMOOTH_FROM
        means = running_mean(loss, smoothing_span(loss)) if dense else loss
        numbers.append(KeyNumber("training loss", short(means[-1]), f"from {short(means[4 if dense else 0])}"))
    for label, name, compare in (
        ("held-out loss", "heldout/loss", relative_change),
        ("wavelet ratio", "sharpness/wavelet_ratio", difference),
    ):
        points = run.curve(name).finite
        if points:
            (first_step, first), (_, last) = points[0], points[-1]
            since = f"{compare(first, last)} since step {first_step}" if len(points) > 1 else f"at step {first_step}"
            numbers.append(KeyNumber(label, short(last), since))
    return numbers


def alert_line(run: RunData, alert: AlertEvent) -> AlertLine:
    """Return one alert, with a link to its picture when that is inside the run folder."""
    picture = _inside(run, alert.picture) if alert.picture else None
    tone = {"ERROR": "bad", "INFO": "plain"}.get(alert.level, "warn")
    return AlertLine(tone, alert.title, alert.text, alert.stage, _link(run.folder, picture) if picture else "")


def stage_row(run: RunData, record: StageRecord) -> StageRow:
    """Return a stage's row: its summary, or its first results where it gave none."""
    where = str(record.results.get("where") or record.results.get("output") or "")
    simple = [
        f"{name.replace('_', ' ')} {cell_text(value)}"
        for name, value in record.results.items()
        if name != "where" and isinstance(value, str | int | float)
    ]
    place = _inside(run, where) if where else None
    return StageRow(
        name=record.stage,
        status=record.status,
        tone=TONES.get(record.status, "warn"),
        summary="; ".join([record.summary or ", ".join(simple[:4]) or "-", *_origin_of_weights(run, record)]),
        time=clock(record.seconds) if record.seconds else "",
        where=(place.relative_to(run.folder.resolve()).as_posix() or ".") if place else where,
        href=_link(run.folder, place) if place and place.exists() else "",
    )


def _origin_of_weights(run: RunData, record: StageRecord) -> list[str]:
    """Return the step and the run that exported weights are from, and a note where that part was replaced since."""
    origin = record.results.get("weights_from")
    if not isinstance(origin, Mapping):
        return []
    trained_in, line, step = origin.get("run"), origin.get("line"), origin.get("step")
    if not isinstance(trained_in, str) or not isinstance(line, int) or not isinstance(step, int):
        return []
    place = Path(trained_in)
    # The run may have been moved since.
    own = place.resolve() == run.folder.resolve() or not place.is_dir() and place.name == run.folder.resolve().name
    notes = [describe_origin(place.name if own else trained_in, line, step)]
    return [note for note in (*notes, replaced_note(run.folder if own else place, line, step)) if note]


def figure(chart: Chart) -> Figure:
    """Return a chart for the template. Charts escape their own text; nothing else on the page is marked as safe."""
    return Figure(chart.title, Markup(chart.svg), chart.legend, chart.note)


def shown_validations(run: RunData) -> list[ValidationFolder]:
    """Return the validations that are shown side by side."""
    return [run.validations[index] for index in pick(len(run.validations), COLUMNS)]


def contact_sheets(run: RunData) -> list[Sheet]:
    """Return the contact sheets of the shown validations."""
    return [
        Sheet(f"step {one.step}", _link(run.folder, one.sheet))
        for one in shown_validations(run)
        if one.sheet is not None
    ]


def sample_grid(run: RunData) -> SampleGrid | None:
    """Return the grid of validation samples; None without validations."""
    if not run.validations:
        return None
    shown = shown_validations(run)
    keys = list(dict.fromkeys(key for validation in reversed(shown) for key in validation.samples))
    several_seeds = len({seed for _, seed in keys}) > 1
    rows = []
    for key in keys[:ROWS]:
        present = [validation.samples[key] for validation in shown if key in validation.samples]
        cells = [_sample_cell(run, validation, key, present[0].sharpness) for validation in shown]
        rows.append(SampleRow(f"{key[0]}, seed {key[1]}" if several_seeds else key[0], present[-1].text, cells))
    last = shown[-1].record
    how = [
        f"{last.frames} frames of {last.height}x{last.width}",
        f"{last.sampling.steps} denoising steps",
        f"guidance {short(last.sampling.guidance_scale)}",
    ]
    how += [f"sampler {last.sampling.sampler}"] if last.sampling.sampler != "default" else []
    return SampleGrid(
        steps=[validation.step for validation in shown],
        hidden=len(run.validations) - len(shown),
        rows=rows,
        more=max(0, len(keys) - ROWS),
        how=", ".join(how),
        small=max(validation.record.width for validation in shown) < SMALL_WIDTH,
        ratio=f"{last.width or 3} / {last.height or 2}",
    )


def _sample_cell(
    run: RunData, validation: ValidationFolder, key: tuple[str, int], first: Mapping[str, float]
) -> SampleCell:
    sample = validation.samples.get(key)
    if sample is None:
        return SampleCell(validation.step)
    main = SAMPLE_METRICS[0]
    value = sample.sharpness.get(main)
    compared = value is not None and main in first and first is not sample.sharpness
    metrics = [name for name in SAMPLE_METRICS if name in sample.sharpness]
    return SampleCell(
        step=validation.step,
        src=_link(run.folder, sample.video) if sample.video else "",
        value=short(value) if value is not None else "",
        change=difference(first[main], value) if value is not None and compared else "",
        title=", ".join(f"{name.replace('_', ' ')} {short(sample.sharpness[name])}" for name in metrics),
    )


def ladder_section(run: RunData) -> LadderSection | None:
    """Return the sharpness ladder; None when no rung was measured."""
    if LADDER_TABLE not in run.tables:
        return None
    pictures = (
        ("ladder/clips.png", "a clip's file, the loaded clip, its round trip"),
        ("ladder/samples.png", "a prompt on rungs 3 to 5"),
    )
    sheets = [
        Sheet(title, _link(run.folder, run.folder / name)) for name, title in pictures if (run.folder / name).is_file()
    ]
    return LadderSection(table_section(run, run.tables[LADDER_TABLE]), sheets)


def other_tables(run: RunData) -> list[TableSection]:
    """Return the tables without a section of their own. The table of stages is left out: the page shows the records."""
    return [
        table_section(run, table)
        for key, table in run.tables.items()
        if key != LADDER_TABLE and not (run.records and table.columns[:2] == ["stage", "result"])
    ]


def table_section(run: RunData, table: TableEvent) -> TableSection:
    """Return a table with its numeric columns marked and its videos and pictures linked."""
    columns = []
    for index, name in enumerate(table.columns):
        values = [row[index] for row in table.rows if index < len(row) and row[index] is not None]
        columns.append(TableColumn(name, bool(values) and all(map(is_numeric, values))))
    title = table.key.replace("/", ": ").replace("_", " ")
    rows = [
        [_table_cell(run, value, index < len(columns) and columns[index].number) for index, value in enumerate(row)]
        for row in table.rows
    ]
    return TableSection(title[:1].upper() + title[1:], columns, rows)


def _table_cell(run: RunData, value: Cell, number: bool) -> TableCell:
    kinds = {".mp4": "video", ".webm": "video", ".png": "image", ".jpg": "image"}
    kind = kinds.get(Path(value).suffix.lower(), "") if isinstance(value, str) else ""
    path = _inside(run, str(value)) if kind else None
    if path is None or not path.is_file():
        return TableCell(cell_text(value), number, "", "")
    return TableCell(cell_text(value), number, kind, _link(run.folder, path))


def artifact_row(artifact: ArtifactEvent) -> ArtifactRow:
    """Return an artifact's row of the lineage table."""
    return ArtifactRow(
        name=artifact.name,
        type=artifact.type,
        stage=artifact.stage or "outside of this run",
        uses=", ".join(artifact.uses),
        size=byte_size(artifact.bytes),
        hash=(artifact.manifest_sha256 or "")[:12],
    )


def stage_details(record: StageRecord) -> StageDetails:
    """Return everything that a stage recorded, without secrets."""
    machine = {name: value for name, value in vars(record.machine).items() if value is not None}
    groups: Sequence[tuple[str, JsonObject]] = (
        ("results", record.results),
        ("inputs", record.inputs),
        ("versions", record.versions),
        ("machine", machine),
        ("settings", record.settings),
    )
    rows = [(name, flatten(scrub(values))) for name, values in groups]
    return StageDetails(
        stage=record.stage,
        command=scrub_text(record.command),
        finished=_spaced(record.finished),
        groups=[(name, found) for name, found in rows if found],
    )


def _spaced(moment: str) -> str:
    """Return a UTC time of a record for reading."""
    return moment.replace("T", " ").rstrip("Z")


def _inside(run: RunData, where: str) -> Path | None:
    """Return ``where`` as a path when it is inside the run folder, given absolutely, from here, or from the run."""
    folder = run.folder.resolve()
    if "\0" in where:
        return None
    for path in (Path(where), folder / where):
        if path.resolve().is_relative_to(folder):
            return path.resolve()
    return None


def _link(folder: Path, path: Path) -> str:
    """Return the relative link to ``path``; empty when it, or what it links to, is outside of ``folder``."""
    inside = path.resolve().is_relative_to(folder.resolve())
    return quote(path.resolve().relative_to(folder.resolve()).as_posix() or ".") if inside else ""
