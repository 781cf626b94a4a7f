"""Test that videos and pictures are opened for reading in one module only. Calls are read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cogflow

PACKAGE = Path(cogflow.__file__).parent
AUDITED = {
    "data/media.py": "the audited functions",
    "assemble/fresh_process.py": "imports nothing of cogflow; the path is checked before the process starts",
}
"""Modules that may open media for reading, and why."""
FORBIDDEN_MODULES = {"cv2", "imageio", "iio", "decord", "moviepy", "torchcodec", "ffmpeg", "skvideo"}
FORBIDDEN_PARTS = ("torchvision.io", "imageio.v3", "PIL.Image.open", "av.open")
OPENERS = {("av", "open"), ("Image", "open"), ("io", "read_video"), ("io", "read_image"), ("utils", "load_video")}


def accesses(text: str) -> Iterator[str]:
    """Yield calls that open media for reading, and imports of libraries that do."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{name.name}" if module else name.name for name in node.names]
            for name in names:
                if name.split(".")[0] in FORBIDDEN_MODULES or any(name.startswith(part) for part in FORBIDDEN_PARTS):
                    yield f"line {node.lineno}: import of {name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            last = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if (last, node.func.attr) in OPENERS and not _writes(node):
                yield f"line {node.lineno}: {last}.{node.func.attr}"


def _writes(call: ast.Call) -> bool:
    modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "mode")]
    return any(isinstance(mode, ast.Constant) and mode.value == "w" for mode in modes)


def test_only_the_audited_module_opens_media() -> None:
    found = [
        f"{path.relative_to(PACKAGE)} {access}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in AUDITED
        for access in accesses(path.read_text(encoding="utf-8"))
    ]
    assert found == []
    for name in AUDITED:
        assert list(accesses((PACKAGE / name).read_text(encoding="utf-8"))), f"{name} opens no media any more"


@pytest.mark.parametrize(
    "text",
    [
        "import av\nav.open(path)",
        "import av\nav.open(path, 'r')",
        "from av import open",
        "from PIL import Image\nImage.open(path)",
        "import PIL.Image\nPIL.Image.open(path)",
        "import cv2",
        "import imageio.v3 as iio",
        "from torchvision.io import read_video",
        "import torchvision\ntorchvision.io.read_video(path)",
    ],
)
def test_a_new_access_is_found(text: str) -> None:
    assert list(accesses(text))


def test_writing_a_video_is_no_access() -> None:
    assert not list(accesses("import av\nav.open(path, 'w', format='mp4')"))
