"""Run the steps of a diagnosis on a candidate and a reference, and prove a repaired folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cogflow.assemble.components import STEMS
from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.diagnose_settings import DiagnoseStage
from cogflow.config.model_section import ModelConfig
from cogflow.diagnosis.config_differences import compare_configs
from cogflow.diagnosis.diagnosis_input import DiagnosisInput, resolve
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult, SwapsResult, WeightsResult
from cogflow.diagnosis.precision import ProbeClips, cached_clips, compare_precision, drawn_clips, make_probes
from cogflow.diagnosis.rendering import Mix, Rendered, Renderer, SampleShape, mix_of, swapped
from cogflow.diagnosis.sample_quality import compare_rungs, compare_trainings
from cogflow.diagnosis.swaps import SAME_PSNR, SwapTrials, format_psnr, mean_psnr, suspects_of, try_rendering
from cogflow.diagnosis.weight_differences import compare_weights
from cogflow.diagnosis.weight_evidence import EvidenceProbe, weigh_evidence
from cogflow.errors import QualityGateError
from cogflow.ladder.schedule_probe import ProbeClip
from cogflow.models.loading import SAFETENSORS_ONLY, use_onednn_convolutions
from cogflow.records.pipeline_records import PipelineSampling, VerifyRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.sampling.prompts import prompts_for

STEPS = ("facts", "weights", "rungs", "swaps", "precision", "evidence")
"""Names of the steps in their order; each is a method of :class:`Examination`."""

UNUSABLE_KINDS = ("broken", "missing", "shape", "transposed", "non_finite")
"""Kinds of faults with which a component cannot be loaded, or gives no finite numbers."""


class Examination:
    """Compares ``candidate`` with ``reference``, which may have no files. ``steps``: results so far."""

    def __init__(self, candidate: DiagnosisInput, reference: DiagnosisInput, config: Config[DiagnoseStage]) -> None:
        self.candidate, self.reference, self.config = candidate, reference, config
        self.device = ranks.device()
        self.steps: list[StepResult] = []
        self.goal: Rendered | None = None
        self.found: Rendered | None = None
        self.repaired: Rendered | None = None
        self._target: Mix | None = None
        self._renderer: Renderer | None = None

    def run_step(self, name: str) -> StepResult:
        """Run the step of :data:`STEPS` and keep its result."""
        method = {
            "facts": self.facts,
            "weights": self.weights,
            "rungs": self.rungs,
            "swaps": self.swaps,
            "precision": self.precision,
            "evidence": self.evidence,
        }[name]
        result = method()
        self.steps.append(result)
        return result

    def skip_reason(self, name: str) -> str:
        """Return why a step cannot run or is not needed; empty when it is to run."""
        return self._cannot_run(name) or ("" if self.config.stage.full else self._not_needed(name))

    def _cannot_run(self, name: str) -> str:
        if name == "weights" and not self.reference.parts:
            return "there is no reference to compare them with"
        if name in ("rungs", "swaps") and not (self.candidate.complete and self.reference.complete):
            return "needs two complete pipelines"
        if name == "precision" and not self.candidate.complete:
            return "needs a complete pipeline"
        if name in ("rungs", "swaps") and self.candidate.parts["transformer"].from_image:
            return "image-to-video pipelines are not sampled yet"
        runs = {"precision": "text_encoder", "evidence": "transformer"}
        if name in runs and not self._usable(runs[name]):
            return f"the {runs[name].replace('_', ' ')} cannot be run"
        return ""

    def _not_needed(self, name: str) -> str:
        equal = not self._findings() and not self._changed_components()
        if name not in ("facts", "weights") and equal and self.reference.parts:
            return "nothing differs (stage.full=true runs it anyway)"
        explained = any(isinstance(step, SwapsResult) and step.repaired_by for step in self.steps)
        if name in ("precision", "evidence") and explained:
            return "the swaps explain all (stage.full=true runs it anyway)"
        return ""

    def facts(self) -> StepResult:
        return compare_configs(self.candidate, self.reference)

    def weights(self) -> StepResult:
        return compare_weights(self.candidate, self.reference, lambda name: echo(f"  reading {name}"))

    def rungs(self) -> StepResult:
        render = self.renderer()
        self.goal = render(self.target())
        self.found, failed = try_rendering(render, mix_of(self.candidate, self.config.sampling))
        result = compare_rungs(self.candidate, self.found, self.goal, failed)
        if self.found is None or not self._is_finetune():
            return result
        # In the reference's pipeline: faults of the candidate's other components are not training's.
        trained = compare_trainings(self.goal, render(mix_of(self.reference, self.config.sampling)))
        return replace(result, findings=[*result.findings, *trained.findings], lines=[*result.lines, *trained.lines])

    def swaps(self) -> StepResult:
        changed = self._changed_components()
        if self._is_finetune():
            changed = [name for name in changed if name != "transformer"]
        suspects = suspects_of(self._findings(), changed)
        candidate = mix_of(self.candidate, self.config.sampling)
        trials = SwapTrials(candidate, self.target(), self.renderer(), lambda note: echo(f"    {note}"))
        return trials.run(suspects)

    def precision(self) -> StepResult:
        clips = self._clips()
        mix = mix_of(self.candidate, self.config.sampling)
        embeds = self.renderer().embed(mix, clips.captions[:1])
        usable = {name for name in STEMS if self._usable(name)}
        probes = make_probes(self.candidate, clips, embeds[0], self.device, usable)
        return compare_precision(probes, self.candidate.rung, self.device.type == "cpu")

    def evidence(self) -> StepResult:
        part = self.candidate.parts["transformer"]
        if part.from_image:
            return StepResult("evidence", [], ["not for models that take an image"])
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            part.folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY
        )
        clips = self._clips()
        embeds = self.renderer().embed(mix_of(self.candidate, self.config.sampling), clips.captions)
        probe_clips = [
            ProbeClip(latents, text, f"evidence:{index}")
            for index, (latents, text) in enumerate(zip(clips.latents, embeds[:-1], strict=True))
        ]
        probe = EvidenceProbe(transformer.to(self.device).eval(), probe_clips, self.device, torch.float32)
        stage = self.config.stage
        return weigh_evidence(self.candidate, probe, stage.scaling_factors, stage.snr_shift_scales)

    def renderer(self) -> Renderer:
        """Return the renderer of all samples of this diagnosis."""
        if self._renderer is None:
            data = self._data()
            recorded = self.reference.sampling or self.candidate.sampling
            shape = SampleShape(data.frames, data.height, data.width)
            if recorded is not None:
                shape = SampleShape(recorded.frames, recorded.height, recorded.width)
            prompts = prompts_for(self.config.sampling.prompts, "shapes", [])[: self.config.stage.prompts]
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            self._renderer = Renderer(prompts, self.config.sampling, shape, self.device, dtype)
        return self._renderer

    def target(self) -> Mix:
        """Return how the candidate should look.

        It is the reference; for a finetune of the reference's model, the candidate's weights in the reference's
        pipeline.
        """
        if self._target is None:
            target = mix_of(self.reference, self.config.sampling)
            if self._is_finetune():
                own = mix_of(self.candidate, self.config.sampling)
                for finding in self._findings():
                    if finding.component == "transformer" and finding.kind == "config":
                        own = swapped(own, "transformer", finding.name, target)
                target = swapped(target, "transformer", "", own)
            self._target = target
        return self._target

    def recorded_sampling(self) -> PipelineSampling:
        """Return how to sample the repaired pipeline: as recorded, else by this command's settings."""
        recorded = self.candidate.sampling or self.reference.sampling
        if recorded is not None:
            return recorded
        data, sampling = self._data(), self.config.sampling
        return PipelineSampling(
            height=data.height,
            width=data.width,
            frames=data.frames,
            fps=data.fps,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            use_dynamic_cfg=sampling.use_dynamic_cfg,
            dtype="fp32",
        )

    def verify_repair(self, folder: Path) -> VerifyRecord:
        """Check that the repaired ``folder`` has the right fields and gives the target's samples.

        Raises :class:`QualityGateError` when it does not.
        """
        subject = resolve(folder, ModelConfig(name="auto"), "candidate")
        left = [
            finding.location
            for finding in compare_configs(subject, self.reference).findings
            if finding.faulty and finding.kind == "config" and finding.component != "sampling"
        ]
        if left:
            raise QualityGateError(
                f"The folder is not repaired: {', '.join(left)} still differ.", "Give stage.reference=FOLDER."
            )
        if self.goal is None or self._target is None:
            line = "its config fields are right; not sampled"
            return VerifyRecord("skipped", reason="there is no reference to sample", line=line)
        mix = replace(mix_of(subject, self.config.sampling), sampling=self._target.sampling)
        self.repaired, failed = try_rendering(self.renderer(), mix)
        before, after = mean_psnr(self.found, self.goal), mean_psnr(self.repaired, self.goal)
        if after < SAME_PSNR:
            raise QualityGateError(f"The folder is not repaired: {failed or format_psnr(after)} against the target.")
        line = f"samples against the target: {format_psnr(after)}, before the repair {format_psnr(before)}"
        return VerifyRecord("repaired", line=line, before=before, after=after)

    def frames(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return frames ``[T, H, W, 3]`` in 0..1 by sample name and by title, for the page."""
        rows: dict[str, dict[str, torch.Tensor]] = {}
        for title, rendered in (("target", self.goal), ("candidate", self.found), ("repaired", self.repaired)):
            for name, frames in (rendered.frames if rendered is not None else {}).items():
                rows.setdefault(name, {})[title] = frames
        return rows

    def metrics(self) -> dict[str, float]:
        """Return the PSNR of the candidate and of the repaired pipeline against the target, for the tracker."""
        if self.goal is None:
            return {}
        found = {"diagnose/psnr": mean_psnr(self.found, self.goal)}
        if self.repaired is not None:
            found["diagnose/psnr_repaired"] = mean_psnr(self.repaired, self.goal)
        return found

    def _findings(self) -> list[DiagnosisFinding]:
        return [finding for step in self.steps for finding in step.findings]

    def _changed_components(self) -> list[str]:
        """Return the components whose weights differ by more than a cast."""
        return [name for step in self.steps if isinstance(step, WeightsResult) for name in step.changed]

    def _usable(self, component: str) -> bool:
        """Return whether the component can be loaded and gives finite numbers."""
        return component in self.candidate.parts and not any(
            finding.component == component and finding.faulty and finding.kind in UNUSABLE_KINDS
            for finding in self._findings()
        )

    def _is_finetune(self) -> bool:
        """Return whether the transformers differ, and the comparison of the weights found no fault in that."""
        faulty = any(
            finding.component == "transformer" and finding.faulty and finding.step == "weights"
            for finding in self._findings()
        )
        return "transformer" in self._changed_components() and not faulty

    def _clips(self) -> ProbeClips:
        """Return latents and captions of real clips: of stage.data, of the run of either input, or else drawn ones."""
        stage = self.config.stage
        data = Path(stage.data).expanduser() if stage.data else None
        runs = [data, self.candidate.run, self.reference.run, self.candidate.place, self.reference.place]
        found = cached_clips(runs, stage.clips)
        if found is not None:
            return found
        subject = self.reference if "vae" in self.reference.parts else self.candidate
        vae = AutoencoderKLCogVideoX.from_pretrained(
            subject.parts["vae"].folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY
        )
        return drawn_clips(use_onednn_convolutions(vae.eval().requires_grad_(False)), self._data(), stage.clips)

    def _data(self) -> DataConfig:
        """Return the data settings with the clip size that the candidate was sampled with, or its family's."""
        data, recorded, family = self.config.data, self.candidate.sampling, self.candidate.family
        if recorded is not None:
            return replace(data, frames=recorded.frames, height=recorded.height, width=recorded.width)
        if family is not None:
            fps = float(family.fps)
            return replace(data, frames=family.frames, height=family.height, width=family.width, fps=fps)
        return data
