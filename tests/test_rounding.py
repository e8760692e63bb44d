"""Scalar arithmetic without torch gives torch's numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.dtypes import MERGEABLE, DType
from merge_engine.methods.rounding import rounded, weight_sum


@pytest.mark.parametrize("dtype", MERGEABLE, ids=str)
@given(value=st.floats(width=32, allow_nan=False))
def test_rounding_is_torchs(dtype: DType, value: float) -> None:
    expected = torch.tensor(value, dtype=torch.float32).to(getattr(torch, dtype.name))
    assert rounded(value, dtype) == float(expected)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=30))
def test_weights_are_added_in_torchs_order_for_mergekit(weights: list[float]) -> None:
    dtype = DType("F32", "float32", 32)
    assert weight_sum(weights, dtype, storage_rounding=True) == float(torch.tensor(weights).sum())


def test_weights_that_cancel_only_in_float32_are_refused() -> None:
    models = [torch.ones(4) for _ in range(3)]
    with pytest.raises(me.PlanError, match="the weights sum to 0"):
        me.merge_tensors(None, models, "linear", weight=[0.2, 0.1, -0.3])
