"""stage=sample: sample a run, a checkpoint or a pipeline, or read clips that exist; measure and compare the clips."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogflow.artifacts.identify import Artifact, ArtifactKind, identify, kind_named
from cogflow.artifacts.run_layout import RunLayout
from cogflow.artifacts.working_run import enclosing_run
from cogflow.config.command import command
from cogflow.config.config import Config
from cogflow.config.model_section import ModelConfig
from cogflow.config.sample_settings import SampleStage
from cogflow.errors import CheckpointError, DataError, QualityGateError
from cogflow.export.origin import find_transformer
from cogflow.files.paths import run_folder
from cogflow.models import loading
from cogflow.models.code_check import refuse_code
from cogflow.records.sample_records import SampledWeights, SamplingRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.sampling.clip_comparison import (
    TEMPORAL_DEFECTS,
    ClipComparison,
    MeasuredClips,
    compare_clips,
    mean_metrics,
    measure_clips,
    rates_differ,
)
from cogflow.sampling.clip_files import MEDIA, ClipSource, clips_of, read_clips
from cogflow.sampling.prompts import prompts_for
from cogflow.sampling.sample_folder import write_samples
from cogflow.sampling.sampler import Sampler, requests
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker
from cogflow.weights.tensor_source import weights_fingerprint

SHOWN = ("wavelet_ratio", "edge_sharpness", "blur_effect", "contrast", "saturation", "grain", "motion", "artefacts")
"""Metrics of the table on the terminal; the record holds all."""
CHANGE_COLUMNS = ["metric", "change", "from", "to", "z"]
SAMPLED = (
    ArtifactKind.PIPELINE,
    ArtifactKind.EXPORT,
    ArtifactKind.CHECKPOINT,
    ArtifactKind.RUN,
    ArtifactKind.COMPONENTS,
    ArtifactKind.COMPONENT,
)
"""Kinds of artifact whose transformer is sampled."""


@dataclass(frozen=True)
class SampleJob:
    """One run of the stage: its settings, the run folder, what is measured, and when it started (``time.time()``).

    ``clips``: the clips to measure. ``reference``: the clips to compare them with.
    """

    config: Config[SampleStage]
    run: Path
    source: Artifact
    clips: ClipSource
    reference: ClipSource | None
    started: float


def run(config: Config[SampleStage]) -> None:
    """Sample or read ``stage.source``, measure it, and compare it with ``stage.reference``.

    Raise :class:`QualityGateError` (exit code 3) when it is worse than the reference.
    """
    stage = config.stage
    started = time.time()
    ranks.setup()
    folder = run_folder(config.run)
    source = resolve_source(stage, folder)
    reference = resolve_reference(stage)
    if source.kind in MEDIA:
        clips = ClipSource(source.root, kind_named(stage.source_kind, "stage.source_kind"))
        job = SampleJob(config, folder, source, clips, reference, started)
        how = None
    else:
        output = Path(stage.output).expanduser() if stage.output else RunLayout(folder).sampled
        job = SampleJob(config, folder, source, ClipSource(output), reference, started)
        how = sample(job)
    if ranks.is_main():
        conclude(job, how)
    ranks.barrier()


def resolve_source(stage: SampleStage, folder: Path) -> Artifact:
    """Return what ``stage.source`` is, by default the run ``folder``: clips to measure, or a model to sample.

    Raise :class:`CheckpointError` for a path that is neither.
    """
    kind = kind_named(stage.source_kind, "stage.source_kind")
    artifact = identify(Path(stage.source or folder), kind, key="stage.source")
    if artifact.kind not in (*MEDIA, *SAMPLED):
        raise CheckpointError(
            f"stage.source={artifact.path} is {artifact.kind.label} ({artifact.reason}), "
            "which stage=sample does not sample.",
            f"Export it first: {command('export', {'stage.source': artifact.path})}",
        )
    echo(artifact.line("stage.source"))
    return artifact


def resolve_reference(stage: SampleStage) -> ClipSource | None:
    """Return the clips that ``stage.reference`` names. Raise :class:`DataError` when it holds none."""
    if stage.reference is None:
        return None
    kind = kind_named(stage.reference_kind, "stage.reference_kind")
    artifact = identify(Path(stage.reference), kind, key="stage.reference")
    if (clips := clips_of(artifact, kind)) is None:
        raise DataError(
            f"stage.reference={artifact.path} is {artifact.kind.label} ({artifact.reason}) "
            "and holds no videos or frames.",
            "Sample it first, then give its folder of videos.",
        )
    echo(artifact.line("stage.reference"))
    return clips


def resolve_model(source: Artifact, model: ModelConfig) -> tuple[Path, Path]:
    """Return the pipeline folder and the transformer folder to sample with.

    A pipeline brings both. Other artifacts bring the transformer, verified; ``model`` names the pipeline folder.
    """
    if source.kind is ArtifactKind.PIPELINE:
        refuse_code(source.root)
        return source.root, source.root
    transformer = find_transformer(source).folder
    return loading.model_folder(model), transformer


def sample(job: SampleJob) -> SamplingRecord:
    """Sample every prompt from its fixed noise into ``job.clips.path``; return how the samples were made."""
    config, data = job.config, job.config.data
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    base, transformer_folder = resolve_model(job.source, config.model)
    prompts = prompts_for(config.stage.prompts or config.sampling.prompts, data.name, captions(config))
    tokenizer, encoder = loading.load_tokenizer(base), loading.load_text_encoder(base, dtype, device)
    transformer = load_transformer(transformer_folder, dtype, device)
    texts = [prompt.text for prompt in prompts] + [""]
    embeds = loading.encode_prompts(tokenizer, encoder, texts, transformer.config.max_text_seq_length).cpu()
    del encoder
    sampler = Sampler(
        transformer,
        loading.load_vae(base),
        loading.load_scheduler(base),
        embeds[-1],
        config.sampling,
        frames=data.frames,
        height=data.height,
        width=data.width,
        device=device,
        dtype=dtype,
    )
    weights = SampledWeights(weights_fingerprint(transformer.state_dict().items()), source=str(job.source.path))
    wanted = requests(prompts, embeds, config.sampling.seeds)
    return write_samples(job.clips.path, sampler, wanted, fps=data.fps, weights=weights, title="samples").sampling


def load_transformer(folder: Path, dtype: Any, device: Any) -> Any:
    """Load the transformer of a pipeline folder, or of the component folder itself."""
    if (folder / "config.json").is_file():
        from diffusers import CogVideoXTransformer3DModel

        loaded = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype, **loading.SAFETENSORS_ONLY)
        return loaded.to(device).eval()
    return loading.load_transformer(folder, dtype, device).eval()


def captions(config: Config[SampleStage]) -> list[str]:
    """Return the captions of the prepared clips: the prompts where the data is the user's own and none are given."""
    if config.data.name == "shapes" or config.sampling.prompts:
        return []
    from cogflow.data.latent_cache import LatentCache

    # A command that may not write into the run of its source works in another run, without prepared clips.
    own = RunLayout(run_folder(config.run)).cache
    run = enclosing_run(Path(config.stage.source)) if config.stage.source and not own.is_dir() else None
    cache = LatentCache(own if run is None else RunLayout(run).cache)
    return [cache.texts[index] for index in cache.holdout or cache.train]


def conclude(job: SampleJob, how: SamplingRecord | None) -> None:
    """Measure the clips, print and log the result, and write ``sample.json``. ``how``: how samples were made.

    Raise :class:`QualityGateError` when the reference is better.
    """
    others = measure_or_refuse(job.reference) if job.reference is not None else None
    ours = measure_or_refuse(job.clips, others)
    table(
        [[name, *(f"{metrics[key]:.3f}" for key in SHOWN)] for name, metrics in ours.metrics.items()], ["clip", *SHOWN]
    )
    summary = f"{len(ours.metrics)} clips measured"
    results: dict[str, Any] = {"where": str(job.clips.path), "sharpness": ours.metrics}
    if how is not None:
        results["sampling"] = how
        summary += f", sampled by {how.scheduler}"
    if learned := clip_scores(job.config, job.clips):
        results["learned"] = learned
    comparison = compare_with_reference(job, ours, others) if others is not None else None
    if comparison is not None and job.reference is not None:
        results |= {"reference": str(job.reference.path), "comparison": asdict(comparison)}
        worse = f"worse than the reference: {', '.join(comparison.defects)}"
        summary += f", {worse if comparison.worse else 'as good as the reference'}"
    log_result(job, ours, comparison)
    job.run.mkdir(parents=True, exist_ok=True)
    inputs = {"source": str(job.source.path)}
    results = {"summary": summary} | results
    record = record_stage(job.run, "sample", job.config, inputs, results, started=job.started)
    echo(summary, f"clips:  {job.clips.path}", f"record: {record}")
    if comparison is not None and job.reference is not None and comparison.worse:
        verdict = "blurrier" if comparison.blurrier else "worse"
        raise QualityGateError(
            f"{job.source.path} is {verdict} than {job.reference.path} ({comparison.pairing}):\n  "
            + "\n  ".join(comparison.failing_lines),
            f"The clips are kept in {job.clips.path}; the metrics are in {record}.",
        )


def compare_with_reference(job: SampleJob, ours: MeasuredClips, others: MeasuredClips) -> ClipComparison:
    """Compare the clips with those of the reference, print the changes, and return the comparison."""
    comparison = compare_clips(ours, others, job.config.stage.fail_on)
    for note in comparison_notes(ours, others):
        echo(f"note: {note}")
    table(changes_rows(comparison), CHANGE_COLUMNS)
    echo(comparison.line)
    return comparison


def log_result(job: SampleJob, ours: MeasuredClips, comparison: ClipComparison | None) -> None:
    """Log the metrics and the comparison to the tracker."""
    names = list(next(iter(ours.metrics.values())))
    rows = [[name, *metrics.values()] for name, metrics in ours.metrics.items()]
    with open_tracker(job.config, "sample", job.run) as tracker:
        tracker.log(0, {f"sample/{key}": value for key, value in mean_metrics(ours.metrics).items()})
        tracker.table("sample/sharpness", ["clip", *names], rows)
        if comparison is not None:
            tracker.table("sample/comparison", CHANGE_COLUMNS, changes_rows(comparison))


def measure_or_refuse(clips: ClipSource, like: MeasuredClips | None = None) -> MeasuredClips:
    """Measure the clips, at the sizes of ``like``.

    Raise :class:`DataError` for clips that are too small.
    """
    try:
        return measure_clips(clips.path, like, clips.kind)
    except ValueError as error:
        raise DataError(str(error), "Give frames of at least 24 pixels each way.") from error


def clip_scores(config: Config[SampleStage], clips: ClipSource) -> dict[str, dict[str, float]]:
    """Return learned scores by clip; an empty dictionary when ``sampling.clip_model`` names no CLIP model."""
    if config.sampling.clip_model is None:
        return {}
    from cogflow.sharpness.clip_iqa import ClipScores

    try:
        scores = ClipScores(Path(config.sampling.clip_model).expanduser(), ranks.device())
    except (OSError, ValueError) as error:
        raise DataError(
            f"sampling.clip_model={config.sampling.clip_model} is no CLIP model: {error}", "Give a transformers folder."
        ) from error
    found = {clip.name: scores(clip.frames) for clip in read_clips(clips.path, clips.kind)}
    names = list(next(iter(found.values())))
    table([[name, *(f"{values[key]:.3f}" for key in names)] for name, values in found.items()], ["clip", *names])
    return found


def comparison_notes(ours: MeasuredClips, others: MeasuredClips) -> list[str]:
    """Return what limits the comparison: rescaled clips, codecs, different frame rates."""
    notes = list(ours.notes)
    if not (ours.raw and others.raw):
        notes.append(
            "the videos went through a codec, which softens them and adds noise; raw frames are measured more exactly"
        )
    if rates_differ(ours, others):
        notes.append(f"the frame rates differ: {', '.join(TEMPORAL_DEFECTS)} are not judged")
    return notes


def changes_rows(comparison: ClipComparison) -> list[list[str]]:
    """Return the comparison's table: one row per metric, in the order of :data:`CHANGE_COLUMNS`."""
    return [
        [name, *(f"{value:+.3f}" for value in (one.size, one.low, one.high, one.z))]
        for name, one in comparison.changes.items()
    ]
