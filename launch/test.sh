#!/usr/bin/env bash
# Install cogflow when needed, then check format, lint and types and run the tests. Further words go to pytest:
#   bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
# Two tests run at a time on two cores, each with one thread, so that they do not wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# tests/conftest.py puts the slow files first, so that none runs alone at the end.
exec "$venv/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 20 "$@"
