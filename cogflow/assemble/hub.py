"""Upload a published pipeline folder to Hugging Face's hub, without telling where somebody's disks are mounted."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import ASSEMBLY, RunLayout
from cogflow.assemble.card_context import without_places
from cogflow.errors import PipelineError
from cogflow.files.manifest import MANIFEST, write_manifest


def push(folder: Path, repository: str, private: bool, message: str) -> str:
    """Make ``repository`` (OWNER/NAME) where it does not exist, ``private`` or not, and upload ``folder``; returns the commit's address.

    The token is the one of ``hf auth login`` or of HF_TOKEN. Raises :class:`PipelineError` when the hub cannot be reached or refuses; the
    folder is published here all the same.
    """
    from huggingface_hub import HfApi

    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.push-", dir=folder.parent) as place:
            shared = RunLayout(Path(place)).pipeline
            share(folder, shared)
            api = HfApi(library_name="cogflow")
            made = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
            commit: Any = api.upload_folder(
                repo_id=made.repo_id, folder_path=shared, repo_type="model", commit_message=message
            )
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one or the other
        raise PipelineError(
            f"{folder} is published here, and was not uploaded to {repository}: {error}",
            "Log in with `hf auth login` or set HF_TOKEN to a token that may write there; then give the same command again.",
        ) from error
    return str(commit.commit_url)


def share(folder: Path, target: Path) -> None:
    """``folder`` again as ``target``, its weights linked: of every path in assembly.json only the last two names are kept."""
    shutil.copytree(folder, target, copy_function=_link)
    assembly = json.loads((folder / ASSEMBLY).read_text(encoding="utf-8"))
    known = {
        name: entry["sha256"]
        for name, entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items()
    }
    for name in (ASSEMBLY, MANIFEST):
        (target / name).unlink()  # a link: the file it leads to stays as it is
        known.pop(name, None)
    (target / ASSEMBLY).write_text(
        json.dumps(_shortened(assembly), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    write_manifest(target, known)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        whole = value.startswith("/") and " /" not in value and "\n" not in value
        return (
            ".../" + "/".join(Path(value).parts[-2:]) if whole and len(Path(value).parts) > 3 else without_places(value)
        )
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return [_shortened(item) for item in value] if isinstance(value, list) else value
