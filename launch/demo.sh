#!/usr/bin/env bash
# Install cogflow when needed, then run stage=flow: draw clips, finetune the tiny model, and write a checked pipeline to runs/tiny-shapes.
# Further words are passed on, for example: bash launch/demo.sh stage.train.steps=20 run.name=short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
exec "$venv/bin/python" -m cogflow stage=flow "$@"
