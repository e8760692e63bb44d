"""The hot CUDA kernels are built for every architecture without spills, and with few instructions an element."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.cuda_kernels import ARCHITECTURES, HOT, hot_table, instructions, resources

MOST = {
    "fast_merge_kernel<bf16, elect, 2>": 80,
    "fast_merge_kernel<fp16, elect, 2>": 80,
    "fast_merge_kernel<bf16, slack, 2>": 120,
    "fast_combine_kernel<bf16, 2>": 12,
    "count_windows<bf16, 2>": 24,
}
"""Instructions an element, on sm_90."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("merge_engine._cuda") is None, reason="built without CUDA"
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_hold_everything(architecture: int) -> None:
    stack = {kernel.name: kernel.stack for kernel in resources(architecture)}
    spilling = {hot.kernel: stack[hot.kernel] for hot in HOT if stack[hot.kernel] > 0}
    # With 8 models a few numbers are spilled: fewer threads at a time would cost more.
    assert all(", 8>" in name and size <= 64 for name, size in spilling.items()), spilling


def test_instructions() -> None:
    counted = instructions(90)
    assert {name: counted[name] for name, most in MOST.items() if counted[name] > most} == {}
    assert all(name in hot_table((90,)) for name in MOST)
