#!/usr/bin/env bash
# Install what is missing, then run the main job: drawn clips, a finetuned tiny model, a checked pipeline in runs/tiny-shapes.
# Further words are passed on, such as: bash launch/demo.sh stage.train.steps=20 run.name=short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
exec "$venv/bin/python" -m cogflow stage=flow "$@"
