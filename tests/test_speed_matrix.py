"""The cells of the speed matrix: the same bytes on every instruction set and from the reference; and the command works.

A fast path may serve a single combination of parameters, so every pair of values that occurs together is merged here,
and with TIES, which has most paths, every three.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from under_test import INSTRUCTION_SETS

from benchmarks.matrix import __main__ as matrix
from benchmarks.matrix.cells import LENGTH, Cell, cells
from benchmarks.matrix.worker import merge, tensors
from merge_engine.backends import Backend, create_backend
from merge_engine.backends.cpu import CpuBackend
from merge_engine.methods import METHODS

SIZES = (5003, 4 * LENGTH, 4096 + 64 + 17, 3 * LENGTH)
"""Elements, in turns. An odd number of them is a single line."""
LARGE = 22 * LENGTH
"""Elements that instruction sets merge, not the reference: threads share them."""
BACKENDS = [CpuBackend(threads=3, instruction_set=name) for name in INSTRUCTION_SETS]
REFERENCE = create_backend("reference")


USUAL = {"row": LENGTH, "cut": 0, "start": 0}
"""What a layout has if nothing is said of it."""


def values(cell: Cell) -> Iterator[tuple[str, Any]]:
    """What can differ between the cells of a method."""
    for name in ("data", "zeros", "models", *USUAL):
        if getattr(cell, name) != USUAL.get(name):
            yield name, getattr(cell, name)
    yield from cell.options


def sampled() -> dict[str, list[Cell]]:
    """A few cells of each method that cover all values that occur together."""
    order = cells()
    Random(0).shuffle(order)
    covered: dict[str, set[Any]] = {method: set() for method in METHODS}
    found: dict[str, list[Cell]] = {method: [] for method in METHODS}
    for cell in order:
        together = set(combinations(values(cell), 3 if cell.method == "ties" else 2))
        if not together <= covered[cell.method]:
            covered[cell.method] |= together
            found[cell.method].append(cell)
    return found


SAMPLE = sampled()


def test_every_method_has_cells() -> None:
    assert all(SAMPLE.values())


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes(method: str) -> None:
    for number, cell in enumerate(SAMPLE[method]):
        count = SIZES[number % len(SIZES)]
        odd = count % 2 and cell.row == LENGTH
        assert_same(replace(cell, row=None) if odd else cell, count, [REFERENCE, *BACKENDS])
        assert_same(cell, LARGE, BACKENDS)


def assert_same(cell: Cell, count: int, backends: Sequence[Backend]) -> None:
    asked = asdict(cell)
    given = tensors(asked, count)
    first, *others = (merge(asked, given, backend) for backend in backends)
    for backend, other in zip(backends[1:], others, strict=True):
        name = getattr(backend, "instruction_set", backend.name)
        assert torch.equal(raw(first), raw(other)), f"{name}: {count} elements of {cell}"


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def test_a_cell_that_fails_is_shown() -> None:
    worker = matrix.Worker(Path(sys.executable), threads=1, PYTHONPATH=str(matrix.HERE))
    wrong = Cell("ties", "bf16", 0, 2, (("density", 2),))
    with pytest.raises(matrix.MeasurementError, match="density"):
        worker.nanoseconds(wrong, INSTRUCTION_SETS[0], 4096, 1)
    assert worker.nanoseconds(replace(wrong, options=()), INSTRUCTION_SETS[0], 1 << 16, 3) > 0
    worker.close()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "all.txt"
    used = INSTRUCTION_SETS[0]
    narrow = ["--only", "linear,slerp", "--dtypes", "bf16", "--every", "11", "--sets", used, "--threads", "1"]
    command = ["matrix", *narrow, "--elements", "1048576", "--worst", "3", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", [*command, "--against", sys.executable])
    matrix.main()
    printed = capsys.readouterr().out
    assert f"{used}: the worst of" in printed
    assert f"{used}: times linear\n" in printed
    assert f"{used}: times linear, before\n" in printed
    header, about, columns, *lines = saved.read_text().splitlines()
    assert header.startswith("# python -m benchmarks.matrix --only linear,slerp")
    assert "versions" in about
    assert lines
    for line in lines:
        fields = dict(zip(columns.split(" | "), line.split(" | "), strict=True))
        assert fields["merge"].startswith(("linear", "slerp"))
        assert fields["set"] == used
        assert math.isfinite(float(fields["times linear"]))
        assert math.isfinite(float(fields["before / after"]))
