"""Shards by the hub's rules, and sizes as users write them."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_engine.checkpoint import OutputTensor, parse_size, plan_shards
from merge_engine.dtypes import BF16, BY_CODE, F32
from merge_engine.storage import PAGE


def bytes_tensor(name: str, nbytes: int) -> OutputTensor:
    return OutputTensor(name, BY_CODE["U8"], (nbytes,))


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 50))
def test_same_shards_as_the_hub(sizes: list[int], limit: int) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    ours = plan_shards([bytes_tensor(name, size) for name, size in named.items()], limit)
    state = {name: torch.zeros(size, dtype=torch.uint8) for name, size in named.items()}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit).filename_to_tensors
    assert {shard.name: set(shard.tensors) for shard in ours} == {
        name: set(tensors) for name, tensors in theirs.items()
    }


def test_alignment_inside_a_shard() -> None:
    tensors = [
        OutputTensor("odd", BF16, (3,)),
        OutputTensor("page", BF16, (PAGE // 2,)),
        OutputTensor("wide", F32, (5,)),
        OutputTensor("empty", F32, (0,)),
        OutputTensor("pages", F32, (PAGE,)),
        OutputTensor("odd2", BF16, (1,)),
    ]
    (shard,) = plan_shards(tensors, 10**9)
    assert shard.name == "model.safetensors"
    assert list(shard.tensors) == ["page", "empty", "pages", "wide", "odd", "odd2"]
    end = len(shard.header)
    for tensor in shard.tensors.values():
        assert tensor.start == end
        assert tensor.start % (PAGE if tensor.nbytes % PAGE == 0 else tensor.dtype.itemsize) == 0
        end += tensor.nbytes
    assert shard.size == end


def test_metadata() -> None:
    (shard,) = plan_shards([], 1, {"merge": "abc"})
    assert b'"__metadata__":{"format":"pt","merge":"abc"}' in shard.header
    assert shard.size == len(shard.header)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("200M", 200 * 10**6),
        ("1.5 TB", 1_500_000_000_000),
        ("5B", 5 * 10**9),
        ("7k", 7000),
        ("1_000", 1000),
        (123, 123),
    ],
)
def test_sizes(text: int | str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["9" * 400 + ".5", "9" * 400, "9" * 5000, "10000000TB"])
def test_sizes_beyond_any_file(text: str) -> None:
    with pytest.raises(ValueError, match="more bytes than any file has") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    "text", ["", "GB", "5GiB", "-1GB", "5 apples", "0", 0, -3, True, "1e9", "0.0001KB", "٣x"]
)
def test_no_sizes(text: int | str) -> None:
    with pytest.raises(ValueError, match=r"size|byte"):
        parse_size(text)
