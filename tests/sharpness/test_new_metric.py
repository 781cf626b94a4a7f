"""Follow "Add a metric or a defect" of CONTRIBUTING.md in a copy of the package: every consumer takes the new metric
without a change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

NEW_LINES = {
    "cogflow/sharpness/frame_metrics.py": (
        "# Tone: what a wrong",
        '''def midtones(luma: Tensor) -> Tensor:
    """Return the share of pixels with a luma between 0.25 and 0.75."""
    return ((luma > 0.25) & (luma < 0.75)).float().mean(dim=(-2, -1))


''',
    ),
    "cogflow/sharpness/metrics.py _TABLE": (
        '    ("finite", "finite values"',
        '    ("midtones", "midtones", "tone", "difference", "share of pixels of medium luma", 0),\n',
    ),
    "cogflow/sharpness/metrics.py frame_values": (
        '        "artefacts": frame_metrics.block_grid(luma),',
        '        "midtones": frame_metrics.midtones(luma),\n',
    ),
    "cogflow/sharpness/noise_model.py METRIC_NOISE": (
        '    "finite": MetricNoise(',
        '    "midtones": MetricNoise(0.001, 0.01, 0.1),\n',
    ),
    "cogflow/sharpness/defects.py DEFECTS": (
        '    "artefacts": "a grid',
        '    "harsh": "midtones are lost",\n',
    ),
    "cogflow/sharpness/defects.py RULES": (
        '    DefectRule("artefacts", "artefacts", 0),',
        '    DefectRule("harsh", "midtones", -1),\n',
    ),
}
"""File, and the name in it that the recipe gives, to the text before which new lines go, and the new lines."""

PROGRAM = """
import json
import numpy as np
from cogflow.ladder.causes import describe_finding
from cogflow.ladder.rung import Rung
from cogflow.ladder.rung_comparison import compare_pairs
from cogflow.sampling.clip_comparison import MeasuredClips, compare_clips
from cogflow.sharpness import compare, measure
from cogflow.stages.sample import changes_rows

random = np.random.default_rng(0)
grey = random.uniform(0.3, 0.7, (3, 32, 48, 1)).astype(np.float32).repeat(3, axis=-1)
harsh = np.where(grey > 0.5, 0.9, 0.1).astype(np.float32)
ours, theirs = {"a": measure(harsh)}, {"a": measure(grey)}
findings = compare(ours, theirs).findings
comparison = compare_clips(MeasuredClips(ours), MeasuredClips(theirs), ["harsh"])
print(json.dumps({
    "metric": [ours["a"]["midtones"], theirs["a"]["midtones"]],
    "defects": [finding.defect for finding in findings],
    "lines": [describe_finding(finding, Rung.TUNED) for finding in findings if finding.defect == "harsh"],
    "failing": comparison.defects,
    "table": [row[0] for row in changes_rows(comparison)],
    "ladder": sorted(compare_pairs(ours, theirs)[0]),
}))
"""


def test_a_metric_and_a_defect_added_by_the_recipe_are_measured_compared_and_reported(
    repository: Path, tmp_path: Path
) -> None:
    recipe = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shutil.copytree(
        repository / "cogflow", tmp_path / "cogflow", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    for target, (anchor, lines) in NEW_LINES.items():
        file, *names = target.split()
        assert file in recipe and all(f"`{name}`" in recipe for name in names)
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert text.count(anchor) == 1, (file, anchor)
        (tmp_path / file).write_text(text.replace(anchor, lines + anchor), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["metric"] == [0.0, 1.0]
    assert "harsh" in result["defects"] and result["failing"] == ["harsh"]
    assert "midtones are lost" in result["lines"][0] and "likely: learning rate too high" in result["lines"][0]
    assert "midtones" in result["table"] and "midtones" in result["ladder"]
