#!/usr/bin/env bash
# Everything that wants a GPU, in one go that is meant to take 6 minutes: build for this card, prove the kernels on it,
# measure them. It prints as it goes, so that a run that is cut off has told what it found. Needs torch with CUDA, triton,
# nvcc, pytest, hypothesis, xxhash, typer, rich and pydantic (with WHEELS=FOLDER, pydantic is installed from wheels there),
# for `merges` 60 GB in /dev/shm, and for `sanitizer` compute-sanitizer. pytest-xdist makes the proofs faster.
#
#     bash benchmarks/gpu.sh [PART ...]
#
# Parts, all by default: build lifetimes conformance kernels triton merges sessions sanitizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 # the reference would take all cores for each test

pytest_here() {
    local workers=()
    if python -c "import xdist" 2>/dev/null; then workers=(-n "$(nproc)"); fi
    python -m pytest -q -p no:cacheprovider "${workers[@]}" "$@"
}

build() {
    if ! python -c "import pydantic" 2>/dev/null; then
        python -m pip install -q --no-index --find-links "${WHEELS:?a folder with wheels of pydantic}" pydantic
    fi
    MERGE_ENGINE_CUDA=1 MERGE_ENGINE_CUDA_ARCHS=native python -m pip install -q --no-build-isolation --no-deps -e .
    python -m merge_engine doctor
}
lifetimes() { MERGE_ENGINE_TEST_BACKENDS=cuda python -m pytest -q -p no:cacheprovider tests/test_cuda_lifetimes.py; }
conformance() {
    local files=(tests/test_conformance.py tests/test_conformance_scores.py tests/test_cuda_streaming.py)
    MERGE_ENGINE_TEST_BACKENDS=cuda pytest_here "${files[@]}"
}
kernels() { python -m benchmarks.gpu_kernels --backends cuda; }
triton() {
    MERGE_ENGINE_TEST_BACKENDS=triton pytest_here tests/test_conformance.py tests/test_conformance_scores.py
    python -m benchmarks.gpu_kernels --backends cuda,triton --elements 100000000
}
merges() { env -u OMP_NUM_THREADS python -m benchmarks.gpu_merges; }
sessions() { env -u OMP_NUM_THREADS python -m benchmarks.session --size 1.1b --device cuda; }
sanitizer() {
    for tool in memcheck racecheck; do
        MERGE_ENGINE_TEST_BACKENDS=cuda timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python -m pytest -q -p no:cacheprovider tests/test_conformance.py -k "bfloat16 and (misleading or strange)"
    done
}

parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then parts=(build lifetimes conformance kernels triton merges sessions sanitizer); fi
failed=()
for part in "${parts[@]}"; do
    echo "== $part, after $SECONDS s"
    "$part" || failed+=("$part") # a part that fails does not keep the others from telling
done
echo "== done after $SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
