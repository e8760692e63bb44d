"""How long it takes to bring the rows of an embedding into another order, beside a plain copy of it.

python -m benchmarks.gather_rows [ROWS [WIDTH]]

Times are those of the processor, so that others on the machine count little. Files are in the page cache.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from merge_engine.checkpoint import open_checkpoint
from merge_engine.operands import Operand, RowMap, Rows
from merge_engine.storage import OpenFiles

PIECE = 16 << 20
"""Bytes that are read at a time, as in a merge."""


def seconds(operand: Operand) -> float:
    """Processor time to read a whole operand."""
    size = operand.dtype.itemsize
    memory = memoryview(bytearray(PIECE))
    with OpenFiles() as files:
        start = time.process_time()
        for first in range(0, operand.count, PIECE // size):
            count = min(PIECE // size, operand.count - first)
            operand.read_into(memory[: count * size], first, files)
        return time.process_time() - start


def main(rows: int = 128_000, width: int = 2048) -> None:
    """Print the times of a copy, of a permutation, and of new rows at the end."""
    new = rows // 6
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("base", rows), ("tuned", rows + new)):
            (Path(folder) / name).mkdir()
            matrix = torch.zeros(count, width, dtype=torch.bfloat16)
            save_file({"x": matrix}, Path(folder) / name / "model.safetensors")
        base, tuned = (open_checkpoint(Path(folder) / name).tensors["x"] for name in ("base", "tuned"))
        permutation = random.Random(0).sample(range(rows), rows)
        extended = [*range(rows), *[-1] * new]
        of_tuned = {row: (1, row) for row in range(rows, rows + new)}
        for label, operand in (
            ("copy", base),
            ("permuted", Rows.of([base], RowMap.of(permutation, {}))),
            ("copy of the tuned", tuned),
            ("new rows at the end", Rows.of([base, tuned], RowMap.of(extended, of_tuned))),
        ):
            seconds(operand)  # fills the page cache
            nbytes = operand.count * operand.dtype.itemsize
            print(
                f"{label:20} {operand.shape[0]:,} x {width}, {nbytes / 1e6:,.0f} MB: {seconds(operand):.2f} s"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
