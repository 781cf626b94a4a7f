#!/usr/bin/env bash
# Install cogflow when needed, then check format, lint and types and run the tests. Further words go to pytest:
#   bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
# One test more than there are cores runs at a time (tests/conftest.py), each with one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# tests/conftest.py puts the slow files first, so that none runs alone at the end.
exec "$venv/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 20 "$@"
