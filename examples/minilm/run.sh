#!/usr/bin/env bash
# Installs merge_engine into a virtual environment of its own (.venv in the repository) and runs the demo.
# PYTHON names the interpreter that makes the environment, by default python3.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../.." && pwd)
cd -- "$root"

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
echo "installing merge_engine and the demo's packages into .venv (the first time takes minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"

exec .venv/bin/python examples/minilm/demo.py
