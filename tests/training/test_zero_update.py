"""Test that the fused ZeRO update computes what DeepSpeed's own update computes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow.training import optimizer_update
from tests.faults.server import Server

USUAL = list(product((1, 2), ("bfloat16", "float32"), (0.0, 0.05)))


@pytest.fixture(scope="module")
def found(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of every case by cogflow and by DeepSpeed alone, and those of a step that is not finite."""
    cases: list[dict[str, Any]] = []
    for zero, dtype, clipping in USUAL:
        cases += [
            {"what": "updated", "zero": zero, "dtype": dtype, "clipping": clipping, "own": own} for own in (False, True)
        ]
    cases += [{"what": "updated", "zero": zero, "dtype": "bfloat16", "clipping": 0.05, "spoilt": 2} for zero in (1, 2)]
    file = tmp_path_factory.mktemp("updates") / "found.json"
    done = server.run(str(file), *map(json.dumps, cases), seconds=600, program="tests.training.updates")
    assert done.codes == [0], done.text[-6000:]
    results = json.loads(Path(file).read_text())
    return {"usual": list(zip(results[0:-2:2], results[1:-2:2], strict=True)), "spoilt": results[-2:]}


@pytest.mark.parametrize("case", range(len(USUAL)))
def test_weights_and_norms_equal_deepspeeds_update(found: dict[str, Any], case: int) -> None:
    mine, own = found["usual"][case]
    assert own["by itself"] and not mine["by itself"]
    assert mine["norms"] == pytest.approx(own["norms"], rel=1e-6) and min(own["norms"]) > 0.05
    assert mine["applied"] == own["applied"] == [True] * 4
    assert (
        mine["weights"] == pytest.approx(own["weights"], rel=1e-6, abs=1e-9)
        and len(mine["weights"]) == 7 * 13 + 13 + 13 * 3 + 3
    )


@pytest.mark.parametrize("case", [0, 1])
def test_a_gradient_that_is_not_finite_skips_the_update(found: dict[str, Any], case: int) -> None:
    spoilt = found["spoilt"][case]
    assert spoilt["applied"] == [True, True, False, True] and all(map(torch.isfinite, torch.tensor(spoilt["weights"])))


def test_the_padding_of_the_last_part_is_zero() -> None:
    found = optimizer_update.flat([torch.ones(2, 3, dtype=torch.bfloat16), torch.full((4,), 2.0)], 12, torch.empty(0))
    assert found.tolist() == [1.0] * 6 + [2.0] * 4 + [0.0] * 2 and found.dtype == torch.float32
