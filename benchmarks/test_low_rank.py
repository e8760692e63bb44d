"""A LoRA put into a matrix, per instruction set and rank: bytes of the matrix per second, on one thread.

2 * rank operations for each element. Read and written is each element once.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import merge_engine._native as native

INSTRUCTION_SETS = [name for name in ("baseline", "avx2", "avx512") if native.runs(name)]
WIDTH = 4096
ROUNDS = 5


def array(tensor: torch.Tensor) -> native.HostArray:
    """A bfloat16 tensor for native code."""
    return native.HostArray(tensor.data_ptr(), tensor.numel(), native.DType.BF16, tensor)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("rank", [8, 16, 64, 256])
@pytest.mark.parametrize("transposed", [False, True])
def test_add_low_rank(
    benchmark: BenchmarkFixture, isa: str, rank: int, transposed: bool, small: bool
) -> None:
    rows = 8 if small else 512  # 4 MiB
    values = torch.ones(rows, WIDTH, dtype=torch.bfloat16)
    of_rows, of_columns = torch.zeros(rows, rank).bfloat16(), torch.ones(rank, WIDTH).bfloat16()
    of_rows[:, 0] = 2
    if transposed:
        of_rows, of_columns = of_rows.T.contiguous(), of_columns.T.contiguous()
    kernels = native.Kernels(isa, 1)
    benchmark.pedantic(
        lambda: kernels.add_low_rank(
            values=array(values),
            rows=array(of_rows),
            columns=array(of_columns),
            rank=rank,
            width=WIDTH,
            first=0,
            transposed=transposed,
            scale=1.0,
        ),
        rounds=ROUNDS,
    )
    runs = 1 if benchmark.stats is None else ROUNDS
    if benchmark.stats is not None:
        benchmark.extra_info["gb_per_s"] = round(values.nbytes / benchmark.stats.stats.median / 1e9, 2)
    assert torch.equal(values, torch.full_like(values, 1 + 2 * runs))
