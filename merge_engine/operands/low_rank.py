"""Operands that are a tensor with a LoRA put into it, computed while they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import merge_engine._native as native
from merge_engine.dtypes import DType
from merge_engine.operands.base import Access, Operand
from merge_engine.storage import ByteRange, File, OpenFiles

_PIECE = 1 << 20
"""Bytes that are read and computed at a time: they stay in the processor's cache meanwhile."""

_ROWS = 32
"""Rows in a piece at least: all factors of the columns are widened anew for each."""

_KERNELS = native.Kernels(native.instruction_set(), 1)


@dataclass(frozen=True, slots=True)
class LowRank(Operand):
    """``base + scale * (b @ a)``, rounded once to the base's dtype (docs/arithmetic.md, "LoRA adapters").

    ``base`` is a matrix [out, in], ``a`` [rank, in], ``b`` [out, rank]. ``transposed``: the base is [in, out], and the
    product is transposed. All have dtypes that can be merged. A range is computed by the thread that reads it, in the
    memory where it is used, at 2 * rank operations for each element. Of the factors, those of the range's rows and all
    of its columns are read each time: in place, or as copies where their file cannot be mapped.
    """

    base: Operand
    a: Operand
    b: Operand
    scale: float
    owner: str
    transposed: bool = False
    dtype: DType = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        object.__setattr__(self, "shape", self.base.shape)

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return f"{self.base.label} with the LoRA of {self.a.owner}"

    @property
    def files(self) -> tuple[File, ...]:
        """See ``Operand.files``."""
        return tuple(dict.fromkeys((*self.base.files, *self.a.files, *self.b.files)))

    @property
    def stored_bytes(self) -> int:
        """Those of the base: the factors are small, and stay in the page cache."""
        return self.base.stored_bytes

    @property
    def reads_parts(self) -> bool:
        """See ``Operand.reads_parts``."""
        return self.base.reads_parts and self.a.reads_parts and self.b.reads_parts

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``."""
        return _Sum(self, start, count, access)


class _Sum(ByteRange):
    """Elements of the base, read to where they are used, and the product added to them there."""

    def __init__(self, operand: LowRank, start: int, count: int, access: Access):
        self._operand = operand
        self._start = start
        self._access = access
        self.length = self.room = count * operand.dtype.itemsize

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        operand, size = self._operand, self._operand.dtype.itemsize
        width = operand.shape[1]
        files, way = self._access.files, self._access.way
        start, end = self._start + first // size, self._start + last // size
        if start == end:
            return
        first_row, rows = start // width, (end - 1) // width + 1 - start // width
        factors = _Factors(operand, first_row, rows, files)
        step = max(_PIECE // size, _ROWS * width)
        for at in range(start, end, step):
            count = min(step, end - at)
            piece = memory[first + (at - start) * size : first + (at - start + count) * size]
            operand.base.read_into(piece, at, files, way)
            factors.add_to(piece, at)
        factors.verify()


class _Factors:
    """The factors of some rows, and of all columns."""

    def __init__(self, operand: LowRank, first_row: int, rows: int, files: OpenFiles):
        self._operand = operand
        self._first_row = first_row
        self._rank = operand.a.shape[0]
        self._ranges: list[ByteRange] = []
        self._files = files
        if operand.transposed:
            every = operand.a.shape[1]
            parts = [self._load(operand.a, k * every + first_row, rows) for k in range(self._rank)]
            self._of_rows, self._of_columns = memoryview(b"".join(parts)), self._load(operand.b)
        else:
            self._of_rows = self._load(operand.b, first_row * self._rank, rows * self._rank)
            self._of_columns = self._load(operand.a)

    def add_to(self, values: memoryview, start: int) -> None:
        """Add the product to elements of the base, from ``start`` on, in place."""
        operand, width = self._operand, self._operand.shape[1]
        rows, columns = (operand.a, operand.b) if operand.transposed else (operand.b, operand.a)
        _KERNELS.add_low_rank(
            values=_array(values, operand.dtype),
            rows=_array(self._of_rows, rows.dtype),
            columns=_array(self._of_columns, columns.dtype),
            rank=self._rank,
            width=width,
            first=start - self._first_row * width,
            transposed=operand.transposed,
            scale=operand.scale,
        )

    def verify(self) -> None:
        """Raise ``CheckpointError`` if the factors were not those of their files."""
        for each in self._ranges:
            each.verify()

    def _load(self, operand: Operand, start: int = 0, count: int | None = None) -> memoryview:
        """Elements of a factor, in place if that can be."""
        some = operand.count if count is None else count
        found = operand.range(start, some, Access(self._files, "cached", in_place=True))
        memory = memoryview(bytearray(found.room))
        if found.length:
            found.read(memory, 0, found.length)
        self._ranges.append(found)
        return found.view(memory)


def _array(memory: memoryview, dtype: DType) -> native.HostArray:
    return native.HostArray(memory, getattr(native.DType, dtype.code))
