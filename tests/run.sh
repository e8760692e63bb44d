#!/usr/bin/env bash
# Sets up what is missing and runs everything that must pass: lint, types, all tests, and the benchmarks on little
# data, with mergekit as an oracle in an environment of its own. Arguments go to pytest.
# Two processes do a test file each: two cores are what continuous integration has, and files share their fixtures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
[ -x .venv-oracle/bin/python ] || "$python" -m venv .venv-oracle
echo "installing merge_engine and its test tools into .venv"
.venv/bin/python -m pip install -q -c constraints.txt -e ".[test,demo,bench,triton]"
echo "installing mergekit into .venv-oracle"
.venv-oracle/bin/python -m pip install -q -r tests/oracle/requirements.txt
.venv-oracle/bin/python -m pip install -q --no-deps mergenetic==0.1.1 # it asks for other versions of all that it needs

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
export MERGE_ENGINE_ORACLE="$PWD/.venv-oracle/bin/python" OMP_NUM_THREADS=1
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
