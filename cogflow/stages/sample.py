"""stage=sample: videos from a run, a checkpoint or a pipeline folder, with their sharpness; or the sharpness of videos that exist."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cogflow.artifacts.identify import Artifact, ArtifactKind, identify, kind_named
from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.schema import Config, ModelConfig, SampleStage
from cogflow.errors import CheckpointError, DataError, QualityGateError
from cogflow.export.origin import find_transformer
from cogflow.files.paths import run_folder
from cogflow.models import loading
from cogflow.models.code_check import refuse_code
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.sampling import gallery
from cogflow.sampling.clip_files import MEDIA, clips_of, read_clips
from cogflow.sampling.prompts import prompts_for
from cogflow.sampling.sampler import Sampler, requests
from cogflow.sampling.score import IN_TIME, Scored, against, mean, rates_differ, score
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker
from cogflow.weights.tensor_source import weights_fingerprint

SHOWN = ("wavelet_ratio", "edge_sharpness", "blur_effect", "contrast", "saturation", "grain", "motion", "artefacts")
"""Metrics of the table on the terminal; the record holds all."""
SAMPLED = (
    ArtifactKind.PIPELINE,
    ArtifactKind.EXPORT,
    ArtifactKind.CHECKPOINT,
    ArtifactKind.RUN,
    ArtifactKind.COMPONENTS,
    ArtifactKind.COMPONENT,
)
"""Kinds of artifact whose transformer is sampled."""


def run(config: Config[SampleStage]) -> None:
    """Sample or read ``stage.source``, measure it, compare it with ``stage.reference``; exit code 3 when it is worse."""
    stage = config.stage
    started = time.time()
    ranks.setup()
    folder = run_folder(config.run)
    source = resolve_source(stage, folder)
    reference = resolve_reference(stage)
    how: dict[str, Any] | None = None
    where = source.root
    if source.kind not in MEDIA:
        where = Path(stage.output).expanduser() if stage.output else RunLayout(folder).sampled
        how = sample(config, stage, source, where)
    if ranks.is_main():
        conclude(config, stage, folder, source.path, reference, where, how, started)
    ranks.barrier()


def resolve_source(stage: SampleStage, folder: Path) -> Artifact:
    """Return what ``stage.source`` is, by default the run ``folder``: clips to measure, or a model to sample.

    Raise :class:`CheckpointError` for a path that is neither.
    """
    kind = kind_named(stage.source_kind, "stage.source_kind")
    artifact = identify(Path(stage.source or folder), kind, key="stage.source")
    if artifact.kind not in (*MEDIA, *SAMPLED):
        raise CheckpointError(
            f"stage.source={artifact.path} is {artifact.kind.label} ({artifact.reason}), which stage=sample does not sample.",
            f"Export it first: python -m cogflow stage=export stage.source={artifact.path}",
        )
    echo(artifact.line("stage.source"))
    return artifact


def resolve_reference(stage: SampleStage) -> Path | None:
    """Return the path of the clips that ``stage.reference`` names. Raise :class:`DataError` when it holds none."""
    if stage.reference is None:
        return None
    kind = kind_named(stage.reference_kind, "stage.reference_kind")
    artifact = identify(Path(stage.reference), kind, key="stage.reference")
    if (clips := clips_of(artifact)) is None:
        raise DataError(
            f"stage.reference={artifact.path} is {artifact.kind.label} ({artifact.reason}) and holds no videos or frames.",
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


def sample(config: Config[SampleStage], stage: SampleStage, source: Artifact, where: Path) -> dict[str, Any]:
    """Sample every prompt from its fixed noise into ``where``; return how the samples were made."""
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    base, transformer_folder = resolve_model(source, config.model)
    data = config.data
    prompts = prompts_for(stage.prompts or config.sampling.prompts, data.name, captions(config))
    tokenizer, encoder = loading.load_tokenizer(base), loading.load_text_encoder(base, dtype, device)
    transformer = load_transformer(transformer_folder, dtype, device)
    texts = [prompt.text for prompt in prompts] + [""]
    embeds = loading.encode_prompts(tokenizer, encoder, texts, transformer.config.max_text_seq_length).cpu()
    del encoder
    sampler = Sampler(
        transformer, loading.load_vae(base), loading.load_scheduler(base), embeds[-1], config.sampling,
        frames=data.frames, height=data.height, width=data.width, device=device, dtype=dtype,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "step": None,
        "source": str(source.path),
        "weights_sha256": weights_fingerprint(transformer.state_dict().items()),
    }
    record = gallery.sample_into(
        where, sampler, requests(prompts, embeds, config.sampling.seeds), fps=data.fps, facts=facts, title="samples"
    )
    how: dict[str, Any] = record["sampling"]
    return how


def load_transformer(folder: Path, dtype: Any, device: Any) -> Any:
    """From a pipeline folder, or from a component folder itself."""
    if (folder / "config.json").is_file():
        from diffusers import CogVideoXTransformer3DModel

        loaded = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype, **loading.SAFETENSORS_ONLY)
        return loaded.to(device).eval()
    return loading.load_transformer(folder, dtype, device).eval()


def captions(config: Config[SampleStage]) -> list[str]:
    """Captions to sample when no prompts are given and the clips are the user's own: those of the prepared clips."""
    if config.data.name == "shapes" or config.sampling.prompts:
        return []
    from cogflow.data.cache import LatentCache

    cache = LatentCache(RunLayout(run_folder(config.run)).cache)
    return [cache.texts[index] for index in cache.holdout or cache.train]


def conclude(
    config: Config[SampleStage], stage: SampleStage, folder: Path, source: Path, reference: Path | None, where: Path, how: dict[str, Any] | None,
    started: float,
) -> None:  # fmt: skip
    """Measure, show, write ``sample.json``, and raise :class:`QualityGateError` when the reference is better."""
    others = measured(reference) if reference is not None else None
    ours = measured(where, others)
    names = list(next(iter(ours.panels.values())))
    table([[name, *(f"{panel[key]:.3f}" for key in SHOWN)] for name, panel in ours.panels.items()], ["clip", *SHOWN])
    results: dict[str, Any] = {
        "summary": f"{len(ours.panels)} clips measured",
        "where": str(where),
        "sharpness": ours.panels,
    }
    if how is not None:
        results["sampling"] = how
        results["summary"] += f", sampled by {how['scheduler']}"
    if learned := clip_scores(config, where):
        results["learned"] = learned
    comparison: dict[str, Any] | None = None
    if others is not None:
        comparison = against(ours, others, stage.fail_on)
        results |= {"reference": str(reference), "comparison": comparison}
        results["summary"] += (
            f", worse than the reference: {', '.join(comparison['kinds'])}"
            if comparison["worse"]
            else ", as good as the reference"
        )
        for note in remarks(ours, others):
            echo(f"note: {note}")
        table(changes_rows(comparison), ["channel", "change", "from", "to", "z"])
        echo(comparison["line"])
    with open_tracker(config, "sample", folder) as tracker:
        tracker.log(0, {f"sample/{key}": value for key, value in mean(ours.panels).items()})
        tracker.table(
            "sample/sharpness", ["clip", *names], [[name, *panel.values()] for name, panel in ours.panels.items()]
        )
        if comparison is not None:
            tracker.table("sample/comparison", ["channel", "change", "from", "to", "z"], changes_rows(comparison))
    folder.mkdir(parents=True, exist_ok=True)
    record = record_stage(folder, "sample", config, {"source": str(source)}, results, started=started)
    echo(f"{results['summary']}\nclips:  {where}\nrecord: {record}")
    if comparison is not None and comparison["worse"]:
        lines = [finding["line"] for finding in comparison["findings"] if finding["kind"] in comparison["kinds"]]
        raise QualityGateError(
            f"{source} is {'blurrier' if comparison['blurrier'] else 'worse'} than {reference} ({comparison['pairing']}):\n  "
            + "\n  ".join(lines),
            f"The clips are kept in {where}; the figures are in {record}.",
        )


def measured(place: Path, like: Scored | None = None) -> Scored:
    try:
        return score(place, like)
    except ValueError as error:
        raise DataError(str(error), "Give frames of at least 24 pixels each way.") from error


def clip_scores(config: Config[SampleStage], where: Path) -> dict[str, dict[str, float]]:
    """Learned scores by clip, when ``sampling.clip_model`` names a CLIP model on disk."""
    if config.sampling.clip_model is None:
        return {}
    from cogflow.sharpness.learned import ClipScores

    try:
        scores = ClipScores(Path(config.sampling.clip_model).expanduser(), ranks.device())
    except (OSError, ValueError) as error:
        raise DataError(
            f"sampling.clip_model={config.sampling.clip_model} is no CLIP model: {error}", "Give a transformers folder."
        ) from error
    found = {clip.name: scores(clip.frames) for clip in read_clips(where)}
    names = list(next(iter(found.values())))
    table([[name, *(f"{values[key]:.3f}" for key in names)] for name, values in found.items()], ["clip", *names])
    return found


def remarks(ours: Scored, others: Scored) -> list[str]:
    """What a reader of the verdict should know."""
    said = list(ours.notes)
    if not (ours.raw and others.raw):
        said.append(
            "measured on videos that went through a codec, which softens and adds noise of its own; raw frames tell more"
        )
    if rates_differ(ours, others):
        said.append(f"the frame rates differ: {', '.join(IN_TIME)} are not judged")
    return said


def changes_rows(comparison: dict[str, Any]) -> list[list[str]]:
    return [
        [name, *(f"{one[key]:+.3f}" for key in ("size", "low", "high", "z"))]
        for name, one in comparison["changes"].items()
    ]
