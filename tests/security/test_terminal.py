"""Test that no name, prompt, caption or record of others controls a terminal, a log, the report or the model card."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path

import pytest

from cogflow import cli
from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.model_card import FACTS, CardSections, card_text
from cogflow.config.data_section import DataConfig
from cogflow.config.run_section import FOLDER_NAME
from cogflow.data.clip_index import read_index
from cogflow.data.quarantine import Quarantine
from cogflow.diagnosis.html_page import write_page
from cogflow.errors import DataError
from cogflow.files.atomic_write import append_text
from cogflow.files.printable import one_line, paragraph, printable
from cogflow.files.publish import FileHash
from cogflow.records.pipeline_records import (
    AssembledComponent,
    AssemblyRecord,
    ContradictionRecord,
    DiagnosisRecord,
    FindingRecord,
    PipelineSampling,
    TransformerOrigin,
    VerifyRecord,
)
from cogflow.runtime.console import echo, table
from cogflow.runtime.progress import progress
from cogflow.tracking.html_report import write_report

HOSTILE = "a\x1b[31m\x1b]0;title\x07\nDataError: all is well\r\u202egnp.exe\u2028\x9b2J\udc80.mp4"
"""Escape sequences, line breaks, a change of the writing direction, and a byte that is not UTF-8."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")


def assert_harmless(text: str) -> None:
    """Check that ``text`` has no control character, and that none of its lines begins like the false one."""
    assert text
    assert not CONTROLS.search(text)
    assert not any(line.startswith("DataError: all is well") for line in text.splitlines())


def test_control_characters_are_escaped_and_other_text_is_kept() -> None:
    assert one_line("a\nb\tc\x1b\u202e\udc80") == r"a\nb\tc\x1b\u202e\udc80"
    assert printable("a\n\tb\x1b") == "a\n\tb\\x1b"
    assert paragraph("a\nb\n  c\n\nd") == "a\n  b\n  c\n\n  d"
    for kept in ("日本語 – “é” ✓ 🎬", "👩\u200d🚀", "می\u200cخواهم", "C:\\clips\\a.mp4"):
        assert one_line(kept) == printable(kept) == kept


def test_printed_lines_and_tables_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"note: {HOSTILE} has no round trip")
    table([[HOSTILE, 1], [None, HOSTILE]], ["clip", HOSTILE])
    printed = capsys.readouterr().out
    assert_harmless(printed)
    assert "\\x1b" in printed


def test_each_argument_of_echo_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    echo("done", "record: here")
    assert capsys.readouterr().out == "done\nrecord: here\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_harmless_in_a_log_and_on_a_terminal() -> None:
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        with progress(1, HOSTILE, stream=stream) as bar:
            bar.advance(1, note=HOSTILE)
    assert_harmless(log.getvalue())
    shown = terminal.getvalue()
    assert (
        "\x1b]0;title" not in shown and "\x1b[31m" not in shown and "\u202e" not in shown and "\nDataError" not in shown
    )


@pytest.mark.parametrize("error", [DataError(f"{HOSTILE} is no clip", HOSTILE), RuntimeError(HOSTILE)])
def test_errors_of_a_command_are_harmless(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "compose_command", fail)
    code = cli.main(["stage=plan"])
    printed = capsys.readouterr().err
    assert code == (2 if isinstance(error, DataError) else 1)
    assert not CONTROLS.search(printed)
    if isinstance(error, DataError):
        assert_harmless(printed)


def test_the_list_of_unreadable_clips_is_harmless(tmp_path: Path) -> None:
    quarantine = Quarantine(DataConfig(max_bad_share=0.0), 2, tmp_path / "quarantine.jsonl")
    with pytest.raises(DataError) as caught:
        quarantine.add(HOSTILE, HOSTILE)
    assert_harmless(str(caught.value))
    assert str(caught.value).count("\n") == 2  # one clip and the hint
    lines = (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"name": HOSTILE, "reason": HOSTILE}]
    assert_harmless(lines[0])


def test_errors_of_a_list_of_clips_are_harmless(tmp_path: Path) -> None:
    name = HOSTILE.replace("\udc80", "").replace(".mp4", ".exe")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_index(tmp_path)
    assert "is none of" in str(caught.value)
    assert_harmless(str(caught.value))


def test_the_report_of_an_unwritable_log_is_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\x1b[31m\nDataError: all is well"
    folder.mkdir()
    append_text(folder, "text")
    assert_harmless(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "a\u202eb", "a\x85", "a\udc80", "a\x7f", "\u2066a", "a\ufeff"])
def test_control_characters_are_refused_in_run_name(name: str) -> None:
    assert FOLDER_NAME.problem(name)


@pytest.mark.parametrize("name", ["tiny-shapes", "run 2", "été", "日本", "a.b_c"])
def test_other_names_of_runs_are_allowed(name: str) -> None:
    assert FOLDER_NAME.problem(name) is None


# The report


def test_the_report_links_only_to_files_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    run = tmp_path / "run"
    run.mkdir()
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "inside.png").write_bytes(b"")
    pictures = ["javascript:alert(1)", "data:text/html,x", "https://example.org/a.png", "//example.org/a.png"]
    pictures += ["../secret.png", str(tmp_path / "secret.png"), "link.png", "\0", "vbscript:x", "inside.png"]
    title = "<script>alert(1)</script>"
    events: list[dict[str, object]] = [
        {"kind": "alert", "title": title, "text": "text", "picture": name} for name in pictures
    ]
    events.append({"kind": "table", "key": "t", "columns": ["a"], "rows": [[name] for name in pictures]})
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run / "events.jsonl").write_text(lines, encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    links = set(re.findall(r'(?:href|src)="([^"]*)"', page))
    assert "inside.png" in links
    for link in links:
        assert re.fullmatch(r"[\w./%-]+", link), link
        assert (run / link).resolve().is_relative_to(run.resolve())
    assert "<script>alert(1)" not in page


def test_the_page_of_a_diagnosis_contains_text_and_no_markup_of_others(tmp_path: Path) -> None:
    text = "<script>alert(1)</script><a href='javascript:alert(1)'>\"x"
    finding = FindingRecord(1, text, text, text, text, 0.5, text, text, field=text)
    record = DiagnosisRecord(False, text, [finding], [finding], [text], {}, text, text, text)
    page = write_page(tmp_path, record, {}).path.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script>alert" not in page and not re.search(r"<a\b", page)


# The model card


def card(text: str) -> str:
    """Return a model card with ``text`` in every place where others decide the text."""
    sampling = PipelineSampling(
        height=16,
        width=16,
        frames=9,
        fps=8.0,
        steps=2,
        guidance_scale=6.0,
        use_dynamic_cfg=False,
        dtype="fp32",
        text=text,
    )
    components = {
        name: PipelineComponent(name, Path(), text, dict.fromkeys(keys, text)) for name, keys in FACTS.items()
    }
    files = {"a.safetensors": FileHash(bytes=1, sha256="0" * 64)}
    assembly = AssemblyRecord(
        components={name: AssembledComponent(class_name=text, origin=text, files=files) for name in components},
        made=TransformerOrigin(family=text),
        checked_against={},
        sampling=sampling,
        diffusers="0",
        forced=[ContradictionRecord(text, text, text, text, text, text, text)],
        verify=VerifyRecord(status="failed", reason=text),
    )
    sections = CardSections(
        command=f"cogflow stage=assemble run.name='{text}'",
        training=[("result", text)],
        videos=[("samples/a b.mp4", text)],
        ladder_columns=["rung"],
        ladder=[[text]],
    )
    return card_text(text, components, assembly, sections)


def test_prompts_stay_in_the_code_blocks_of_the_model_card() -> None:
    """The card has as many headings, code blocks and table rows as with a harmless text."""
    text = "a\n```\n# Heading\n````\n<script>alert(1)</script>\n| x |\n[link](javascript:alert(1))\u202e\x1b[31m"
    hostile, harmless = card(text), card("a")
    assert not CONTROLS.search(hostile)
    outside, blocks = split_blocks(hostile)
    expected_outside, expected_blocks = split_blocks(harmless)
    assert len(blocks) == len(expected_blocks) == 2
    for start in ("#", "|", "- "):
        assert [line[:2] for line in outside if line.startswith(start)] == [
            line[:2] for line in expected_outside if line.startswith(start)
        ]
    joined = "\n".join(outside)
    assert not re.search(r"(?<!\\)<", joined) and not re.search(r"(?<!\\)\]\(javascript", joined)
    ast.parse(blocks[0])
    assert "samples/a%20b.mp4" in hostile


def split_blocks(markdown: str) -> tuple[list[str], list[str]]:
    """Return the lines outside of code blocks, and the content of each block, by the rules of CommonMark."""
    outside: list[str] = []
    blocks: list[list[str]] = []
    fence = ""
    for line in markdown.splitlines():
        run = re.match("`{3,}", line)
        if fence and run and len(run[0]) >= len(fence) and not line.strip("` "):
            fence = ""
        elif fence:
            blocks[-1].append(line)
        elif run:
            fence = run[0]
            blocks.append([])
        else:
            outside.append(line)
    return outside, ["\n".join(block) for block in blocks]
