"""Name the files and folders inside a run, and format and parse the names of step folders.

A run folder holds one ``<stage>.json`` per stage that ran, ``metrics.jsonl``, ``report.html`` and the folders of
:class:`RunLayout`. Checkpoints, samples and exported weights are kept in one folder per step, named by
:func:`step_name`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cogflow.records.export_records import ExportRecord
from cogflow.records.pipeline_records import AssemblyRecord
from cogflow.records.sample_records import SamplesRecord
from cogflow.records.training_records import TrainerRecord

TRAINER = TrainerRecord.file_name
"""File of a checkpoint: the state of training and the settings it was trained with."""
SAMPLES_RECORD = SamplesRecord.file_name
"""File of a samples folder: how the samples were made, and their metrics."""
EXPORT_REPORT = ExportRecord.file_name
"""File of an export folder: the source, the facts and the hashes of the exported components."""
ASSEMBLY = AssemblyRecord.file_name
"""File of an assembled pipeline: where each component comes from."""
MODEL_INDEX = "model_index.json"
"""File of a diffusers pipeline folder: the class of the pipeline and of each component."""

_STEP_NAME = re.compile(r"step-(\d{6,})")


def step_name(step: int) -> str:
    """Return the name of a step's folder: ``step-000100`` for 100."""
    return f"step-{step:06d}"


def parse_step(name: str) -> int | None:
    """Return the step that a folder name written by :func:`step_name` stands for, ``None`` for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def step_of(folder: Path) -> int:
    """Return the step of a folder of :func:`step_folders`. Raise ``ValueError`` for any other name."""
    step = parse_step(folder.name)
    if step is None:
        raise ValueError(f"{folder.name} is not the name of a step's folder")
    return step


def step_folders(folder: Path) -> list[Path]:
    """Return the step folders in ``folder``, oldest first; an empty list when ``folder`` does not exist."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if parse_step(path.name) is not None), key=step_of)


@dataclass(frozen=True)
class RunLayout:
    """The folders of the run at ``root``. None of them need exist."""

    root: Path

    @property
    def cache(self) -> Path:
        """Latents and text embeddings of the prepared clips."""
        return self.root / "cache"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints that training resumes from, one step folder each."""
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        """Checkpoints without optimizer states (``stage.weights_every``), one step folder each."""
        return self.root / "weights"

    @property
    def samples(self) -> Path:
        """Validation samples, one step folder each."""
        return self.root / "samples"

    @property
    def watch(self) -> Path:
        """Contact sheets of the quality watch's findings."""
        return self.root / "watch"

    @property
    def sampled(self) -> Path:
        """Output of stage=sample."""
        return self.root / "sampled"

    @property
    def export(self) -> Path:
        """Output of stage=export."""
        return self.root / "export"

    @property
    def parts(self) -> Path:
        """Components that stage=assemble exported itself."""
        return self.root / "parts"

    @property
    def pipeline(self) -> Path:
        """Output of stage=assemble."""
        return self.root / "pipeline"


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """Return the run whose ``checkpoints/`` contains ``checkpoint``, ``None`` for a checkpoint at another place."""
    run = checkpoint.parent.parent
    return run if RunLayout(run).checkpoints == checkpoint.parent else None
