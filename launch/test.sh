#!/usr/bin/env bash
# Install what is missing, then check format, style, types and behaviour. Further words go to pytest: bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
# Two tests at a time on two cores: each with one thread, or they would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# tests/conftest.py puts the slow files first, so that none is left alone at the end.
exec "$venv/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 20 "$@"
