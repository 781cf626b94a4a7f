"""Test that files, parsers, links and processes are used through the audited functions only.

``cogflow.files.contained_files`` opens files by names that others chose, ``cogflow.files.bounded_parsing`` parses their
content within limits. A call that reads, writes, parses, copies, links or starts a process in any other way must be
listed in :data:`ALLOWED` with the reason why no name and no content of a stranger reaches it unchecked.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CALLS = {
    "open",
    "eval",
    "exec",
    "os.open",
    "os.fdopen",
    "os.link",
    "os.symlink",
    "os.system",
    "os.popen",
    "io.open",
    "io.FileIO",
    "json.load",
    "json.loads",
    "yaml.load",
    "yaml.safe_load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "yaml.safe_load_all",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "np.load",
    "OmegaConf.load",
    "safe_open",
    "load_file",
    "shutil.copy",
    "shutil.copy2",
    "shutil.copyfile",
    "shutil.copyfileobj",
    "shutil.copytree",
    "shutil.move",
    "shutil.unpack_archive",
    "zipfile.ZipFile",
    "tarfile.open",
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
}
"""Functions by their dotted name in the code."""

MEDIA = {"av.open", "Image.open"}
"""Decoders, whose call is no method of a path."""

METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "symlink_to", "hardlink_to"}
"""Methods of paths, by name. ``.open`` is also that of other objects."""

NAMES_IN_RECORDS = {
    "video",
    "image",
    "picture",
    "replaced",
    "checkpoint",
    "clip_shard",
    "text_shard",
    "shard",
}
"""Fields of records and rows that name a file. ``folder / record.video`` must not be opened unchecked."""

BENCHMARK = "it measures this machine in a folder that it made itself"
PROC = "it reads /proc of this machine"

ALLOWED: dict[str, tuple[set[str], str]] = {
    # The audited functions.
    "files/contained_files.py": ({"os.open", "os.fdopen"}, "it is the module that opens files of others"),
    "files/bounded_parsing.py": ({"yaml.safe_load"}, "the text was checked against the limits before"),
    "files/secrets.py": ({"json.loads"}, "the text was made by json.dumps in the same line"),
    "files/atomic_write.py": ({"os.open", ".open"}, "it syncs what was written, and creates a file with mode x"),
    "files/hashing.py": ({".open"}, "it hashes files whose size was asked for before; nothing is parsed"),
    "files/linking.py": (
        {"os.link", ".hardlink_to", "shutil.copy2", ".open"},
        "its callers give paths that contained_file has checked, and new names",
    ),
    "files/uncached_io.py": ({"os.open", "io.FileIO"}, "it writes new files and reads back what it wrote"),
    # Readers of weights, which check the file before.
    "weights/tensor_source.py": ({"safe_open"}, "the path is that of contained_file; the header is checked afterwards"),
    "weights/safetensors_file.py": ({".open"}, "it creates a file in an unpublished folder"),
    "weights/torch_file.py": (
        {"torch.load", "zipfile.ZipFile"},
        "open_regular and the archive's table were checked; weights_only builds no objects",
    ),
    "weights/weights_writer.py": (
        {".write_text", ".open", "zipfile.ZipFile"},
        "it writes into an unpublished folder and patches what it wrote",
    ),
    "training/saved_weights.py": ({"safe_open"}, "the checkpoint's manifest was verified, which refuses links"),
    "data/latent_cache.py": ({"safe_open"}, "is_file_below has checked the names of the index"),
    "sampling/clip_files.py": ({"load_file"}, "safetensors of a fixed name; the values are compared, not stored"),
    "sampling/sample_folder.py": ({"load_file"}, "it merges the files that its own ranks wrote"),
    "assemble/verification.py": (
        {"load_file", ".write_text", ".read_text", ".open", "subprocess.run"},
        "it runs a script of the package, in a temporary folder of its own",
    ),
    "assemble/fresh_process.py": (
        {"json.loads", ".read_text", "load_file"},
        "it runs without cogflow, and reads the request that verification.py wrote",
    ),
    "assemble/hub.py": (
        {"shutil.copytree", "shutil.copyfileobj", ".hardlink_to", ".write_text"},
        "it copies the folder that was just published, into a temporary folder",
    ),
    "assemble/pipeline_folder.py": ({"shutil.copyfileobj"}, "from open_regular to create_below"),
    "data/media.py": ({"os.open", "os.fdopen"}, "it opens videos and pictures, regular files only"),
    # Files of the package and of the user.
    "config/help_text.py": ({".read_text"}, "it reads the yaml files of the package"),
    "config/sat_import.py": (
        {".read_text", "OmegaConf.load"},
        "it reads the yaml files of the package, and text that read_yaml_text has checked",
    ),
    "data/shapes.py": ({".write_text"}, "it writes into an unpublished folder"),
    "diagnosis/html_page.py": ({".read_bytes"}, "it reads the pictures that it wrote"),
    "runtime/heartbeat.py": (
        {".write_text", ".open", ".read_text"},
        "the run was checked for links when the command began; it reads /proc",
    ),
    "runtime/run_lock.py": (
        {"os.open", "os.link", ".open", ".read_text"},
        "it creates its files new, under random names, in a run that was checked for links; it reads /proc",
    ),
    "rank_identity.py": ({"subprocess.run"}, "it asks SLURM for the names of hosts"),
    "tracking/metrics_log.py": ({".open"}, "the run was checked for links when the command began"),
    "tracking/report_sections.py": ({"/ replaced"}, "it is linked to if it exists, and not opened"),
    "tracking/stage_record.py": ({".read_text", "subprocess.run"}, "it reads /proc and asks git for the commit"),
    "tracking/wandb_folders.py": (
        {".open", ".read_bytes"},
        "the run was checked for links when the command began; records are counted, not parsed",
    ),
    "tracking/wandb_service.py": ({".read_text"}, PROC),
    "training/rollback.py": ({"/ replaced"}, "the name was made by begin_line in this process"),
    "training/validation.py": ({"/ video"}, "the record was written by this process"),
    "sharpness/trend.py": ({"/ [clips]"}, "a division of numbers"),
    # Measurements.
    "benchmarking/assemble_cost.py": ({".open"}, BENCHMARK),
    "benchmarking/checkpoint_cost.py": ({"subprocess.run"}, BENCHMARK),
    "benchmarking/command_cost.py": ({".open", "subprocess.Popen", ".write_text", ".read_text"}, BENCHMARK),
    "benchmarking/export_cost.py": ({".open"}, BENCHMARK),
    "benchmarking/random_pipeline.py": ({"shutil.copytree"}, BENCHMARK),
    "benchmarking/step.py": ({".read_text"}, PROC),
    "benchmarking/step_settings.py": ({"subprocess.run"}, BENCHMARK),
}
"""Module -> its calls, and the reason why they are safe."""


def dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return None


def audited(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each call and each path expression that must be listed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS:
                yield node.lineno, name
            elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and name not in MEDIA:
                yield node.lineno, f".{node.func.attr}"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and (field := _field(node.right)):
            yield node.lineno, f"/ {field}"


def _field(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute) and node.attr in NAMES_IN_RECORDS and dotted(node.value) != "self":
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return f"[{node.slice.value}]"
    return None


def problems(package: Path, allowed: dict[str, tuple[set[str], str]]) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).as_posix()
        names, reason = allowed.get(module, (set(), ""))
        used = list(audited(ast.parse(path.read_text(encoding="utf-8"))))
        found += [f"{module}:{line}: {name}" for line, name in used if name not in names]
        found += [f"{module}: {name} is listed and not used" for name in sorted(names - {name for _, name in used})]
        if names and not reason:
            found.append(f"{module}: listed without a reason")
    return found + [f"{module} is listed and does not exist" for module in allowed if not (package / module).is_file()]


def test_files_and_processes_are_used_through_audited_functions(repository: Path) -> None:
    assert problems(repository / "cogflow", ALLOWED) == [], (
        "Use cogflow.files.contained_files or bounded_parsing, or list the call in ALLOWED and say why it is safe"
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("open(path)", "open"),
        ("import json\njson.loads(text)", "json.loads"),
        ("def f(path):\n    return path.read_text()", ".read_text"),
        ("path.open()", ".open"),
        ("shutil.copyfile(a, b)", "shutil.copyfile"),
        ("yaml.safe_load(text)", "yaml.safe_load"),
        ("subprocess.run(words)", "subprocess.run"),
        ("folder / sample.video", "/ video"),
        ("folder / row['file_name']", "/ [file_name]"),
        ("os.symlink(a, b)", "os.symlink"),
    ],
)
def test_an_unlisted_call_is_found(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    assert [problem.split(": ")[1] for problem in problems(tmp_path, {})] == [name]
    assert problems(tmp_path, {"a.py": ({name}, BENCHMARK)}) == []


def test_an_entry_that_is_not_used_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1", encoding="utf-8")
    assert problems(tmp_path, {"a.py": ({"open"}, BENCHMARK), "b.py": ({"open"}, BENCHMARK)}) == [
        "a.py: open is listed and not used",
        "b.py is listed and does not exist",
    ]
