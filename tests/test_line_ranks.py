"""DELLA's masks: which elements the ranks within lines of any length keep, whatever the magnitudes in them."""

from __future__ import annotations

import pytest
import torch
from adversarial import DTYPES, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import agree

from merge_engine.backends.operations import Consensus, Entry, Line, Ranked

SHARED = 4 * 65536
"""Longer lines are shared by all threads."""

PROBABILITIES = ((0.5, 0.15), (0.1, 0.09), (0.9, 0.05), (0.5, 0.4999), (0.3, 0.0), (0.002, 0.001))

MAGNITUDES = {
    "normal": lambda n, g: torch.randn(n, generator=g) * 2e-4,
    "mostly zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.2),
    "zero": lambda n, g: torch.zeros(n),
    "few": lambda n, g: torch.randint(-3, 4, (n,), generator=g) * 2.0**-11,
    "many octaves": lambda n, g: torch.exp2(-60 * torch.rand(n, generator=g)),
    "ties side by side": lambda n, g: (
        (torch.randn(n, generator=g) * 2e-4).bfloat16()
        * (1 + torch.randint(0, 3, (n,), generator=g) * 2.0**-20)
    ),
    "close": lambda n, g: 1 + torch.randint(0, 3000, (n,), generator=g) * 2.0**-23,
    "equal": lambda n, g: torch.full((n,), 0.25),
    "outlier": lambda n, g: torch.randn(n, generator=g).mul(1e-3).index_fill(0, torch.tensor([n // 2]), 6e4),
    "not finite": lambda n, g: torch.randn(n, generator=g).index_fill(0, torch.tensor([0, n - 1]), torch.inf),
    "no number": lambda n, g: torch.randn(n, generator=g).index_fill(0, torch.tensor([n // 3]), torch.nan),
}


def agree_on_ranks(
    dtype: torch.dtype, magnitudes: str, line: Line, slabs: int, mask: Ranked, start: int, *, on_base: bool
) -> None:
    """Demands the reference's bytes of a merge that keeps by ranks."""
    count = line.length * line.stride * slabs
    g = generator(count, line.length)
    base = torch.randn(count, generator=g) * 0.02 if on_base else torch.zeros(count)
    base = base.to(dtype)
    model = (base.double() + MAGNITUDES[magnitudes](count, g).double()).to(dtype)
    agree(Consensus((Entry(mask, 1.0),), "sum", True), base, [model], line=line, start=start)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(MAGNITUDES)),
    st.integers(1, 64) | st.integers(65, 5000) | st.integers(5001, 200_000),
    st.sampled_from((1, 1, 1, 2, 9, 70)),
    st.integers(1, 5),
    st.sampled_from(PROBABILITIES),
    st.booleans(),
    st.sampled_from((0, 64, 4096 + 33, 2**34 - 200)),
    st.booleans(),
)
def test_ranks_in_lines_of_any_length(
    dtype: torch.dtype,
    magnitudes: str,
    length: int,
    stride: int,
    slabs: int,
    probability: tuple[float, float],
    inverse: bool,
    start: int,
    on_base: bool,
) -> None:
    if length > 5000:
        stride, slabs = min(stride, 2), 1
    mask = Ranked(*probability, inverse, 2**63 + 11)
    agree_on_ranks(dtype, magnitudes, Line(length, stride), slabs, mask, start, on_base=on_base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitudes", sorted(MAGNITUDES))
def test_ranks_in_lines_that_threads_share(dtype: torch.dtype, magnitudes: str) -> None:
    """The second line begins within a word of notes."""
    mask = Ranked(0.5, 0.3, False, 5)
    agree_on_ranks(
        dtype, magnitudes, Line(SHARED + 1001, 1), 2, mask, 4096 + 33, on_base=magnitudes == "normal"
    )
