"""Upload a published pipeline folder to the Hugging Face hub, with the paths of the user's disk removed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import ASSEMBLY, RunLayout
from cogflow.assemble.components import WEIGHTS_SUFFIX
from cogflow.assemble.model_card import shorten_paths
from cogflow.errors import PipelineError
from cogflow.files.contained_files import create_file, open_regular
from cogflow.files.publish import MANIFEST, read_manifest, write_manifest
from cogflow.files.record_io import JsonValue, read_record, record_values
from cogflow.records.pipeline_records import AssemblyRecord


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload ``folder`` to ``repository`` (OWNER/NAME) and return the commit's address.

    A repository that does not exist is created, private if ``private``. The token is that of ``hf auth login`` or of
    HF_TOKEN. Raises :class:`PipelineError` when the hub cannot be reached or refuses; ``folder`` stays published.
    """
    from huggingface_hub import HfApi

    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.push-", dir=folder.parent) as temporary:
            shared = RunLayout(Path(temporary)).pipeline
            copy_without_paths(folder, shared)
            api = HfApi(library_name="cogflow")
            created = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
            commit: Any = api.upload_folder(
                repo_id=created.repo_id, folder_path=shared, repo_type="model", commit_message=message
            )
    except (OSError, ValueError) as error:  # huggingface_hub raises one or the other
        raise PipelineError(
            f"{folder} is published, but was not uploaded to {repository}: {error}",
            "Log in with `hf auth login` or set HF_TOKEN to a token with write access, then run the same command.",
        ) from error
    return str(commit.commit_url)


def copy_without_paths(folder: Path, target: Path) -> None:
    """Copy ``folder`` to ``target`` with hard links where possible; cut the paths in assembly.json to their last two
    names.
    """
    shutil.copytree(folder, target, copy_function=_link_or_copy)
    assembly = read_record(folder / ASSEMBLY, AssemblyRecord)
    files = read_manifest(folder).files
    known = {name: entry.sha256 for name, entry in files.items() if name not in (ASSEMBLY, MANIFEST)}
    for name in (ASSEMBLY, MANIFEST):
        (target / name).unlink()
    shortened = json.dumps(_shorten(record_values(assembly)), indent=2, ensure_ascii=False) + "\n"
    (target / ASSEMBLY).write_text(shortened, encoding="utf-8")
    write_manifest(target, known)


def _link_or_copy(source: str, target: str) -> None:
    """Link weights and copy everything else: an edit of a small file must not change the published one."""
    if source.endswith(WEIGHTS_SUFFIX):
        try:
            Path(target).hardlink_to(source)
            return
        except OSError:  # another file system, or one without hard links
            pass
    with open_regular(Path(source)) as original, create_file(Path(target)) as copy:
        shutil.copyfileobj(original, copy)


def _shorten(value: JsonValue) -> JsonValue:
    """Return a JSON ``value`` with every absolute path in its texts cut to its last two names."""
    if isinstance(value, Mapping):
        return {key: _shorten(item) for key, item in value.items()}
    if not isinstance(value, str):
        return [_shorten(item) for item in value] if isinstance(value, Sequence) else value
    is_path = value.startswith("/") and " /" not in value and "\n" not in value
    if is_path and len(Path(value).parts) > 3:
        return ".../" + "/".join(Path(value).parts[-2:])
    return shorten_paths(value)
