"""``python -m cogflow stage=NAME ...``: compose, check, run one stage. The exit code says whose move it is (cogflow.errors)."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from cogflow import __version__
from cogflow.config import build, help, problems
from cogflow.config.compose import compose
from cogflow.errors import CogflowError
from cogflow.files.atomic_write import append_text, write_first
from cogflow.files.paths import run_folder
from cogflow.stages import SUMMARIES, load

FLAGS = ("--help", "-h", "--cfg", "--version")


def main(words: Sequence[str]) -> int:
    rank, config = os.environ.get("RANK", "0"), None
    flags, choices = [word for word in words if word[:1] == "-"], [word for word in words if word[:1] != "-"]
    try:
        problems.fail([problems.Problem(f"{flag}: no such option.") for flag in flags if flag not in FLAGS], help.USAGE)
        if "--version" in flags:
            print(__version__)
        elif not words or "--help" in flags or "-h" in flags:
            print(help.text(choices, SUMMARIES))
        else:
            if rank == "0" and not any(word.startswith(("stage=", "experiment=")) for word in choices):
                print(help.overview(SUMMARIES), end="\n\n", file=sys.stderr)
            config = compose(choices)
            print(build.as_yaml(config), end="") if "--cfg" in flags else load(config.stage.name).run(config)
    except CogflowError as error:
        if rank == "0" or error.rank is not None:
            print(f"{f'rank {rank}: ' if error.rank else ''}{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        fault = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}\n{traceback.format_exc()}"
        print(fault, file=sys.stderr)
        if config is not None:
            append_text(run_folder(config.run) / "cogflow.log", fault)
        return 1
    return 0


if __name__ == "__main__":
    code, note = main(sys.argv[1:]), os.environ.get("COGFLOW_EXIT_FILE")
    # For launchers that make another code of it. The first rank to fail is the cause, the others follow it.
    if note and (code or os.environ.get("RANK", "0") == "0"):
        write_first(Path(note), str(code))
    sys.exit(code)
