"""Read printed commands as a user's shell does."""

from __future__ import annotations

import json
import re
import subprocess
import sys


def printed_commands(text: str) -> list[str]:
    """Return the commands that a program printed, each from its program to the end of its line."""
    return re.findall(r"(?:python|torchrun [\w -]*?) -m cogflow .*$", text, re.MULTILINE)


def words_of(line: str) -> list[str]:
    """Return the words that a real shell makes of the command ``line``, without ``python -m cogflow``."""
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    script = f'python() {{ "{sys.executable}" -c \'{code}\' "$@"; }}\n{line}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    words: list[str] = json.loads(done.stdout)
    assert words[:2] == ["-m", "cogflow"]
    return words[2:]
