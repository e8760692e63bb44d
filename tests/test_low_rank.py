"""A tensor with a LoRA put into it: the formula of docs/arithmetic.md in any range, by every reader."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from under_test import INSTRUCTION_SETS

from merge_engine import _native
from merge_engine.checkpoint import open_checkpoint
from merge_engine.dtypes import MERGEABLE
from merge_engine.errors import CheckpointError
from merge_engine.operands import Access, InMemory, LowRank, Operand, same_bytes
from merge_engine.storage import PAGE, OpenFiles, Way, aligned, allocate

DTYPES = [getattr(torch, dtype.name) for dtype in MERGEABLE]
some = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def formula(
    base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool = False
) -> torch.Tensor:
    """The formula, term by term: a [rank, in], b [out, rank], base [out, in] or, transposed, [in, out]."""
    real = torch.float64 if base.dtype == torch.float64 else torch.float32
    a, b = a.to(real), b.to(real)
    total = torch.zeros(b.shape[0], a.shape[1], dtype=real)
    for k in range(a.shape[0]):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    total = total.T if transposed else total
    merged = (base.to(real) + torch.tensor(scale, dtype=torch.float64).to(real) * total).to(base.dtype)
    return torch.where(merged.isnan(), torch.tensor(torch.nan, dtype=base.dtype), merged)


class Drawn(NamedTuple):
    base: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    @property
    def expected(self) -> torch.Tensor:
        return formula(*self)


@st.composite
def products(draw: st.DrawFn, longest: int = 150, widest: int = 200) -> Drawn:
    """Small matrices of all dtypes. Some values are huge, tiny, infinite or NaN."""
    out, into, rank = (draw(st.integers(1, n)) for n in (longest, widest, 12))
    transposed = draw(st.booleans())
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = [(into, out) if transposed else (out, into), (rank, into), (out, rank)]
    values = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    for odd in draw(st.lists(st.sampled_from([0.0, -0.0, 1e-40, 3e38, torch.inf, torch.nan]), max_size=4)):
        flat = values[draw(st.integers(0, 2))].view(-1)
        flat[draw(st.integers(0, len(flat) - 1))] = odd
    base, a, b = (each.to(draw(st.sampled_from(DTYPES))) for each in values)
    return Drawn(base, a, b, draw(st.sampled_from([1.0, 2.0, 0.1, -0.3, 1e30])), transposed)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def array(tensor: torch.Tensor) -> _native.HostArray:
    kind = next(each.code for each in MERGEABLE if getattr(torch, each.name) == tensor.dtype)
    return _native.HostArray(tensor.data_ptr(), tensor.numel(), getattr(_native.DType, kind), tensor)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@some
@given(products(longest=600), st.data())
def test_the_kernel(isa: str, drawn: Drawn, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, drawn.base.numel()))
    count = data.draw(st.integers(0, drawn.base.numel() - first))
    values = drawn.base.reshape(-1)[first : first + count].clone()
    rows, columns = (drawn.a, drawn.b) if drawn.transposed else (drawn.b, drawn.a)
    _native.Kernels(isa, 1).add_low_rank(
        values=array(values),
        rows=array(rows),
        columns=array(columns),
        rank=drawn.a.shape[0],
        width=drawn.base.shape[1],
        first=first,
        transposed=drawn.transposed,
        scale=drawn.scale,
    )
    assert raw(values) == raw(drawn.expected.reshape(-1)[first : first + count])


def test_the_kernel_stays_inside_of_its_factors() -> None:
    ones = array(torch.ones(6))
    for changed in ({"rank": 0}, {"width": 0}, {"width": 4}, {"rank": 2}, {"first": 1}, {"first": 2**63}):
        arguments = {"rank": 1, "width": 3, "first": 0} | changed
        with pytest.raises((ValueError, IndexError)):
            _native.Kernels("baseline", 1).add_low_rank(
                values=ones,
                rows=array(torch.ones(2)),
                columns=array(torch.ones(3)),
                transposed=False,
                scale=1.0,
                **arguments,
            )


def stored(folder: Path, drawn: Drawn, torchs: bool = False) -> LowRank:
    """The operand in two files, whose tensors begin at odd places."""
    odd = torch.zeros(3, dtype=torch.uint8)
    save_file({"a-odd": odd, "w": drawn.base.contiguous()}, folder / "model.safetensors")
    factors = {"a": drawn.a.contiguous(), "b": drawn.b.contiguous()}
    if torchs:
        torch.save(factors, folder / "lora.bin")
    else:
        save_file(factors, folder / "lora.safetensors")
    model = open_checkpoint(folder / "model.safetensors").tensors
    lora = open_checkpoint(folder / f"lora.{'bin' if torchs else 'safetensors'}").tensors
    return LowRank(model["w"], lora["a"], lora["b"], drawn.scale, "model+lora", drawn.transposed)


def read(operand: Operand, start: int, count: int, way: Way, in_place: bool, cuts: Sequence[int]) -> bytes:
    """The bytes of a range, read in pieces of whole pages as the engine does."""
    with OpenFiles() as files:
        found = operand.range(start, count, Access(files, way, in_place))
        memory = allocate(aligned(found.room))
        ends = [at for at in sorted({cut * PAGE for cut in cuts}) if 0 < at < found.length]
        for first, last in zip([0, *ends], [*ends, found.length], strict=True):
            found.read(memory, first, last)
        return bytes(found.view(memory))


@some
@given(products(), st.booleans(), st.sampled_from(["cached", "direct"]), st.booleans(), st.data())
def test_any_range_is_the_same(
    tmp_path: Path, drawn: Drawn, torchs: bool, way: Way, in_place: bool, data: st.DataObject
) -> None:
    operand = stored(tmp_path, drawn, torchs)
    start = data.draw(st.integers(0, operand.count))
    count = data.draw(st.integers(0, operand.count - start))
    expected = raw(drawn.expected.reshape(-1)[start : start + count])
    cuts = data.draw(st.lists(st.integers(1, 30), max_size=3))
    assert read(operand, start, count, way, in_place, cuts) == expected
    memory = memoryview(bytearray(len(expected)))
    with OpenFiles() as files:
        operand.read_into(memory, start, files, way)
    assert bytes(memory) == expected
    assert operand.reads_parts is not torchs


def test_a_large_range_is_computed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_engine.operands.low_rank._PIECE", 5000)
    monkeypatch.setattr("merge_engine.operands.low_rank._ROWS", 1)
    random = torch.Generator().manual_seed(0)
    for transposed in (False, True):
        base, a, b = (torch.randn(shape, generator=random) for shape in ((300, 300), (5, 300), (300, 5)))
        drawn = Drawn(base, a.half(), b.bfloat16(), 0.7, transposed)
        operand = stored(tmp_path, drawn)
        assert read(operand, 7, 80_000, "cached", True, (3, 40)) == raw(drawn.expected.view(-1)[7:80_007])


def test_it_is_a_value(tmp_path: Path) -> None:
    operand = stored(tmp_path, Drawn(torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2), 0.5, False))
    assert pickle.loads(pickle.dumps(operand)) == operand
    assert len({operand, pickle.loads(pickle.dumps(operand))}) == 1
    assert (operand.dtype, operand.shape, operand.count) == (operand.base.dtype, (4, 3), 12)
    assert [file.path.name for file in operand.files] == ["model.safetensors", "lora.safetensors"]
    assert (
        operand.label.startswith(operand.base.label) and str(tmp_path / "lora.safetensors") in operand.label
    )
    merged = InMemory.of("w", torch.full((4, 3), 2.0), "memory")
    assert same_bytes(operand, merged) and not same_bytes(operand, operand.base)


@pytest.mark.parametrize("name", ["model.safetensors", "lora.safetensors"])
def test_a_file_that_has_changed_is_an_error(tmp_path: Path, name: str) -> None:
    operand = stored(tmp_path, Drawn(torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2), 0.5, False))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=name):
        read(operand, 0, 12, "cached", True, ())
