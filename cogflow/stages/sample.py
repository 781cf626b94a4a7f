"""stage=sample: videos from a run, a checkpoint or a pipeline folder, with their sharpness; or the sharpness of videos that exist."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cogflow import ranks
from cogflow.config.schema import Config, SampleStage
from cogflow.errors import CheckpointError, DataError, QualityGateError
from cogflow.files.paths import run_folder
from cogflow.models import components
from cogflow.sampling import gallery
from cogflow.sampling.prompts import prompts_for
from cogflow.sampling.sampler import Sampler, requests
from cogflow.sampling.source import is_frames, read_clips
from cogflow.sharpness.panel import measure
from cogflow.sharpness.verdict import compare
from cogflow.tracking.console import say, table
from cogflow.tracking.report import record_stage
from cogflow.tracking.tracker import open_tracker
from cogflow.weights.fingerprint import fingerprint
from cogflow.weights.source import find_source

Panels = dict[str, dict[str, float]]


def run(config: Config) -> None:
    """Sample or read ``stage.source``, measure it, compare it with ``stage.reference``; exit code 3 when it is blurrier."""
    stage = config.stage
    if not isinstance(stage, SampleStage):
        raise TypeError("stages.sample needs the settings of stage=sample")
    started = time.time()
    ranks.setup()
    folder = run_folder(config.run)
    source = Path(stage.source).expanduser() if stage.source else folder
    reference = Path(stage.reference).expanduser() if stage.reference else None
    for place in (source, reference):
        if place is not None and not place.exists():
            raise DataError(f"{place} does not exist.", "Give a run, a checkpoint, a pipeline folder, a video or a folder of frames.")
    if reference is not None and not is_frames(reference):
        raise DataError(f"stage.reference={reference} holds no videos or frames.", "Sample it first, then give its folder of videos.")
    how: dict[str, Any] | None = None
    if is_frames(source):
        where, panels = source, measured(source)
    else:
        where = Path(stage.output).expanduser() if stage.output else folder / "sampled"
        panels, how = sample(config, stage, source, where)
    if ranks.is_main():
        conclude(config, folder, source, reference, where, panels, how, started)
    ranks.barrier()


def sample(config: Config, stage: SampleStage, source: Path, where: Path) -> tuple[Panels, dict[str, Any]]:
    """Sample every prompt from its fixed noise into ``where``; the panel of each sample by its name, and how they were made."""
    device = ranks.device()
    dtype = components.resolve_dtype(config.model, device)
    if (source / "model_index.json").is_file():
        base, transformer_folder = source, source
    else:
        base = components.model_folder(config.model)
        # .../transformer or .../ema of a verified checkpoint, or an export
        found = find_source(source, "auto").folder
        transformer_folder = found
    data = config.data
    prompts = prompts_for(stage.prompts or config.sampling.prompts, data.name, captions(config))
    tokenizer, encoder = components.load_tokenizer(base), components.load_text_encoder(base, dtype, device)
    transformer = load_transformer(transformer_folder, dtype, device)
    texts = [prompt.text for prompt in prompts] + [""]
    embeds = components.encode_prompts(tokenizer, encoder, texts, transformer.config.max_text_seq_length).cpu()
    del encoder
    sampler = Sampler(
        transformer, components.load_vae(base), components.load_scheduler(base), embeds[-1], config.sampling,
        frames=data.frames, height=data.height, width=data.width, device=device, dtype=dtype,
    )  # fmt: skip
    facts: dict[str, Any] = {"step": None, "source": str(source), "weights_sha256": fingerprint(transformer.state_dict().items())}
    record = gallery.sample_into(
        where, sampler, requests(prompts, embeds, config.sampling.seeds), fps=data.fps, facts=facts, title="samples"
    )
    return {entry["name"]: entry["sharpness"] for entry in record["samples"]}, record["sampling"]


def load_transformer(folder: Path, dtype: Any, device: Any) -> Any:
    """From a pipeline folder, or from a component folder itself."""
    if (folder / "config.json").is_file():
        from diffusers import CogVideoXTransformer3DModel

        loaded = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype, **components.SAFETENSORS_ONLY)
        return loaded.to(device).eval()
    return components.load_transformer(folder, dtype, device).eval()


def captions(config: Config) -> list[str]:
    """Captions to sample when no prompts are given and the clips are the user's own: those of the prepared clips."""
    if config.data.name == "shapes" or config.sampling.prompts:
        return []
    from cogflow.data.cache import LatentCache

    cache = LatentCache(run_folder(config.run) / "cache")
    return [cache.texts[index] for index in cache.holdout or cache.train]


def measured(place: Path) -> Panels:
    return {name: measure(frames) for name, frames in read_clips(place)}


def conclude(
    config: Config, folder: Path, source: Path, reference: Path | None, where: Path, panels: Panels, how: dict[str, Any] | None,
    started: float,
) -> None:  # fmt: skip
    """Show the panels, write ``sample.json``, and raise :class:`QualityGateError` when the reference is sharper."""
    names = list(next(iter(panels.values())))
    table([[name, *(f"{panel[key]:.3f}" for key in names)] for name, panel in panels.items()], ["clip", *names])
    results: dict[str, Any] = {"summary": f"{len(panels)} clips measured", "where": str(where), "sharpness": panels}
    if how is not None:
        results["sampling"] = how
        results["summary"] += f", sampled by {how['scheduler']}"
    verdict: dict[str, Any] | None = None
    if reference is not None:
        verdict = against(panels, measured(reference))
        results |= {"reference": str(reference), "comparison": verdict}
        word = "blurrier than" if verdict["blurrier"] else "as sharp as"
        results["summary"] += f", {word} the reference (z {verdict['z']:+.1f})"
    with open_tracker(config, "sample", folder) as tracker:
        tracker.log(0, {f"sample/{key}": sum(panel[key] for panel in panels.values()) / len(panels) for key in names})
        tracker.table("sample/sharpness", ["clip", *names], [[name, *panel.values()] for name, panel in panels.items()])
    folder.mkdir(parents=True, exist_ok=True)
    record = record_stage(folder, "sample", config, {"source": str(source)}, results, started=started)
    say(f"{results['summary']}\nclips:  {where}\nrecord: {record}")
    if verdict is not None and verdict["blurrier"]:
        raise QualityGateError(
            f"{source} is blurrier than {reference}: {verdict['z']:.1f} null deviations ({verdict['pairing']}).",
            f"The clips are kept in {where}; the figures are in {record}.",
        )


def against(panels: Panels, others: Panels) -> dict[str, Any]:
    """The verdict as a record: clip by clip when the names agree, else as two groups."""
    if not others:
        raise CheckpointError("The reference holds no clip.", "Give videos or frames.")
    verdict = compare(panels, others)
    soft = any(finding.kind == "soft" and finding.level == "alarm" for finding in verdict.findings)
    return {"blurrier": soft, "z": verdict.changes["blur"].z, "pairing": verdict.pairing, "line": verdict.line()}
