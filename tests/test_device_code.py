"""The hot CUDA kernels are built for every architecture without spills, and with few instructions an element."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.cuda_kernels import ARCHITECTURES, HOT, OCTET, hot_table, instructions, resources

MOST = {
    "fast_merge_kernel<bf16, elect, 2>": 70,
    "fast_merge_kernel<fp16, elect, 2>": 70,
    "fast_merge_kernel<bf16, slack, 2>": 95,
    "fast_combine_kernel<bf16, 0, 2>": 12,
    "count_windows<bf16, 2>": 20,
}
"""Instructions an element, on sm_90."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("merge_engine._cuda") is None, reason="built without CUDA"
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_hold_everything(architecture: int) -> None:
    stack = {kernel.name: kernel.stack for kernel in resources(architecture)}
    spilling = {hot.kernel: stack[hot.kernel] for hot in HOT if stack[hot.kernel] > 0}
    # With fewer threads at a time, 8 models with slack would need no stack on any card, and take longer.
    assert all(name.endswith("slack, 8>") and size <= 48 for name, size in spilling.items()), spilling


def test_instructions() -> None:
    counted = instructions(90)
    assert {
        name: counted[name] for name, most in MOST.items() if counted[name].instructions > most * OCTET
    } == {}
    assert all(name in hot_table((90,)) for name in MOST)
