#!/usr/bin/env bash
# Installs merge_engine into a virtual environment of its own (.venv in the repository), merges the shipped trio and
# evaluates it. PYTHON names the interpreter that makes the environment, by default python3.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd -- "$here/../.."

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
echo "installing merge_engine and the example's packages into .venv (the first time takes minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"

exec .venv/bin/python -m examples.low_resource.trio
