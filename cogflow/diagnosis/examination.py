"""The steps of a diagnosis on two sides: what each needs from those before it, and what is rendered for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cogflow.assemble.components import STEMS
from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.diagnose_settings import DiagnoseStage
from cogflow.config.model_section import ModelConfig
from cogflow.diagnosis import probe_latents
from cogflow.diagnosis.config_differences import compare_configs
from cogflow.diagnosis.diagnosis_input import DiagnosisInput, resolve
from cogflow.diagnosis.finding import StepResult
from cogflow.diagnosis.precision import compare_precision
from cogflow.diagnosis.probes import probes_of
from cogflow.diagnosis.rendering import Mix, Rendered, Renderer, mix_of, swapped
from cogflow.diagnosis.sample_quality import compare_rungs, compare_trainings
from cogflow.diagnosis.swaps import SAME, Suspect, Tried, attempt, psnr, shown, suspects_of, try_swaps
from cogflow.diagnosis.weight_differences import compare_weights
from cogflow.diagnosis.weight_evidence import EvidenceProbe, weigh_evidence
from cogflow.errors import QualityGateError
from cogflow.ladder.schedule_probe import ProbeClip
from cogflow.models.loading import SAFETENSORS_ONLY, use_onednn_convolutions
from cogflow.records.pipeline_records import PipelineSampling, VerifyRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.sampling.prompts import prompts_for


class Examination:
    """``candidate`` held against ``reference``, which may have no files. Steps are methods; each takes the results so far."""

    def __init__(
        self, candidate: DiagnosisInput, reference: DiagnosisInput, config: Config[DiagnoseStage], stage: DiagnoseStage
    ) -> None:
        self.candidate, self.reference, self.config, self.stage = candidate, reference, config, stage
        self.device = ranks.device()
        self.tried: list[Tried] = []
        self.goal: Rendered | None = None
        self.found: Rendered | None = None
        self.healed: Rendered | None = None
        self._target: Mix | None = None
        self._render: Renderer | None = None

    def skip(self, name: str, steps: Sequence[StepResult]) -> str:
        """Why a step is left out; empty when it is taken."""
        equal = all(not step.findings for step in steps) and not self._changed(steps)
        explained = any(step.name == "swaps" and step.facts["healed_by"] for step in steps)
        if name == "weights" and not self.reference.parts:
            return "there is no reference to compare them with"
        if name in ("rungs", "swaps") and not (self.candidate.complete and self.reference.complete):
            return "needs a complete pipeline on both sides"
        if name == "precision" and not self.candidate.complete:
            return "needs a complete pipeline"
        if name in ("rungs", "swaps") and self._from_image():
            return "image-to-video pipelines are not sampled yet"
        if name in ("precision", "evidence") and self._broken(
            steps, "text_encoder" if name == "precision" else "transformer"
        ):
            return "what it would run is not whole"
        if self.stage.full:
            return ""
        if name in ("rungs", "swaps", "precision", "evidence") and equal and self.reference.parts:
            return "nothing differs (stage.full=true looks all the same)"
        if name in ("precision", "evidence") and explained:
            return "the swaps explain all (stage.full=true looks all the same)"
        return ""

    def facts(self, steps: Sequence[StepResult]) -> StepResult:
        return compare_configs(self.candidate, self.reference)

    def weights(self, steps: Sequence[StepResult]) -> StepResult:
        return compare_weights(self.candidate, self.reference, lambda name: echo(f"  reading {name}"))

    def rungs(self, steps: Sequence[StepResult]) -> StepResult:
        render, target = self.renderer(), self.target(steps)
        self.goal = render(target)
        self.found, failed = attempt(render, mix_of(self.candidate, self.config.sampling))
        result = compare_rungs(self.candidate, self.found, self.goal, failed)
        if self.found is not None and self._transformer_is_its_own(steps):
            # In the reference's surroundings: what is wrong with the candidate's own is not training's fault.
            trained = compare_trainings(self.goal, render(mix_of(self.reference, self.config.sampling)))
            result = replace(
                result, findings=[*result.findings, *trained.findings], lines=[*result.lines, *trained.lines]
            )
        return result

    def swaps(self, steps: Sequence[StepResult]) -> StepResult:
        findings = [finding for step in steps for finding in step.findings]
        different = self._changed(steps)
        target = self.target(steps)
        if not self._transformer_is_its_own(steps):
            different = (
                [*different, "transformer"]
                if "transformer" not in different and self._moved(steps, "transformer")
                else different
            )
        else:
            different = [name for name in different if name != "transformer"]
        suspects = suspects_of(findings, different)
        result, self.tried = try_swaps(
            mix_of(self.candidate, self.config.sampling),
            target,
            suspects,
            self.renderer(),
            target=target,
            advance=_told,
        )
        return result

    def precision(self, steps: Sequence[StepResult]) -> StepResult:
        latents, captions = self._clips()
        embeds = self.renderer().embed(mix_of(self.candidate, self.config.sampling), captions[:1])
        whole = {name for name in STEMS if not self._broken(steps, name)}
        probes = probes_of(self.candidate, latents[0], captions[0], embeds[0], self.device, whole)
        return compare_precision(probes, self.candidate.rung, self.device.type == "cpu")

    def evidence(self, steps: Sequence[StepResult]) -> StepResult:
        part = self.candidate.parts["transformer"]
        if self._from_image():
            return StepResult("evidence", [], ["not for models that take an image"], {})
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            part.folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY
        )
        latents, captions = self._clips()
        embeds = self.renderer().embed(mix_of(self.candidate, self.config.sampling), captions)
        clips = [
            ProbeClip(clip, text, f"evidence:{index}")
            for index, (clip, text) in enumerate(zip(latents, embeds[:-1], strict=True))
        ]
        probe = EvidenceProbe(transformer.to(self.device).eval(), clips, self.device, torch.float32)
        return weigh_evidence(self.candidate, probe, self.stage.scaling_factors, self.stage.snr_shift_scales)

    def renderer(self) -> Renderer:
        if self._render is None:
            called = self.reference.sampling or self.candidate.sampling
            data = self._data()
            prompts = prompts_for(self.config.sampling.prompts, data.name if data.name == "shapes" else "shapes", [])[
                : self.stage.prompts
            ]
            self._render = Renderer(
                prompts, self.config.sampling, frames=(called or data).frames, height=(called or data).height, width=(called or data).width, device=self.device, dtype=self._dtype(),
            )  # fmt: skip
        return self._render

    def target(self, steps: Sequence[StepResult]) -> Mix:
        """How the candidate should look: the reference; where the candidate is a finetune of its model, with the candidate's weights."""
        if self._target is None:
            target = mix_of(self.reference, self.config.sampling)
            if self._transformer_is_its_own(steps):
                mine = mix_of(self.candidate, self.config.sampling)
                fields = [
                    one.name
                    for step in steps
                    for one in step.findings
                    if one.component == "transformer" and one.kind == "config"
                ]
                for field in fields:
                    mine = swapped(mine, "transformer", field, target)
                target = swapped(target, "transformer", "", mine)
            self._target = target
        return self._target

    def called(self) -> PipelineSampling:
        """How to sample the mended pipeline, for its card."""
        data, sampling = self._data(), self.config.sampling
        recorded = self.candidate.sampling or self.reference.sampling
        return recorded or PipelineSampling(
            height=data.height,
            width=data.width,
            frames=data.frames,
            fps=data.fps,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            use_dynamic_cfg=sampling.use_dynamic_cfg,
            dtype="fp32",
        )

    def prove(self, partial: Path) -> VerifyRecord:
        """That the mended folder has no fault left in its facts, and samples as it should."""
        side = resolve(partial, ModelConfig(name="auto"), "candidate")
        found = compare_configs(side, self.reference).findings
        left = [one.place for one in found if one.guilty and one.kind == "config" and one.component != "sampling"]
        if left:
            raise QualityGateError(
                f"The mended folder is not healed: {', '.join(left)} still differ.", "Give stage.reference=FOLDER."
            )
        if self.goal is None or self._target is None:
            reason, line = "there is no reference to sample", "its facts are as they should be; not sampled"
            return VerifyRecord("skipped", reason=reason, line=line)
        mix = replace(mix_of(side, self.config.sampling), sampling=self._target.sampling)
        self.healed, failed = attempt(self.renderer(), mix)
        before, after = psnr(self.found, self.goal), psnr(self.healed, self.goal)
        if after < SAME:
            raise QualityGateError(
                f"The mended folder is not healed: {failed or shown(after)} against how it should look.", ""
            )
        line = f"samples {shown(after)} against how they should look, {shown(before)} before"
        return VerifyRecord("repaired", line=line, before=before, after=after)

    def pictures(self) -> dict[str, dict[str, torch.Tensor]]:
        """By sample: the frames of each side, for the page."""
        rows: dict[str, dict[str, torch.Tensor]] = {}
        for title, rendered in (("as it should be", self.goal), ("candidate", self.found), ("mended", self.healed)):
            for name, frames in (rendered.frames if rendered is not None else {}).items():
                rows.setdefault(name, {})[title] = frames
        return rows

    def numbers(self) -> dict[str, float]:
        """For W&B."""
        if self.goal is None:
            return {}
        found = {"diagnose/psnr": psnr(self.found, self.goal)}
        return found | ({"diagnose/psnr_mended": psnr(self.healed, self.goal)} if self.healed is not None else {})

    def _changed(self, steps: Sequence[StepResult]) -> list[str]:
        """Components whose weights differ by more than a cast."""
        facts = next((step.facts for step in steps if step.name == "weights"), {})
        return [name for name, one in facts.items() if not one.get("equal")]

    def _broken(self, steps: Sequence[StepResult], component: str) -> bool:
        """Whether it cannot be loaded, or gives no numbers: then nothing can be learned from running it."""
        kinds = ("broken", "missing", "shape", "transposed", "non_finite")
        return component not in self.candidate.parts or any(
            one.component == component and one.guilty and one.kind in kinds for step in steps for one in step.findings
        )

    def _from_image(self) -> bool:
        settings = self.candidate.parts["transformer"].settings
        return bool(settings.get("in_channels") != settings.get("out_channels"))

    def _moved(self, steps: Sequence[StepResult], name: str) -> bool:
        return name in self._changed(steps)

    def _transformer_is_its_own(self, steps: Sequence[StepResult]) -> bool:
        """Whether the transformers differ, and nothing is wrong with that."""
        accused = any(
            one.component == "transformer" and one.guilty
            for step in steps
            if step.name == "weights"
            for one in step.findings
        )
        return self._moved(steps, "transformer") and not accused

    def _clips(self) -> probe_latents.Clips:
        places = [
            Path(self.stage.data).expanduser() if self.stage.data else None,
            self.candidate.run,
            self.reference.run,
        ]
        places += [self.candidate.place, self.reference.place]
        found = probe_latents.from_runs(places, self.stage.clips)
        if found is not None:
            return found
        side = self.reference if "vae" in self.reference.parts else self.candidate
        vae = AutoencoderKLCogVideoX.from_pretrained(
            side.parts["vae"].folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY
        )
        return probe_latents.drawn(
            use_onednn_convolutions(vae.eval().requires_grad_(False)), self._data(), self.stage.clips
        )

    def _data(self) -> DataConfig:
        family = self.candidate.family
        called = self.candidate.sampling
        if called is not None:
            return replace(self.config.data, frames=called.frames, height=called.height, width=called.width)
        if family is None:
            return self.config.data
        return replace(
            self.config.data, frames=family.frames, height=family.height, width=family.width, fps=float(family.fps)
        )

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


def _told(note: str) -> None:
    echo(f"    {note}")


__all__ = ["Examination", "Suspect"]
