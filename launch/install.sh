#!/usr/bin/env bash
# Make or update the environment in .venv; takes a second when nothing changed. The other scripts source it.
# PYTHON: the interpreter to use (default python3). COGFLOW_VENV: another folder for the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
venv=${COGFLOW_VENV:-.venv}

if [ -n "$(command -v sha256sum)" ]; then hash="sha256sum"; else hash="shasum -a 256"; fi
stamp=$({ cat pyproject.toml constraints.txt launch/install.sh; pwd; } | $hash)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then
  # shellcheck disable=SC2317 # reached when the script is run and not sourced
  return 0 2>/dev/null || exit 0
fi

if ! command -v "$python" >/dev/null; then
  echo "install: $python was not found. Install Python 3.10 or newer, or set PYTHON=/path/to/python3." >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "install: $python is $("$python" --version 2>&1); Python 3.10 or newer is needed. Set PYTHON=/path/to/python3.10." >&2
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
  clear=(--clear) # made by another Python, or incomplete
fi
"$python" -m venv "${clear[@]}" "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
# torch comes first: the build of DeepSpeed from source asks torch for the properties of this machine.
"${pip[@]}" torch packaging numpy
"${pip[@]}" --editable '.[dev]'
"$venv/bin/python" -m pip check
echo "$stamp" > "$venv/.installed"
echo "install: done"
