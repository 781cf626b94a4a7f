"""Write a SAT checkpoint of a CogVideoX model with random values and the real names, shapes, dtype and files."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml

from cogflow.benchmarking.random_model import pool_values
from cogflow.export import diffusers_configs, sat_tables, sat_yaml
from cogflow.export.export_plan import make_plan
from cogflow.export.facts import published_facts, published_vae_facts
from cogflow.export.tensor_operations import inverse_table
from cogflow.files.atomic_write import write_json, write_text
from cogflow.files.publish import publish_folder
from cogflow.models.loading import DTYPES
from cogflow.runtime.progress import progress
from cogflow.weights.strict_loading import expected_shapes, meta_model
from cogflow.weights.tensor_source import TensorInfo
from cogflow.weights.weights_writer import PlannedTensor, write_torch_file


def make_sat_checkpoint(folder: Path, family: str, layers: int | None = None) -> Path:
    """Publish the checkpoint of the model ``family`` at ``folder`` and return its file.

    ``layers``: number of layers, by default the model's.
    """
    facts = published_facts(family)
    if layers is not None:
        facts = replace(facts, layers=layers)
    config = diffusers_configs.transformer_config(facts)
    dtype = DTYPES[facts.dtype]
    shapes = expected_shapes(meta_model(config, "the family's config"))
    plan = make_plan(
        inverse_table(sat_tables.transformer_table(config)),
        {name: TensorInfo(name, shape, dtype, Path()) for name, shape in shapes.items()},
    )
    exact = {step.targets[0]: step.operation for step in plan.steps if not step.sources}
    random_values = pool_values(dtype)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name in exact:  # the export refuses position tables that are not exact
            return exact[name].make(name, {}).to(dtype)
        return random_values(name, shape)

    outputs = [
        PlannedTensor(sat_tables.TRANSFORMER_PREFIX + name, shape, dtype, partial(values, name, shape))
        for step in plan.steps
        for name, shape in step.out_shapes.items()
    ]
    vae = diffusers_configs.vae_config(published_vae_facts(family))
    model = sat_yaml.model_yaml(config, diffusers_configs.scheduler_config(facts), vae)
    with publish_folder(folder, replace=True) as partly:
        (partly / "1").mkdir()
        sizes = {output.name: output.bytes(dtype) for output in outputs}
        with progress(sum(sizes.values()), "checkpoint", unit="bytes") as bar:
            write_torch_file(
                partly / "1" / "mp_rank_00_model_states.pt",
                outputs,
                key="module",
                beside={"iteration": 1},
                dtype_of=lambda output: dtype,
                on_tensor=lambda statistics: bar.advance(sizes[statistics.name]),
            )
        write_text(partly / "latest", "1")
        write_json(partly / "model_config.json", sat_yaml.model_config(config))
        training = yaml.safe_dump(sat_yaml.training_config(model, str(facts.dtype)), sort_keys=False)
        write_text(partly / "training_config.yaml", training)
    return folder / "1" / "mp_rank_00_model_states.pt"
