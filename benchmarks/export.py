"""Compare stage=export with CogVideo's converter and ``cp``: ``python -m benchmarks.export --vs CLONE [--model
cogvideox-5b]``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.output import RESULTS, new_parser, report
from benchmarks.peers import cogvideo_export
from cogflow.benchmarking.export_cost import compare_export, export_result, make_source, weights_file
from cogflow.errors import ConfigError
from cogflow.models.family import MODEL_SPECS

CONVERTER = Path("tools") / "convert_weight_sat2hf.py"


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("export", __doc__)
    parser.add_argument("--vs", type=Path, required=True, help="a clone of zai-org/CogVideo")
    parser.add_argument("--vs-python", default=sys.executable, help="the interpreter of the clone's own environment")
    parser.add_argument("--model", choices=list(MODEL_SPECS), default="tiny", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="number of layers, for small machines; default: the model's")
    parser.add_argument("--repeats", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--folder",
        type=Path,
        default=RESULTS / "export",
        help="folder of the files, which need three times the checkpoint's size",
    )
    parser.add_argument("--keep", action="store_true", help="keep the files")
    given = parser.parse_args(words)
    clone = given.vs.expanduser()
    if not (clone / CONVERTER).is_file():
        raise ConfigError(f"--vs {clone} holds no {CONVERTER}.", "Name a clone of zai-org/CogVideo.")
    source = make_source(given.folder, given.model, given.layers)
    member = MODEL_SPECS[given.model]
    sizes = [str(given.layers or member.layers), str(member.heads), str(member.rotary)]
    script = [given.vs_python, str(Path(cogvideo_export.__file__)), str(clone)]
    converter = [*script, str(weights_file(source)), str(given.folder / "peer"), *sizes]
    runs = compare_export(source, given.folder, given.repeats, {"CogVideo's script": converter})
    if not given.keep:
        shutil.rmtree(given.folder)
    report(export_result(runs), given.output)


if __name__ == "__main__":
    main()
