"""The hot CUDA kernels compile for every architecture without spills, and move 16 bytes at a time."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.cuda_kernels import ARCHITECTURES, compile_all

HOT = {
    "consensus.cu": (
        "fast_kernel<bf16, 2>",
        "fast_kernel<fp16, 2>",
        "merge_kernel<bf16, 8, 4, 0, 0>",
        "merge_kernel<fp16, 8, 4, 0, 0>",
    ),
    "histogram.cu": ("first_level<bf16, 8>", "first_level<fp16, 8>", "first_level<fp32, 4>"),
    "combine.cu": ("combine_kernel<bf16, 8>", "combine_kernel<fp16, 8>", "combine_kernel<fp32, 4>"),
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", HOT)
def test_hot_kernels(source: str) -> None:
    kernels = {(kernel.name, kernel.architecture): kernel for kernel in compile_all((source,))}
    for name in HOT[source]:
        for architecture in ARCHITECTURES:
            kernel = kernels[name, architecture]
            assert kernel.spill_bytes == 0, kernel
            assert kernel.vector_loads >= (1 if source == "combine.cu" else 2), kernel  # a base has its own
            assert kernel.vector_stores == (source != "histogram.cu"), kernel
    for (name, _), kernel in kernels.items():
        if name.startswith("fast_kernel"):  # with more models, a thread has fewer bytes of each
            assert kernel.spill_bytes == 0, kernel
