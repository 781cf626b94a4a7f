#!/usr/bin/env bash
# Install what is missing, then check format, style, types and behaviour. Further words go to pytest: bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
exec "$venv/bin/python" -m pytest "$@"
