"""Operands whose rows are gathered from others: every source, dtype and piece, against plain torch."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_engine.checkpoint import open_checkpoint
from merge_engine.operands import AVERAGE, MEAN, ZERO, Access, Operand, RowMap, Rows, RowSource
from merge_engine.storage import OpenFiles, allocate

ROWS, WIDTH = (5, 9, 7), 6
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLACES = [(k, row) for k, rows in enumerate(ROWS) for row in range(rows)]

_SOURCES = st.one_of(
    st.sampled_from(PLACES),
    st.sampled_from(PLACES),
    st.just((ZERO, 0)),
    st.tuples(st.just(MEAN), st.integers(0, 2)),
    st.tuples(
        st.just(AVERAGE), st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True).map(tuple)
    ),
)


@st.composite
def sources(draw: st.DrawFn) -> list[RowSource]:
    """Single rows, and runs of rows that follow each other."""
    found: list[RowSource] = []
    for source in draw(st.lists(_SOURCES, min_size=1, max_size=12)):
        kind, start = source
        found.append(source)
        if kind >= 0 and isinstance(start, int):
            more = draw(st.integers(0, ROWS[kind] - start - 1))
            found += [(kind, start + i + 1) for i in range(more)]
    return found


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[int, torch.dtype], tuple[torch.Tensor, Operand]]:
    """A tensor and its operand, by number and dtype; number 2 is in torch's format."""
    found = {}
    for dtype in DTYPES:
        for k, rows in enumerate(ROWS):
            g = torch.Generator().manual_seed(k)
            tensor = torch.randn(rows, WIDTH, generator=g).to(dtype)
            tensor[0, :2] = torch.tensor([-0.0, 0.0])
            folder: Path = tmp_path_factory.mktemp("model")
            if k == 2:
                torch.save({"x": tensor}, folder / "pytorch_model.bin")
            else:
                save_file({"pad": torch.zeros(3), "x": tensor}, folder / "model.safetensors")
            found[k, dtype] = tensor, open_checkpoint(folder).tensors["x"]
    return found


def map_of(sources: list[RowSource], stepwise: bool = False) -> RowMap:
    """Rows of the first operand as its own ones, all others as those of others."""
    own = [start if kind == 0 and isinstance(start, int) else -1 for kind, start in sources]
    return RowMap.of(own, {i: s for i, s in enumerate(sources) if own[i] < 0}, stepwise)


def expected(
    source: RowSource, tensors: list[torch.Tensor], dtype: torch.dtype, stepwise: bool
) -> torch.Tensor:
    kind, start = source
    if kind == ZERO:
        return torch.zeros(WIDTH, dtype=dtype)
    if isinstance(start, tuple):
        rows = [tensors[k][row] for k, row in start]
        if stepwise and len(rows) > 1:
            total = torch.zeros(WIDTH, dtype=dtype)
            for row in rows:
                total = total + row.to(dtype)
            return total / len(rows)
        return rounded(sum((row.double() for row in rows[1:]), rows[0].double()) / len(rows), dtype)
    if kind == MEAN:
        total = torch.full((WIDTH,), -0.0, dtype=torch.float64)
        for row in tensors[start]:
            total += row.double()
        return rounded(total / len(tensors[start]), dtype)
    return tensors[kind][start].to(dtype)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to a dtype in one rounding: torch goes through float32, which rounds twice."""
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    near = values.to(torch.float32).to(dtype)
    around = [torch.nextafter(near, torch.tensor(limit, dtype=dtype)) for limit in (-3e4, 3e4)]
    choices = torch.stack([near, *around])
    distance = (choices.double() - values).abs()
    even = (choices.view(torch.int16) & 1).double() * 1e-300
    return choices.gather(0, (distance + even).argmin(0, keepdim=True))[0]


@settings(max_examples=60)
@given(data=st.data(), stepwise=st.booleans(), way=st.sampled_from(["cached", "direct"]))
def test_rows(inputs, data: st.DataObject, stepwise: bool, way) -> None:
    wanted = data.draw(sources())
    kinds = data.draw(st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3))
    found = [inputs[k, dtype] for k, dtype in enumerate(kinds)]
    operand = Rows.of([operand for _, operand in found], map_of(wanted, stepwise))
    operand = pickle.loads(pickle.dumps(operand))
    dtype = getattr(torch, operand.dtype.name)
    tensors = [tensor for tensor, _ in found]
    if used := [tensors[k].dtype for k in map_of(wanted).used]:
        assert dtype == functools.reduce(torch.promote_types, used)
    whole = torch.stack([expected(source, tensors, dtype, stepwise) for source in wanted])
    assert operand.shape == whole.shape
    first = data.draw(st.integers(0, operand.count))
    count = data.draw(st.integers(0, operand.count - first))
    size = operand.dtype.itemsize
    with OpenFiles() as files:
        memory = bytearray(count * size)
        operand.read_into(memoryview(memory), first, files, way)
        piece = operand.range(first, count, Access(files, way, in_place=True))
        room = allocate(piece.room)
        piece.read(room, 0, piece.length)
        assert bytes(piece.view(room)) == bytes(memory)
    assert bytes(memory) == whole.reshape(-1)[first : first + count].view(torch.uint8).numpy().tobytes()


def test_a_long_run_is_read_past_the_page_cache_and_pieces_of_rows_too(tmp_path: Path) -> None:
    tensor = torch.randn(3000, 250).to(torch.bfloat16)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    own = open_checkpoint(tmp_path).tensors["x"]
    wanted = [*range(100, 2900), *reversed(range(100))]
    operand = Rows.of([own], RowMap.of(wanted, {}))
    assert len(operand.map.firsts) == 101
    with OpenFiles() as files:
        memory = bytearray(operand.count * 2)
        for start in range(0, operand.count, 7777 * 16):
            part = memoryview(memory)[2 * start : 2 * (start + 7777 * 16)]
            operand.read_into(part, start, files, "direct")
    assert torch.frombuffer(memory, dtype=torch.bfloat16).view(-1, 250).equal(tensor[wanted])


def test_the_identity_follows_from_rows_and_operands(inputs) -> None:
    one, two = inputs[0, torch.float32][1], inputs[1, torch.float32][1]

    def identity(operands: list[Operand], rows: list[RowSource]) -> str:
        return Rows.of(operands, map_of(rows)).identity

    assert identity([one, two], [(0, 1), (1, 2)]) == identity([one, two], [(0, 1), (1, 2)])
    assert (
        len(
            {
                identity([one, two], [(0, 1), (1, 2)]),
                identity([one, two], [(0, 1), (1, 3)]),
                identity([one, two], [(0, 1), (ZERO, 0)]),
                identity([two, one], [(0, 1), (1, 2)]),
            }
        )
        == 4
    )
