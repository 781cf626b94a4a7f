#!/usr/bin/env bash
# Make or refresh the environment in .venv; done in a second when nothing changed. Sourced or run by the other scripts.
# PYTHON: the interpreter to build on (default python3). COGFLOW_VENV: another place for the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
venv=${COGFLOW_VENV:-.venv}

if [ -n "$(command -v sha256sum)" ]; then hash="sha256sum"; else hash="shasum -a 256"; fi
stamp=$({ cat pyproject.toml constraints.txt launch/install.sh; pwd; } | $hash)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then
  # shellcheck disable=SC2317 # reached when it is run, not sourced
  return 0 2>/dev/null || exit 0
fi

if ! command -v "$python" >/dev/null; then
  echo "install: $python was not found. Install Python 3.10 or newer, or set PYTHON=/path/to/python3." >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "install: $python is $("$python" --version 2>&1), 3.10 or newer is needed. Set PYTHON=/path/to/python3.10." >&2
  exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "install: $python has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 2
fi

echo "install: making $venv (a few minutes the first time)"
rm -f "$venv/.installed"
here='import sys, pip; print(sys.version_info[:2])'
clear=()
if [ -d "$venv" ] && [ "$("$venv/bin/python" -c "$here" 2>/dev/null)" != "$("$python" -c "${here/, pip/}")" ]; then
  clear=(--clear) # of another Python, or broken off half-way
fi
"$python" -m venv "${clear[@]}" "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
# torch first: DeepSpeed is built from source and asks torch what this machine has.
"${pip[@]}" torch packaging numpy
"${pip[@]}" --editable '.[dev]'
"$venv/bin/python" -m pip check
echo "$stamp" > "$venv/.installed"
echo "install: done"
