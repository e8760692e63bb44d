#!/usr/bin/env bash
# Everything that wants a GPU, in one go: build, prove the kernels on it, measure them. Takes about 15 minutes; needs
# torch with CUDA, nvcc, pytest, the dependencies in pyproject.toml (xxhash and pydantic are rarely there already) and
# 60 GB in /dev/shm (--size 1.1b: 10 GB). Options go to benchmarks/gpu.py.
#
#     bash benchmarks/gpu.sh [--mergekit PATH/mergekit-yaml] [--size 1.1b]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MERGE_ENGINE_CUDA=1 MERGE_ENGINE_CUDA_ARCHS=native python -m pip install -q --no-build-isolation --no-deps -e .
python -m merge_engine doctor
MERGE_ENGINE_TEST_BACKENDS=cpu,cuda python -m pytest tests/test_conformance.py
MERGE_ENGINE_TEST_BACKENDS=triton python -m pytest tests/test_conformance.py tests/triton_streaming.py
python -m benchmarks.gpu "$@"
